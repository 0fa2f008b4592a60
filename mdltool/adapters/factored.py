"""Adapter weights as products of two low-rank factors (spec residual_adapters 2.5, 7.9).

A weight is read as matrices [*batch, S, P]: S is the side that means the same for every domain, P the side that is
a domain's own, batch are heads. Compressed, it is `shared @ private` with shared [*batch, S, K] and private
[*batch, K, P]. An adapter says by `factor_rules` which of its weights are such matrices; `factor` puts modules in
their place that compute the same from the factors.

Shape suffixes: B batch, C channels, then any number of axes; S, P, K as above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.convolution import conv2d, conv3d


@dataclass(frozen=True)
class Axes:
    """Which axes of a weight form S and which are heads, increasing; what is left forms P."""

    shared: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def private(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis not in (*self.batch, *self.shared))

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """The batch's sizes, S and P."""
        private = self.private(len(shape))
        heads = tuple(shape[axis] for axis in self.batch)
        return heads, math.prod(shape[axis] for axis in self.shared), math.prod(shape[axis] for axis in private)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as [*batch, S, P]."""
        heads, rows, columns = self.sizes(weight.shape)
        order = (*self.batch, *self.shared, *self.private(weight.ndim))
        return weight.permute(order).reshape(*heads, rows, columns)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`."""
        order = (*self.batch, *self.shared, *self.private(len(shape)))
        spread = matrix.reshape([shape[axis] for axis in order])
        return spread.permute([order.index(axis) for axis in range(len(shape))])


@dataclass(frozen=True)
class FactorSpec:
    """How a site's weight is stored. rank: K; 0: the weight is zero. independent: each domain has both factors."""

    rank: int
    axes: Axes
    independent: bool = False

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> FactorSpec:
        axes = Axes(tuple(value["axes"]["shared"]), tuple(value["axes"]["batch"]))
        return FactorSpec(value["rank"], axes, value["independent"])


class SharedFactor(nn.Module):
    """The factor [*batch, S, K] that a site's domains share."""

    def __init__(self, shape: Sequence[int], spec: FactorSpec) -> None:
        super().__init__()
        heads, rows, _ = spec.axes.sizes(shape)
        self.weight = nn.Parameter(torch.randn(*heads, rows, spec.rank) * rows**-0.5)


class FactoredWeight(nn.Module):
    """A weight as the product of its factors; starts as what the dense one leaves on the shared factor."""

    def __init__(self, weight: Tensor, spec: FactorSpec, shared: SharedFactor | None) -> None:
        super().__init__()
        self.shape = weight.shape
        self.axes = spec.axes
        own = SharedFactor(weight.shape, spec).weight if shared is None else shared.weight
        if shared is None:
            self.basis = own
        # The site owns it: in a tuple it is neither a part of this domain's state nor counted again.
        self._shared = (shared,) if shared is not None else ()
        self.private = nn.Parameter(own.detach().to(weight).mT @ spec.axes.matrix(weight.detach()))

    def factors(self) -> tuple[Tensor, Tensor]:
        """shared [*batch, S, K] and private [*batch, K, P]."""
        return (self._shared[0].weight if self._shared else self.basis), self.private

    @property
    def independent(self) -> bool:
        """Whether both factors are this domain's own."""
        return not self._shared

    def forward(self) -> Tensor:
        """The weight, multiplied out."""
        shared, private = self.factors()
        return self.axes.weight(shared @ private, self.shape)


class FactoredLinear(nn.Module):
    """A linear layer as two: the private one before the shared one where the output is shared, else after it."""

    def __init__(self, layer: nn.Linear, weight: FactoredWeight) -> None:
        super().__init__()
        self.weight = weight
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        shared, private = self.weight.factors()
        if self.weight.axes.shared == (0,):
            return functional.linear(functional.linear(x, private), shared, self.bias)
        return functional.linear(functional.linear(x, shared.mT), private.mT, self.bias)


class FactoredConv(nn.Module):
    """A convolution as two, one with the taps and the stride and one of single taps, or with its weight multiplied
    out where the shared side is neither all of the output's channels nor all of the input's.

    Both orders are exact at zero-padded borders: the convolution that comes first has no bias.
    """

    def __init__(self, layer: nn.Conv2d | nn.Conv3d, weight: FactoredWeight) -> None:
        super().__init__()
        assert layer.groups == 1, "a convolution in groups has no dense matrix"
        assert layer.padding_mode == "zeros"
        self.weight = weight
        self.bias = layer.bias
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        shared, private = self.weight.factors()
        outputs, inputs, *taps = self.weight.shape
        rank, single = shared.shape[-1], [1] * len(taps)
        if rank and self.weight.axes.shared == (0,):
            x = self._taps(x, private.view(rank, inputs, *taps), None)
            return self._single(x, shared.view(outputs, rank, *single), self.bias)
        if rank and self.weight.axes.shared == (1,):
            x = self._single(x, shared.mT.reshape(rank, inputs, *single), None)
            return self._taps(x, private.view(rank, outputs, *taps).transpose(0, 1), self.bias)
        return self._taps(x, self.weight(), self.bias)

    def _taps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        form: Any = conv2d if weight.ndim == 4 else conv3d
        y: Tensor = form(x, weight, bias, self.stride, self.padding, self.dilation)
        return y

    def _single(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        form: Any = functional.conv2d if weight.ndim == 4 else functional.conv3d
        y: Tensor = form(x, weight, bias)
        return y


def value(weight: Tensor | nn.Module) -> Tensor:
    """A weight of an adapter, dense or factored, as a tensor."""
    return weight if isinstance(weight, Tensor) else weight()


def weight_of(adapter: nn.Module, name: str) -> Tensor | FactoredWeight:
    """The weight of a parameter's name in an adapter, as it is held. Raises AttributeError where there is none."""
    path, _, leaf = name.rpartition(".")
    held = getattr(adapter.get_submodule(path), leaf)
    if not isinstance(held, Tensor | FactoredWeight):
        raise AttributeError(name)
    return held


def has_weight(adapter: nn.Module, name: str) -> bool:
    """Whether an adapter has a parameter of that name; domains with other streams have others."""
    try:
        weight_of(adapter, name)
    except AttributeError:
        return False
    return True


def factor(adapter: nn.Module, name: str, spec: FactorSpec, shared: SharedFactor | None) -> None:
    """Replace an adapter's dense weight by its factors. shared: None makes both the adapter's own."""
    path, _, leaf = name.rpartition(".")
    layer = adapter.get_submodule(path)
    factored = FactoredWeight(getattr(layer, leaf), spec, shared)
    parent, _, last = path.rpartition(".")
    if leaf == "weight" and isinstance(layer, nn.Linear):
        setattr(adapter.get_submodule(parent), last, FactoredLinear(layer, factored))
    elif leaf == "weight" and isinstance(layer, nn.Conv2d | nn.Conv3d):
        setattr(adapter.get_submodule(parent), last, FactoredConv(layer, factored))
    else:
        delattr(layer, leaf)
        setattr(layer, leaf, factored)
