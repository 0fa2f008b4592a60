"""`2d_tmix`: a frame-wise adapter, then a learned mixing of frames (spec omi_mdl 2.2, 3.3).

It is the reading of Omi et al., Table 5 (3D ResNet) that hits every printed total; the paper's text says (2+1)D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mdltool.adapters.stage_conv import Conv2dAdapter, StageConvOptions
from mdltool.errors import MdlError
from mdltool.types import Site


class FrameMixingAdapter(Conv2dAdapter):
    """act(BN(M g) + g) after the 2d adapter's g; M a T x T matrix with bias, the same for all channels and pixels.

    9C^2 + 5C + T^2 + T parameters. Needs the T it was made for.
    """

    def __init__(self, site: Site, options: StageConvOptions) -> None:
        super().__init__(site, options)
        self.mix = nn.Linear(site.grid[0], site.grid[0])
        self.mix_norm = nn.BatchNorm3d(site.channels)
        if options.init != "pytorch_default":
            nn.init.kaiming_normal_(self.mix.weight, nonlinearity="relu")
        if options.bias_init == "zero":
            nn.init.zeros_(self.mix.bias)
        if options.init == "zero_last":
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)
        if options.init == "identity":
            nn.init.zeros_(self.mix_norm.weight)

    def adapt(self, f_BCTHW: Tensor) -> Tensor:
        g_BCTHW = super().adapt(f_BCTHW)
        frames = self.mix.in_features
        if g_BCTHW.shape[2] != frames:
            raise MdlError(
                f"the frame-mixing adapter is bound to {frames} frames, not {g_BCTHW.shape[2]}",
                "adapters (2d_tmix)",
                f"use clips of {frames} frames, or another adapter type",
            )
        mixed_BCTHW = torch.einsum("ut,bcthw->bcuhw", self.mix.weight, g_BCTHW) + self.mix.bias.view(-1, 1, 1)
        return self.act(self.mix_norm(mixed_BCTHW) + g_BCTHW)
