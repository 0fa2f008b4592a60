"""torchvision's multiscale blocks with their places open, and their form without a class token.

A pyramid whose grid changes inside a block: where the queries are pooled with a stride, `attn_in` has the old grid
and width, `attn_out` and `mid` the new ones. With a class token for each clip the tokens are [B, 1 + N, C]; without
one they are [B, T, H, W, C], so that every tensor says its own grid. Shape suffixes: B batch, T time slices, H
height, W width; in attention B batch, H heads, N tokens, M keys, D channels of a head, L prefix tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.mvit import MultiscaleBlock

from mdltool.backbones.transformer import Names, OpenAttention, OpenBlock, Prefix, attend, fused_prefix
from mdltool.wrapping import Route, TokenGrid

Grid = tuple[int, int, int]


def pooled(pool: Any, x: Tensor, grid: TokenGrid) -> tuple[Tensor, TokenGrid]:
    """torchvision's Pool (None: nothing) on tokens that lie as `grid` says, and the grid after it.

    A class token passes the pooling by, not the norm after it.
    """
    if pool is None:
        return x, grid
    class_BTC, patches_BTHWC = grid.split(x)
    patches_BTHWC = pool.pool(patches_BTHWC.movedim(-1, 1)).movedim(1, -1)
    grid = TokenGrid.of(patches_BTHWC.shape[1:4], grid.layout)
    x = grid.join(class_BTC, patches_BTHWC)
    return (x if pool.norm_act is None else pool.norm_act(x)), grid


def multiscale_attention(
    layer: Any,
    x: Tensor,
    grid: TokenGrid,
    prefix: Tensor | None = None,
    gate: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """torchvision's MultiscaleAttention, class token or not: (softmax(q k^T / sqrt(D) + bias) v + q) through the
    output projection (spec multitrain 2.1).

    x: tokens that lie as `grid` says. Returns tokens of the pooled queries' grid and the layer's output width.
    """
    parts = (part.unflatten(-1, (layer.num_heads, -1)).movedim(-2, 1) for part in layer.qkv(x).chunk(3, -1))
    q, k, v = (part.flatten(0, 1) for part in parts)  # the heads share a pooling: they are folded into the batch
    q, q_grid = pooled(layer.pool_q, q, grid)
    k, k_grid = pooled(layer.pool_k, k, grid)
    v, _ = pooled(layer.pool_v, v, grid)
    q, k, v = (part.flatten(1, -2).unflatten(0, (-1, layer.num_heads)) for part in (q, k, v))
    bias = None if layer.rel_pos_h is None else relative_bias(layer, q, q_grid, k_grid)
    y_BHND = attend(q, k, v, bias, _prefix(layer, prefix, gate, mass))
    if layer.residual_pool:
        if q_grid.layout == "clip" and not layer.residual_with_cls_embed:
            q = functional.pad(q[:, :, 1:], (0, 0, 1, 0))
        y_BHND = y_BHND + q
    y: Tensor = layer.project(y_BHND.transpose(1, 2).flatten(2))
    return y if q_grid.layout == "clip" else y.unflatten(1, grid_size(q_grid))


def relative_bias(layer: Any, q_BHND: Tensor, q_grid: TokenGrid, k_grid: TokenGrid) -> Tensor:
    """What decomposed relative positions add to the logits, [B, H, N, M]: q times the row of the distance, summed
    over the three axes; nothing where a class token takes part (MViTv2, section 4.1).
    """
    first = 1 if q_grid.layout == "clip" else 0
    q_BHTHWD = q_BHND[:, :, first:].unflatten(2, grid_size(q_grid))
    height = _distances(layer.rel_pos_h, q_grid.height, k_grid.height)
    width = _distances(layer.rel_pos_w, q_grid.width, k_grid.width)
    time = _distances(layer.rel_pos_t, q_grid.frames, k_grid.frames)
    # b batch, n heads, t h w the query's place, k the key's on one axis
    down = torch.einsum("bnthwd,hkd->bnthwk", q_BHTHWD, height)[..., None, :, None]
    across = torch.einsum("bnthwd,wkd->bnthwk", q_BHTHWD, width)[..., None, None, :]
    later = torch.einsum("bnthwd,tkd->bnthwk", q_BHTHWD, time)[..., :, None, None]
    bias_BHNM = (down + across + later).flatten(5).flatten(2, 4)
    return functional.pad(bias_BHNM, (first, 0, first, 0))


def _distances(table_RD: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of an axis' table for every pair, [queries, keys, D]; the shorter side is stretched to the longer.

    A table made for another length is interpolated, as the library does.
    """
    span = 2 * max(queries, keys) - 1
    if len(table_RD) != span:
        table_RD = functional.interpolate(table_RD.T[None], size=span, mode="linear")[0].T
    at_query = torch.arange(queries, device=table_RD.device)[:, None] * max(keys / queries, 1.0)
    before_end = torch.arange(1.0 - keys, 1.0, device=table_RD.device)[None] * max(queries / keys, 1.0)
    return table_RD[(at_query - before_end).long()]


