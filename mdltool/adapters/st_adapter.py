"""ST-Adapter, the baseline of MST-Adapter and CM3T (spec mst_adapter 2.6).

A bottleneck with a depthwise temporal convolution on the residual stream. The output at step 0 is the bare block's.
Shape suffixes: B batch, T time slices, H height, W width, C channels, R bottleneck.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mdltool.adapters.base import Inner, TokenAdapter, TokenOptions
from mdltool.adapters.factored import Axes
from mdltool.types import Site
from mdltool.wrapping import TokenGrid


class StOptions(TokenOptions):
    """per_block: 1 before the norm of the MLP, 2 before both norms."""

    r: Annotated[int, Field(ge=1)] = 384
    per_block: Literal[1, 2] = 1


class StAdapter(TokenAdapter):
    """p + up(DW(down(p))), a 3x1x1 depthwise convolution; class tokens pass untouched. 2CR + C + 5R parameters."""

    kinds = frozenset({"block"})
    Options = StOptions
    unfoldable = "it convolves the tokens, which no weight of a block does"

    def __init__(self, site: Site, options: StOptions) -> None:
        super().__init__(site, options)
        self.down = nn.Linear(site.channels, options.r)
        self.conv = nn.Conv3d(options.r, options.r, (3, 1, 1), padding=(1, 0, 0), groups=options.r)
        self.up = nn.Linear(options.r, site.channels)
        for zero in (self.down.bias, self.up.bias, self.conv.weight, self.conv.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset({"mid"} if options.per_block == 1 else {"entry", "mid"})

    def factor_rules(self) -> dict[str, Axes]:
        return {"down.weight": Axes(shared=(1,)), "up.weight": Axes(shared=(0,))}

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        class_BTC, patches_BTHWC = grid.split(inner(x))
        hidden = self.conv(self.down(patches_BTHWC).movedim(-1, 1)).movedim(1, -1)
        return grid.join(class_BTC, patches_BTHWC + self.up(hidden))
