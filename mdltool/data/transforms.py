"""From decoded frames to crops: one draw per clip in training, fixed crops in testing (spec omi_mdl 5.1, 5.3).

Shape suffixes: C channels, T frames of a clip, U distinct frames, H height, W width. Frames stay uint8, 0..255,
until they are on the device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mdltool.data.augment import EraseSpec, RandAugmentSpec, Span, erase, rand_augment, random_window
from mdltool.errors import MdlError

AXES = ("horizontal", "long_side")
ROUNDINGS = ("floor", "ceil")
_SIDES = re.compile(r"(?<![a-z])(left|right)(?![a-z])")


def scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short_side` and the longer floor(long * short_side / short)."""
    short = min(height, width)
    return height * short_side // short, width * short_side // short


def resized(frames_UCHW: Tensor, short_side: int) -> Tensor:
    """uint8 frames scaled to a shorter side: bilinear, no corner alignment, no antialias, as Omi et al. do it.

    Frames that are channels last in memory take half the time and stay so.
    """
    return _scaled_to(frames_UCHW, scaled(frames_UCHW.shape[-2], frames_UCHW.shape[-1], short_side))


def _scaled_to(frames_UCHW: Tensor, size: tuple[int, int]) -> Tensor:
    if size == tuple(frames_UCHW.shape[-2:]):
        return frames_UCHW
    return functional.interpolate(frames_UCHW, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class TrainTransform:
    """A crop, a horizontal flip with probability `flip`, RandAugment, and a box erased; in this order.

    The crop is either a random window of frames whose shorter side is drawn uniformly from the integers lo..hi of
    `short_side`; or, with `area` (share of the picture) in its place, a random window of that area and `aspect`
    (width / height), scaled to crop x crop (spec multitrain 3). Both scale bilinearly without antialias.
    centre: the window of a shorter side is the centre one, with odd remainders rounded so (see crop_corners).

    Raises MdlError when both or neither of short_side and area are given, and when the crop does not fit into the
    smallest side.
    """

    short_side: tuple[int, int] | None
    crop: int
    flip: float
    area: Span | None = None
    aspect: Span = (3 / 4, 4 / 3)
    rand_augment: RandAugmentSpec | None = None
    erase: EraseSpec | None = None
    centre: str | None = None

    def __post_init__(self) -> None:
        if (self.short_side is None) == (self.area is None):
            raise MdlError("a crop needs either short_side or area", None, "leave one of them None")
        low, high = self.short_side or (self.crop, self.crop)
        if not 0 < self.crop <= low <= high:
            raise MdlError(
                f"crops of {self.crop} pixels do not fit a shorter side of {low} to {high}",
                None,
                "crop <= lo <= hi",
            )

    def __call__(self, frames_TCHW: Tensor, rng: np.random.Generator, out_CTHW: Tensor | None = None) -> Tensor:
        """uint8 [T, C, H, W] -> uint8 [C, T, crop, crop], in `out_CTHW` if given; the same draw for every frame."""
        return self.apply(frames_TCHW, rng, out_CTHW)[0]

    def apply(
        self, frames_TCHW: Tensor, rng: np.random.Generator, out_CTHW: Tensor | None = None, may_flip: bool = True
    ) -> tuple[Tensor, bool]:
        """As __call__, and whether the clip is flipped. may_flip: where not, the draws are the same."""
        cut = self._cut(frames_TCHW.shape[2], frames_TCHW.shape[3], rng)
        flipped = bool(rng.random() < self.flip) and may_flip
        step = -1 if flipped else 1
        if out_CTHW is None:
            out_CTHW = torch.empty(
                (frames_TCHW.shape[1], len(frames_TCHW), self.crop, self.crop), dtype=torch.uint8
            )
        clip_CTHW = out_CTHW.numpy()
        # One by one: a scaled frame is still in the processor's cache when it is cropped.
        for t in range(len(frames_TCHW)):
            clip_CTHW[:, t] = cut(frames_TCHW[t : t + 1])[..., ::step]
        if self.rand_augment is not None:
            rand_augment(out_CTHW, self.rand_augment, rng)
        if self.erase is not None:
            erase(out_CTHW, self.erase, rng)
        return out_CTHW, flipped

    def _cut(self, height: int, width: int, rng: np.random.Generator) -> Callable[[Tensor], np.ndarray]:
        """What takes the crop [C, crop, crop] out of a frame [1, C, height, width]; drawn once."""
        crop = self.crop
        if self.short_side is None:
            assert self.area is not None
            top, left, rows, columns = random_window(height, width, self.area, self.aspect, rng)

            def window(frame_1CHW: Tensor) -> np.ndarray:
                part_1CHW = frame_1CHW[..., top : top + rows, left : left + columns]
                return _scaled_to(part_1CHW, (crop, crop))[0].numpy()

            return window
        side = int(rng.integers(self.short_side[0], self.short_side[1] + 1))
        height, width = scaled(height, width, side)
        if self.centre is not None:
            ((y, x),) = crop_corners(height, width, crop, 1, rounding=self.centre)
        else:
            y = int(rng.integers(0, height - crop + 1))
            x = int(rng.integers(0, width - crop + 1))
        return lambda frame_1CHW: resized(frame_1CHW, side)[0].numpy()[:, y : y + crop, x : x + crop]


def flipped_classes(names: Sequence[str]) -> dict[int, int]:
    """Class -> the class of its mirror image, whose name has left and right exchanged (spec mst_adapter 3.3).

    A class named without them is its own; one whose counterpart is no class is left out.
    """
    plain = [name.casefold() for name in names]
    numbers = {name: number for number, name in enumerate(plain)}
    images = [_SIDES.sub(lambda side: "right" if side[0] == "left" else "left", name) for name in plain]
    return {number: numbers[image] for number, image in enumerate(images) if image in numbers}


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
