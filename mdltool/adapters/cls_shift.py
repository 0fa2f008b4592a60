"""Class-token shift (MST-Adapter, section 3.4; spec mst_adapter 2.4): neighbouring frames' class tokens exchange
channels. No parameters and no multiply-adds; with more than one frame it changes the output from the first step on.

Shape suffixes: B batch, T frames, C channels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mdltool.adapters.base import Inner, TokenAdapter, TokenOptions
from mdltool.errors import MdlError
from mdltool.types import Site
from mdltool.wrapping import TokenGrid


class ShiftOptions(TokenOptions):
    """fold_div: 1 / fold_div of the channels come from the next frame and as many from the one before. where: in
    the attention branch after its norm, on the residual stream, or there before both norms. border: what the first
    and last frame get.
    """

    fold_div: Annotated[int, Field(ge=2)] = 4
    where: Literal["branch", "stream", "stream_both"] = "branch"
    border: Literal["zero", "replicate", "circular"] = "zero"


class ClassTokenShift(TokenAdapter):
    """The shift S on the class tokens; patch tokens stay."""

    kinds = frozenset({"block"})
    Options = ShiftOptions
    unfoldable = "it moves channels between the class tokens of frames"

    def __init__(self, site: Site, options: ShiftOptions) -> None:
        super().__init__(site, options)
        if site.layout != "frame":
            raise MdlError(
                "the class-token shift needs a class token for each frame, which this backbone has not",
                f"adapters (cls_shift), site '{site.name}'",
                "use a CLIP or ViT backbone, or leave the shift out",
            )
        self._fold = site.channels // options.fold_div
        self._border = options.border

    @classmethod
    def roles(cls, options: Any) -> frozenset[str]:
        return frozenset(
            {"branch": {"attn_in"}, "stream": {"entry"}, "stream_both": {"entry", "mid"}}[options.where]
        )

    def forward(self, inner: Inner, x: Tensor, grid: TokenGrid) -> Tensor:
        x = inner(x)
        if grid.frames == 1:
            return x
        class_BTC = x[:, 0].unflatten(0, (-1, grid.frames))
        fold = self._fold
        shifted_BTC = torch.cat(
            [
                self._moved(class_BTC[..., :fold], -1),
                self._moved(class_BTC[..., fold : 2 * fold], 1),
                class_BTC[..., 2 * fold :],
            ],
            -1,
        )
        return torch.cat([shifted_BTC.flatten(0, 1)[:, None], x[:, 1:]], 1)

    def _moved(self, part_BTC: Tensor, by: int) -> Tensor:
        """Frame t gets what frame t - by has."""
        if self._border == "circular":
            return part_BTC.roll(by, 1)
        kept = part_BTC[:, 1:] if by < 0 else part_BTC[:, :-1]
        edge = part_BTC[:, -1:] if by < 0 else part_BTC[:, :1]
        if self._border == "zero":
            edge = torch.zeros_like(edge)
        return torch.cat([kept, edge] if by < 0 else [edge, kept], 1)
