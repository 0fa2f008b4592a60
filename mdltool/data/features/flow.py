"""Optical flow to tokens: stacks of consecutive pairs, evenly over the clip, pooled to a grid (spec cm3t 5.3).

Axes: P pairs, S stacks, K pairs of a stack, H W pixels, G cells of a side, M = S tokens of width D = 2 K G G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from mdltool.data.features import Tokens
from mdltool.data.modalities import Flow
from mdltool.errors import MdlError


@dataclass(frozen=True)
class FlowGrid:
    """A stack is a token: the mean motion in each cell, u and v of each of its pairs, -1 to 1 for -/+ the bound.

    pairs: of a stack, as the flow was taken. grid: cells of a side.
    """

    pairs: int = 5
    grid: int = 7
    kind: ClassVar[str] = "flow"
    version: ClassVar[str] = "1"

    @property
    def width(self) -> int:
        return 2 * self.pairs * self.grid**2

    def check(self, where: str) -> None:
        """Raises MdlError for no cells."""
        if min(self.pairs, self.grid) < 1:
            raise MdlError("pairs and grid must be above 0", where, None)

    def __call__(self, flow: Flow) -> Tokens:
        """One token a stack, whatever the length of the clip."""
        pixels = torch.from_numpy(flow.pixels_P2HW).double()
        cells_P2GG = torch.nn.functional.adaptive_avg_pool2d(pixels, self.grid)
        motion_P2GG = ((cells_P2GG - 128) / 127).clamp(-1, 1).numpy()
        tokens_MD = motion_P2GG[flow.rows_SK].reshape(len(flow.rows_SK), -1).astype(np.float32)
        times = flow.times_P2[flow.rows_SK]
        return Tokens(tokens_MD, np.stack([times[:, 0, 0], times[:, -1, 1]], 1))
