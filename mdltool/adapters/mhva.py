"""Multi-head vision adapters (CM3T, section 3.2, eq. 6; spec cm3t 2.2) and AdaptFormer, their one-head baseline.

A bottleneck beside a block's MLP, whose weights differ from one spatial chunk of the tokens to the next. The output
at step 0 is the bare block's. Shape suffixes: B batch, T time slices, P positions of a slice, C channels, R
bottleneck, K heads, I and O a linear map's input and output.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mdltool.adapters.base import Inner, TokenAdapter, TokenOptions
from mdltool.adapters.factored import Axes, value
from mdltool.errors import MdlError
from mdltool.types import Site
from mdltool.wrapping import TokenGrid

Chunk = Annotated[str, Field(pattern=r"^(raster|windows|in_window|grid:[1-9]\d*x[1-9]\d*)$")]


class MhvaOptions(TokenOptions):
    """heads: spatial chunks with weights of their own. r: bottleneck. at: beside which part of the block.

    chunk: which positions a head gets: bands in raster order, sets of attention windows, positions inside a window,
    or rectangles (grid:2x4). follow_shift: the windows are shifted where the block's attention shifts them. cls:
    what the class token passes: head 0, a head of its own, or nothing. scale: a learned number per block or per
    head, or fixed; it starts at scale_init.
    """

    heads: Annotated[int, Field(ge=1)] = 7
    r: Annotated[int, Field(ge=1)] = 64
    at: Literal["mlp", "attn", "both"] = "mlp"
    chunk: Chunk = "raster"
    follow_shift: bool = False
    cls: Literal["head0", "own", "skip"] = "head0"
    scale: Literal["block", "head", "fixed"] = "block"
    scale_init: float = 4.0

    @model_validator(mode="after")
    def _fits(self) -> MhvaOptions:
        if self.follow_shift and self.chunk != "windows":
            raise ValueError("follow_shift is of chunk: windows")
        return self


class MhvaAdapter(TokenAdapter):
    """inner(u) + s MHVA(u); K(2CR + R + C) + 1 parameters.

    With a class-token readout the heads 1.. of the last block get no gradient: they act on patch tokens after the
    last attention.
    """

    kinds = frozenset({"mlp", "attention"})
    Options = MhvaOptions
    unfoldable = "a ReLU stands between its two projections"

    def __init__(self, site: Site, options: MhvaOptions) -> None:
        super().__init__(site, options)
        if site.role == "attn_pool":
            raise MdlError(
                "this attention changes the grid or the width, so that an adapter beside it has nothing to add to",
                f"adapters (mhva), site '{site.name}'",
                "leave the site out; sites: all does",
            )
        channels, r = site.channels, options.r
        self._chunk, self._cls, self._window = options.chunk, options.cls, site.window
        self._shift = site.shift if options.follow_shift else (0, 0, 0)
        self.bottleneck_width = r
        self._heads = options.heads
        if options.chunk == "windows":  # no more heads than windows of the configured clip (spec cm3t 3.3)
            self._heads = min(options.heads, math.prod(_windows(site.grid, site.window)[1]))
        own = options.cls == "own" and site.layout != "grid"
        heads = self._heads + own
        self.down = nn.Parameter(torch.empty(heads, channels, r))
        self.down_bias = nn.Parameter(torch.zeros(heads, r))
        self.up = nn.Parameter(torch.zeros(heads, r, channels))
        self.up_bias = nn.Parameter(torch.zeros(heads, channels))
        nn.init.uniform_(self.down, -(channels**-0.5), channels**-0.5)  # Kaiming uniform with a = sqrt(5), per head
        start = torch.full((heads,) if options.scale == "head" else (), options.scale_init)
        if options.scale == "fixed":
            self.register_buffer("scale", start, persistent=False)
        else:
            self.scale = nn.Parameter(start)

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset({"mlp", "attn"} if options.at == "both" else {options.at})

    def factor_rules(self) -> dict[str, Axes]:
        return {"down": Axes(shared=(1,), batch=(0,)), "up": Axes(shared=(2,), batch=(0,))}

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        return inner(x) + self.adapt(x, grid)

    @property
    def skips_class(self) -> bool:
        """Whether class tokens pass untouched."""
        return self._cls == "skip"

    def adapt(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """s MHVA(x), in the layout of x."""
        return self.expand(self.bottleneck(x, grid), grid)

    def bottleneck(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """b = ReLU(x W_down + c_down), in the layout of x; 0 for class tokens that are skipped."""
        return self._by_heads(x, value(self.down), self.down_bias, grid).relu()

    def expand(self, b: Tensor, grid: TokenGrid) -> Tensor:
        """s (b W_up + c_up), in the layout of b; 0 for class tokens that are skipped."""
        scale = self.scale.view(-1, *[1] * self.scale.ndim)  # [K, 1] or [1]
        return self._by_heads(b, value(self.up), self.up_bias, grid, scale)

    def _by_heads(
        self, x: Tensor, weight_KIO: Tensor, bias_KO: Tensor, grid: TokenGrid, scale: Tensor | None = None
    ) -> Tensor:
        """Every token through the linear map of its head, in the layout of x."""
        class_BTI, patches_BTHWI = grid.split(x)
        order, counts = _chunks(self._chunk, self._heads, grid, self._window, self._shift, x.device)
        x_BTPI = patches_BTHWI.flatten(2, 3)
        if self._chunk == "windows":
            x_BTPI = x_BTPI.flatten(1, 2).unsqueeze(1)
        if order is not None:
            x_BTPI = x_BTPI[:, :, order]
        y_BTPO = self._patches(x_BTPI, counts, weight_KIO, bias_KO, scale)
        if order is not None:
            y_BTPO = y_BTPO[:, :, order.argsort()]
        class_BTO = None
        if class_BTI is not None and self._cls == "skip":
            class_BTO = y_BTPO.new_zeros(*class_BTI.shape[:2], y_BTPO.shape[-1])
        elif class_BTI is not None:
            head = self._heads if self._cls == "own" else 0
            class_BTO = _linear(class_BTI, weight_KIO, bias_KO, scale, head)
        return grid.join(class_BTO, y_BTPO.reshape(*patches_BTHWI.shape[:-1], y_BTPO.shape[-1]))

    def _patches(
        self, x_BTPI: Tensor, counts: list[int], weight_KIO: Tensor, bias_KO: Tensor, scale: Tensor | None
    ) -> Tensor:
        """Every head on its slice. Equal slices are one batched product; weights are never gathered per token."""
        heads, each = self._heads, counts[0]
        if heads == 1:
            return _linear(x_BTPI, weight_KIO, bias_KO, scale, 0)
        if any(count != each for count in counts):
            parts = enumerate(x_BTPI.split(counts, 2))
            return torch.cat([_linear(part, weight_KIO, bias_KO, scale, k) for k, part in parts], 2)
        x_BTKPI = x_BTPI.unflatten(2, (heads, each))
        y = torch.einsum("btkpi,kio->btkpo", x_BTKPI, weight_KIO[:heads]) + bias_KO[:heads, None]
        y = y if scale is None else y * (scale[:heads, None] if len(scale) > 1 else scale)
        return y.flatten(2, 3)


def _linear(x: Tensor, weight_KIO: Tensor, bias_KO: Tensor, scale: Tensor | None, head: int) -> Tensor:
    """Tokens of one head. scale: one number, or each head's."""
    y = x @ weight_KIO[head] + bias_KO[head]
    return y if scale is None else y * scale[head if len(scale) > 1 else 0]


