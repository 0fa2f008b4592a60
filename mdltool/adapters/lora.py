"""LoRA on the attention's projections, a baseline: W x + (alpha / r) B A x, with B = 0 at step 0."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mdltool.adapters.base import Adapter, Inner, NotFoldable, TokenAdapter, TokenOptions
from mdltool.adapters.factored import Axes, value
from mdltool.types import Place, Site

_PARTS = ("q", "k", "v")


class LoraOptions(TokenOptions):
    """targets: which projections; of a fused qkv layer, which thirds of it."""

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 8.0
    targets: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] = ("q", "v")


class LoraAdapter(Adapter):
    """r (C_in + C_out) parameters for each target."""

    kinds = frozenset({"linear"})
    Options = LoraOptions

    def __init__(self, site: Site, options: LoraOptions) -> None:
        super().__init__(site, options)
        assert site.shape is not None
        self._parts = site.shape.parts
        self._targets = [_PARTS.index(t) for t in dict.fromkeys(options.targets)] if self._parts == 3 else [0]
        width = site.shape.out_channels // self._parts
        self._scale = options.alpha / options.r
        self.down = nn.Parameter(torch.empty(len(self._targets), options.r, site.channels))
        self.up = nn.Parameter(torch.zeros(len(self._targets), width, options.r))
        nn.init.uniform_(self.down, -(site.channels**-0.5), site.channels**-0.5)

    @classmethod
    def takes(cls, place: Place, options: Any) -> bool:
        inside = TokenAdapter.in_layers(place, options)
        return inside and place.kind == "linear" and (place.role == "qkv" or place.role in options.targets)

    def added(self, layer: nn.Module) -> Tensor:
        if not isinstance(layer, nn.Linear):
            raise NotFoldable("its layer is not linear")
        parts = list(torch.zeros_like(layer.weight).chunk(self._parts))
        for target, down, up in zip(self._targets, value(self.down), value(self.up), strict=True):
            parts[target] = self._scale * up @ down
        return torch.cat(parts)

    def factor_rules(self) -> dict[str, Axes]:
        return {"down": Axes(shared=(2,), batch=(0,)), "up": Axes(shared=(1,), batch=(0,))}

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        pairs = zip(value(self.down), value(self.up), strict=True)
        added = [self._scale * (x @ down.T) @ up.T for down, up in pairs]
        if self._parts == 1:
            return y + added[0]
        thirds = list(y.chunk(self._parts, -1))
        for target, delta in zip(self._targets, added, strict=True):
            thirds[target] = thirds[target] + delta
        return torch.cat(thirds, -1)