def _prefix(layer: Any, prefix: Tensor | None, gate: Tensor | None, mass: Tensor | None) -> Prefix | None:
    """As `fused_prefix`, pooled.

    A prefix token has no place in the grid, so it takes the class token's way: past the pooling convolution,
    through the norm after it, which brings it to the scale of the pooled keys and values.
    """
    own = fused_prefix(layer, prefix, gate, mass)
    if own is None or layer.pool_k is None:
        return own
    keys, values = layer.pool_k.norm_act(own.keys_HLD), layer.pool_v.norm_act(own.values_HLD)
    return replace(own, keys_HLD=keys, values_HLD=values)


def shortcut(block: Any, x: Tensor, grid: TokenGrid) -> tuple[Tensor, TokenGrid]:
    """A block's skip path: a projection where the width changes, then max-pooling where the queries are pooled.

    torchvision's projection takes the normalised tokens, MultiTrain's the tokens themselves.
    """
    if block.project is not None:
        x = block.project(x if isinstance(block, ClassFreeBlock) else block.norm1(x))
    return pooled(block.pool_skip, x, grid)


def grid_size(grid: TokenGrid) -> Grid:
    """(T, H, W)."""
    return grid.frames, grid.height, grid.width


class ClassFreeBlock(MultiscaleBlock):
    """torchvision's block on [B, T, H, W, C] without a class token (spec multitrain 2.1)."""

    def forward(self, x_BTHWC: Tensor, thw: Sequence[int]) -> tuple[Tensor, Grid]:
        grid = TokenGrid.of(thw, "grid")
        skip, after = shortcut(self, x_BTHWC, grid)
        x = skip + self.stochastic_depth(multiscale_attention(self.attn, self.norm1(x_BTHWC), grid))
        return x + self.stochastic_depth(self.mlp(self.norm2(x))), grid_size(after)


class PooledAttention(OpenAttention):
    """torchvision's MultiscaleAttention, restated so that prefixes reach it; its grid is the route's."""

    def __init__(self, inner: nn.Module, route: Route) -> None:
        super().__init__(inner)
        self._route = route

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None = None,
        gate: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> Tensor:
        assert self._route.tokens is not None, "the block sets the grid before its attention runs"
        return multiscale_attention(self.inner, x, self._route.tokens, prefix, gate, mass)


class OpenMultiscaleBlock(OpenBlock):
    """OpenBlock on a pyramid: takes and returns the grid as the library's block does, and keeps the route's true.

    What adapts the attention's branch (norm1_in, attn_in) does not reach the skip path.
    """

    def __init__(self, block: nn.Module, names: Names, route: Route) -> None:
        super().__init__(block, names, partial(PooledAttention, route=route), "stochastic_depth")
        self._route = route
        self._layout = "grid" if isinstance(block, ClassFreeBlock) else "clip"

    def forward(self, x: Tensor, thw: Sequence[int]) -> tuple[Tensor, Grid]:  # type: ignore[override]
        block: Any = self.inner
        taps, route = self.taps, self._route
        before = route.tokens = TokenGrid.of(thw, self._layout)
        x = taps["entry"](x)
        skip, after = shortcut(block, x, before)
        y = block.attn(taps["attn_in"](block.norm1(taps["norm1_in"](x))))
        route.tokens = after
        x = taps["mid"](skip + taps["attn_out"](y))
        y = taps["mlp_out"](block.mlp(taps["mlp_in"](block.norm2(taps["norm2_in"](x)))))
        return taps["exit"](x + y), grid_size(after)