class AdaptFormerOptions(MhvaOptions):
    heads: Annotated[int, Field(ge=1)] = 1
    scale: Literal["block", "head", "fixed"] = "fixed"
    scale_init: float = 0.1


class AdaptFormerAdapter(MhvaAdapter):
    """AdaptFormer's scaled parallel bottleneck: one head, scale 0.1; 2CR + R + C parameters."""

    Options = AdaptFormerOptions


def _windows(size: tuple[int, int, int], window: tuple[int, int, int] | None) -> tuple[list[int], list[int]]:
    """(T, H, W) of a window, which is no larger than the map, and how many there are along each axis."""
    fitted = [min(n, w) for n, w in zip(size, window or (size[0], 7, 7), strict=True)]
    return fitted, [math.ceil(n / w) for n, w in zip(size, fitted, strict=True)]


def _chunks(
    chunk: str,
    heads: int,
    grid: TokenGrid,
    window: tuple[int, int, int] | None,
    shift: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor | None, list[int]]:
    """The order that brings each head's positions together (None: as they are), and how many each has.

    Positions are those of one time slice, but of all slices for `windows`, which divide time as well.
    """
    size = (grid.frames, grid.height, grid.width)
    if chunk == "raster":
        ends = [math.ceil(k * size[1] * size[2] / heads) for k in range(heads + 1)]
        return None, [end - begin for begin, end in itertools.pairwise(ends)]
    if chunk == "windows":
        fitted, parts = _windows(size, window)
        # As the attention rolls the padded map, but along an axis that is one window.
        rolled = [s if p > 1 else 0 for s, p in zip(shift, parts, strict=True)]
        lengths = zip(size, fitted, parts, rolled, strict=True)
        axes = [[(i - s) % (p * w) // w for i in range(n)] for n, w, p, s in lengths]
    elif chunk == "in_window":
        fitted, _ = _windows((1, *size[1:]), window)
        parts, axes = fitted, [[i % w for i in range(n)] for n, w in zip((1, *size[1:]), fitted, strict=True)]
    else:
        parts = [1, *(int(n) for n in chunk.removeprefix("grid:").split("x"))]
        axes = [[i * p // n for i in range(n)] for n, p in zip((1, *size[1:]), parts, strict=True)]
    total = parts[0] * parts[1] * parts[2]
    counts = [0] * heads  # without tensors, whose values a compiled graph could not split by
    for number, (t, i, j) in enumerate(itertools.product(*map(range, parts))):
        counts[number * heads // total] += axes[0].count(t) * axes[1].count(i) * axes[2].count(j)
    times, rows, columns = (torch.tensor(axis, device=device) for axis in axes)
    numbers = (times[:, None, None] * parts[1] + rows[:, None]) * parts[2] + columns
    return (numbers * heads // total).flatten().argsort(stable=True), counts
