"""BatchNorm with statistics over every process, on CPUs too, where the framework's own refuses.

Shape suffixes: B batch, C channels, then any number of axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes; its backward sums the gradients over processes."""


def batch_norm(
    x: Tensor,
    mean_C: Tensor,
    var_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    momentum: float,
    eps: float,
    reduce: Reduce,
) -> Tensor:
    """As functional.batch_norm in training, of the batch that all processes hold together.

    mean_C, var_C: running statistics, moved in place (the variance is the unbiased one, as the framework's).
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    local = wide.numel() // wide.shape[1]
    count = reduce(torch.tensor(float(local), dtype=wide.dtype, device=wide.device))
    batch_mean_C = reduce(wide.sum(axes)) / count
    centred = wide - batch_mean_C.view(shape)
    batch_var_C = reduce(centred.square().sum(axes)) / count
    with torch.no_grad():
        mean_C += momentum * (batch_mean_C.to(mean_C.dtype) - mean_C)
        unbiased_C = batch_var_C * (count / (count - 1).clamp(min=1))
        var_C += momentum * (unbiased_C.to(var_C.dtype) - var_C)
    y = centred * torch.rsqrt(batch_var_C + eps).view(shape)
    if weight_C is not None:
        y = y * weight_C.view(shape)
    if bias_C is not None:
        y = y + bias_C.view(shape)
    return y.to(x.dtype)


class Synchronisable(nn.Module):
    """A module with BatchNorm statistics that takes them over all processes once it has a `reduce`."""

    reduce: Reduce | None = None


class _Synchronised(Synchronisable, nn.modules.batchnorm._BatchNorm):
    """In the place of a BatchNorm layer, with that layer's own parameters and buffers."""

    def __init__(self, source: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats
        )
        for name, tensor in (*source.named_parameters(), *source.named_buffers()):
            setattr(self, name, tensor)
        self.training = source.training

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.reduce is None:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, momentum, self.eps, self.reduce
        )


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """nn.BatchNorm2d over every process."""


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """nn.BatchNorm3d over every process."""


_SYNCHRONISED: dict[type[nn.Module], type[_Synchronised]] = {
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def synchronise(net: nn.Module, reduce: Reduce) -> None:
    """Make every BatchNorm below a network take its statistics over all processes, in place.

    Layers are replaced, their tensors are not: keys, values and what an optimiser holds stay. Whatever keeps a list
    of modules, such as a regime, is to be applied afterwards.
    """
    made: dict[nn.Module, _Synchronised] = {}  # a layer in two places stays one
    for module in list(net.modules()):
        if isinstance(module, Synchronisable):
            module.reduce = reduce
        for name, child in list(module.named_children()):
            if type(child) in _SYNCHRONISED:
                if child not in made:
                    made[child] = _SYNCHRONISED[type(child)](child)  # type: ignore[arg-type]
                    made[child].reduce = reduce
                setattr(module, name, made[child])
