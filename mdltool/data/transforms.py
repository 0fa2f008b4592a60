"""From decoded frames to crops: one draw per clip in training, fixed crops in testing (spec omi_mdl 5.1, 5.3).

Shape suffixes: T frames of a clip, U distinct frames, C channels, H height, W width, S crops. Frames stay uint8
until they are on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional


def resized(frames_UCHW: Tensor, short_side: int) -> Tensor:
    """Frames with the shorter side `short_side`, the longer floor(long * short_side / short).

    uint8 in and out, bilinear, no corner alignment, no antialias, as Omi et al.'s code resizes.
    """
    height, width = frames_UCHW.shape[-2:]
    size = scaled(height, width, short_side)
    if size == (height, width):
        return frames_UCHW
    return functional.interpolate(frames_UCHW, size=size, mode="bilinear", align_corners=False)


def scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side."""
    short = min(height, width)
    return height * short_side // short, width * short_side // short


@dataclass(frozen=True)
class TrainTransform:
    """Short-side jitter within [lo, hi], random crop, horizontal flip with probability `flip`."""

    short_side: tuple[int, int]
    crop: int
    flip: float

    def __call__(self, frames_TCHW: Tensor, rng: np.random.Generator) -> Tensor:
        """uint8 [T, C, H, W] -> uint8 [C, T, crop, crop]; the same draw for every frame."""
        side = int(rng.integers(self.short_side[0], self.short_side[1] + 1))
        frames_TCHW = resized(frames_TCHW, side)
        height, width = frames_TCHW.shape[-2:]
        y = int(rng.integers(0, height - self.crop + 1))
        x = int(rng.integers(0, width - self.crop + 1))
        clip_TCHW = frames_TCHW[..., y : y + self.crop, x : x + self.crop]
        if rng.random() < self.flip:
            clip_TCHW = clip_TCHW.flip(-1)
        return clip_TCHW.transpose(0, 1).contiguous()


def crop_corners(
    height: int, width: int, crop: int, count: int, axis: str = "horizontal", rounding: str = "floor"
) -> list[tuple[int, int]]:
    """(y, x) of each crop: the centre one for count 1, else left, centre and right.

    axis: `horizontal`, or `long_side`, which goes along the height of portrait frames. rounding: of odd remainders.
    """

    def half(room: int) -> int:
        return room // 2 if rounding == "floor" else (room + 1) // 2

    y_centre, x_centre = half(height - crop), half(width - crop)
    if count == 1:
        return [(y_centre, x_centre)]
    if axis == "long_side" and height > width:
        return [(y, x_centre) for y in (0, y_centre, height - crop)]
    return [(y_centre, x) for x in (0, x_centre, width - crop)]
