"""From decoded frames to crops: one draw per clip in training, fixed crops in testing (spec omi_mdl 5.1, 5.3).

Shape suffixes: C channels, T frames of a clip, U distinct frames, H height, W width. Frames stay uint8, 0..255,
until they are on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mdltool.errors import MdlError

AXES = ("horizontal", "long_side")
ROUNDINGS = ("floor", "ceil")


def scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short_side` and the longer floor(long * short_side / short)."""
    short = min(height, width)
    return height * short_side // short, width * short_side // short


def resized(frames_UCHW: Tensor, short_side: int) -> Tensor:
    """uint8 frames scaled to a shorter side: bilinear, no corner alignment, no antialias, as Omi et al. do it.

    Frames that are channels last in memory take half the time and stay so.
    """
    height, width = frames_UCHW.shape[-2:]
    size = scaled(height, width, short_side)
    if size == (height, width):
        return frames_UCHW
    return functional.interpolate(frames_UCHW, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class TrainTransform:
    """Short-side jitter, uniform over the integers lo..hi, random crop, horizontal flip with probability `flip`.

    Raises MdlError when the crop does not fit into the smallest side.
    """

    short_side: tuple[int, int]
    crop: int
    flip: float

    def __post_init__(self) -> None:
        low, high = self.short_side
        if not 0 < self.crop <= low <= high:
            raise MdlError(
                f"crops of {self.crop} pixels do not fit a shorter side of {low} to {high}",
                None,
                "crop <= lo <= hi",
            )

    def __call__(self, frames_TCHW: Tensor, rng: np.random.Generator, out_CTHW: Tensor | None = None) -> Tensor:
        """uint8 [T, C, H, W] -> uint8 [C, T, crop, crop], in `out_CTHW` if given; the same draw for every frame."""
        side = int(rng.integers(self.short_side[0], self.short_side[1] + 1))
        height, width = scaled(frames_TCHW.shape[2], frames_TCHW.shape[3], side)
        y = int(rng.integers(0, height - self.crop + 1))
        x = int(rng.integers(0, width - self.crop + 1))
        step = -1 if rng.random() < self.flip else 1
        if out_CTHW is None:
            out_CTHW = torch.empty(
                (frames_TCHW.shape[1], len(frames_TCHW), self.crop, self.crop), dtype=torch.uint8
            )
        clip_CTHW = out_CTHW.numpy()
        # One by one: a scaled frame is still in the processor's cache when it is cropped.
        for t in range(len(frames_TCHW)):
            frame_CHW = resized(frames_TCHW[t : t + 1], side)[0].numpy()
            clip_CTHW[:, t] = frame_CHW[:, y : y + self.crop, x : x + self.crop][..., ::step]
        return out_CTHW


def crop_corners(
    height: int, width: int, crop: int, count: int, axis: str = "horizontal", rounding: str = "floor"
) -> list[tuple[int, int]]:
    """(y, x) of each crop: the centre one for count 1, else left, centre and right.

    axis: `horizontal`, or `long_side`, which goes along the height of portrait frames. rounding: floor or ceil, of
    odd remainders. Raises MdlError for other values.
    """
    if count not in (1, 3) or axis not in AXES or rounding not in ROUNDINGS:
        raise MdlError(
            f"{count} crops along '{axis}' with '{rounding}' are unknown",
            None,
            f"1 or 3 crops; {' or '.join(AXES)}; {' or '.join(ROUNDINGS)}",
        )
    odd = 1 if rounding == "ceil" else 0
    y_centre, x_centre = (height - crop + odd) // 2, (width - crop + odd) // 2
    if count == 1:
        return [(y_centre, x_centre)]
    if axis == "long_side" and height > width:
        return [(y, x_centre) for y in (0, y_centre, height - crop)]
    return [(y_centre, x) for x in (0, x_centre, width - crop)]


def normalise(frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 0..255 -> (x / 255 - mean) / std in mean's dtype, on the frames' device; mean and std broadcast."""
    return (frames.to(mean.dtype) / 255 - mean) / std
