"""Second moments of what enters adapters' weights (spec residual_adapters 2.5, `svd.whiten`).

`watch` puts a module around the layers of a model that is made for measuring alone; whatever then runs through the
model in eval mode is counted, domain by domain.

Shape suffixes: B batch, C channels, then any number of axes; N positions, P the private side of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mdltool.compress.factoring import SiteWeight
from mdltool.model import MultiDomainModel


class Watched(nn.Module):
    """A layer that sums x x^T of its inputs in float64, in the order of its weight's private axes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.total: Tensor | None = None
        self.positions = 0

    @property
    def moment(self) -> Tensor | None:
        """E[x x^T], [P, P]; None where nothing came."""
        return self.total / self.positions if self.total is not None else None

    def forward(self, x: Tensor) -> Tensor:
        for part in x.detach().split(1):  # the taps of one clip at a time
            rows_NP = _rows(self.layer, part)
            self.total = (self.total if self.total is not None else 0) + (rows_NP.mT @ rows_NP).double()
            self.positions += len(rows_NP)
        y: Tensor = self.layer(x)
        return y


def _rows(layer: Any, x: Tensor) -> Tensor:
    """What the layer multiplies its weight with, [N, P]: a row for each of its outputs."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    x_BC = functional.pad(x, [side for zeros in reversed(layer.padding) for side in (zeros, zeros)])
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        # A window of the kernel's reach, of which every `gap`-th entry is a tap.
        x_BC = x_BC.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    axes = len(layer.kernel_size)
    places = [0, *range(2, 2 + axes)]
    return x_BC.permute(*places, 1, *range(2 + axes, 2 + 2 * axes)).flatten(len(places)).flatten(0, -2)


def watch(model: MultiDomainModel, weights: Iterable[SiteWeight]) -> dict[str, dict[str, Watched]]:
    """Put a Watched around the layer of every weight that has one and whose shared side is all of its output.

    Returns weight's name -> domain -> that. Of other weights the error of the outputs is not the error of
    A_t C_t^{1/2}: their private side is not what enters them, or they are parameters without a layer (banks of
    heads).
    """
    found: dict[str, dict[str, Watched]] = {}
    for weight in weights:
        path, _, leaf = weight.parameter.rpartition(".")
        if weight.axes.shared != (0,) or weight.axes.batch or leaf != "weight":
            continue
        for domain, adapter in model.sites[weight.site].adapters.items():
            layer = adapter.get_submodule(path)
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                break
            watched = Watched(layer)
            parent, _, last = path.rpartition(".")
            setattr(adapter.get_submodule(parent), last, watched)
            found.setdefault(weight.name, {})[domain] = watched
    return found


def moments_of(watched: dict[str, dict[str, Watched]]) -> dict[str, dict[str, Tensor]]:
    """Weight's name -> domain -> its second moment, [P, P], of weights that every domain's clips came to."""
    found = {name: {d: layer.moment for d, layer in layers.items()} for name, layers in watched.items()}
    return {
        n: {d: m for d, m in own.items() if m is not None} for n, own in found.items() if None not in own.values()
    }
