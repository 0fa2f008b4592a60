"""The LayerNorm that domains share after an adapter (Omi et al., section 3.2; spec omi_mdl 2.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mdltool.errors import MdlError
from mdltool.types import Site

LnForm = Literal["channel", "cthw", "cthw_noaffine", "none"]


class ChannelLayerNorm(nn.LayerNorm):
    """Normalises over C at each (t, h, w) of [B, C, T, H, W]; affine of 2C; any clip size."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        # With channels-last memory both moves are views.
        return super().forward(x_BCTHW.movedim(1, -1)).movedim(-1, 1)


class ClipLayerNorm(nn.LayerNorm):
    """Normalises over C, T, H, W together; bound to one clip size, of which it says so."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if tuple(x_BCTHW.shape[1:]) != tuple(self.normalized_shape):
            raise MdlError(
                f"the shared LayerNorm is bound to clips of {list(self.normalized_shape)} (C, T, H, W), "
                f"not {list(x_BCTHW.shape[1:])}",
                "adapters.ln",
                "use ln: channel, or the clip size of the recipe",
            )
        return super().forward(x_BCTHW)


class AnyClipLayerNorm(nn.Module):
    """As ClipLayerNorm without weights: any clip size."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x_BCTHW, x_BCTHW.shape[1:])


def shared_norm(form: LnForm, site: Site) -> nn.Module | None:
    """The norm of a form for a site; None for `none`."""
    if form == "channel":
        return ChannelLayerNorm(site.channels)
    if form == "cthw":
        return ClipLayerNorm((site.channels, *site.grid))
    return AnyClipLayerNorm() if form == "cthw_noaffine" else None
