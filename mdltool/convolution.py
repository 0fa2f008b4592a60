"""Convolutions that a CPU gets right: 3D ones in bf16, and strided 2D ones of one tap.

In bf16 oneDNN (of torch 2.15) reads memory that it never wrote, for kernels that reach further along an axis than
the input does, and leaves anything, NaN included, in the gradient: a kernel of 7 time slices on a clip of 4. Zeros
that are part of the input are right and cost a copy, so such an input gets its padding first.

Its backward of a strided 1x1 convolution of fewer than 16 channels that lie last crashes the process, from 64
pixels up. Such a convolution reads every s-th pixel; taken out first, they are the input of one without a stride.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


def conv3d(
    x_BCTHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """As functional.conv3d, for the arguments that modules hold."""
    reach = [step * (size - 1) + 1 for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if x_BCTHW.device.type == "cpu" and any(
        zeros and extent < far for zeros, extent, far in zip(padding, x_BCTHW.shape[2:], reach, strict=True)
    ):
        x_BCTHW = functional.pad(x_BCTHW, [side for zeros in reversed(padding) for side in (zeros, zeros)])
        padding = (0, 0, 0)
    return functional.conv3d(x_BCTHW, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def conv2d(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As functional.conv2d, for the arguments that modules hold."""
    single = weight.shape[2:] == (1, 1) and not any(padding)
    if single and max(stride) > 1 and x_BCHW.device.type == "cpu" and x_BCHW.shape[1] < 16:
        x_BCHW, stride = x_BCHW[:, :, :: stride[0], :: stride[1]], (1, 1)
    return functional.conv2d(x_BCHW, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


class PointConv2d(nn.Conv2d):
    """An nn.Conv2d of one tap that goes through `conv2d`; its state dict is the same."""

    def _conv_forward(self, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(self.padding, tuple)
        return conv2d(x_BCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class PaddedConv3d(nn.Conv3d):
    """An nn.Conv3d that pads short inputs itself; its state dict is the same."""

    def _conv_forward(self, x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(self.padding, tuple) or self.padding_mode != "zeros":
            return super()._conv_forward(x_BCTHW, weight, bias)
        return conv3d(x_BCTHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def pad_short_inputs(net: nn.Module) -> None:
    """Make every plain nn.Conv3d of a network, a library's or ours, a PaddedConv3d, in place."""
    for module in net.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PaddedConv3d
