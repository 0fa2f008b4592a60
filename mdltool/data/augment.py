"""RandAugment, random erasing and random resized crops of whole clips (spec multitrain 3, 5.3).

Every draw comes from the generator that the caller gives, and holds for all frames of a clip.
Shape suffixes: C channels, T frames, H height, W width. Frames are uint8, 0..255.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdltool.errors import MdlError

ERASE_MODES = ("pixel", "mean", "constant")
Span = tuple[float, float]
Box = tuple[int, int, int, int]

_TRIES = 10
# Of erased pixels, so that the normalised ones have mean 0 and deviation 1 (spec multitrain 5.3).
_MEAN, _STD = 0.45 * 255, 0.225 * 255


@dataclass(frozen=True)
class RandAugmentSpec:
    """num_ops operations in turn, each done with `probability` at a magnitude 0..10 of mean and deviation given."""

    num_ops: int = 4
    magnitude: float = 7.0
    magnitude_std: float = 0.5
    probability: float = 0.5


@dataclass(frozen=True)
class EraseSpec:
    """One box in a clip in `probability` of them. area: share of the picture; aspect: width / height, log-uniform.

    mode: `pixel` is Gaussian noise, the same in every frame; `mean` the mean grey 115; `constant` black.
    """

    probability: float = 0.25
    mode: str = "pixel"
    area: Span = (0.02, 1 / 3)
    aspect: Span = (0.3, 3.3)

    def __post_init__(self) -> None:
        if self.mode not in ERASE_MODES:
            raise MdlError(f"erase mode '{self.mode}' is unknown", None, f"one of: {', '.join(ERASE_MODES)}")


def random_window(height: int, width: int, area: Span, aspect: Span, rng: np.random.Generator) -> Box:
    """(top, left, rows, columns) of a random resized crop (Szegedy et al. 2015, section 6).

    area: share of the picture, uniform. aspect: width / height, log-uniform. When none of ten draws fits: the
    largest centred window whose aspect is in the range.
    """
    window = _drawn_box(height, width, area, aspect, rng)
    if window is not None:
        return window
    rows = min(height, max(1, round(width / aspect[0])))
    columns = min(width, max(1, round(height * aspect[1])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def drawn_operations(spec: RandAugmentSpec, rng: np.random.Generator) -> list[tuple[str, float]]:
    """(name in operations(), strength -1..1) of what is done to one clip: magnitude / 10 with a random sign.

    Operations that know one direction only take the strength's absolute value.
    """
    names, drawn = list(operations()), []
    for _ in range(spec.num_ops):
        name = names[int(rng.integers(len(names)))]
        done = rng.random() < spec.probability
        strength = float(np.clip(rng.normal(spec.magnitude, spec.magnitude_std), 0, 10)) / 10
        sign = -1 if rng.random() < 0.5 else 1
        if done:
            drawn.append((name, sign * strength))
    return drawn


def rand_augment(clip_CTHW: Tensor, spec: RandAugmentSpec, rng: np.random.Generator) -> None:
    """RandAugment (Cubuk et al. 2020) as video training uses it (spec multitrain 5.3), in place.

    Of torchvision it takes the functional transforms, which do the arithmetic on pixels. Its RandAugment class
    is not used: it draws from torch's global generator, and has no deviation of the magnitude, no probability by
    operation, and neither invert nor solarize_add. Geometry is bilinear, where the specification says bicubic:
    torchvision warps tensors no other way. auto_contrast, equalize and contrast look at each frame's own pixels.
    """
    drawn = drawn_operations(spec, rng)
    # One by one: a frame stays in the processor's cache, which takes about a third off the time.
    for t in range(clip_CTHW.shape[1] if drawn else 0):
        frame_CHW = clip_CTHW[:, t]
        for name, strength in drawn:
            frame_CHW = operations()[name](frame_CHW, strength)
        clip_CTHW[:, t] = frame_CHW


def erase(clip_CTHW: Tensor, spec: EraseSpec, rng: np.random.Generator) -> None:
    """Random erasing (Zhong et al. 2020), in place: the same box, and the same noise, in every frame."""
    if rng.random() >= spec.probability:
        return
    height, width = clip_CTHW.shape[-2:]
    # A box is lower and narrower than the picture.
    box = _drawn_box(height, width, spec.area, spec.aspect, rng, margin=1)
    if box is not None:
        top, left, rows, columns = box
        part_CTHW = clip_CTHW[:, :, top : top + rows, left : left + columns]
        part_CTHW.copy_(_erased(len(clip_CTHW), rows, columns, spec.mode, rng))


def _drawn_box(
    height: int, width: int, area: Span, aspect: Span, rng: np.random.Generator, margin: int = 0
) -> Box | None:
    """The first of ten draws that leaves `margin` pixels in each direction, at a uniform place; or None."""
    for _ in range(_TRIES):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        rows, columns = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < rows <= height - margin and 0 < columns <= width - margin:
            top = int(rng.integers(0, height - rows + 1))
            return top, int(rng.integers(0, width - columns + 1)), rows, columns
    return None


def _erased(channels: int, rows: int, columns: int, mode: str, rng: np.random.Generator) -> Tensor:
    """uint8 [C, 1, rows, columns] that takes a box's place."""
    shape = (channels, 1, rows, columns)
    if mode == "pixel":
        noise = _MEAN + _STD * rng.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(noise.round().clip(0, 255).astype(np.uint8))
    return torch.full(shape, round(_MEAN) if mode == "mean" else 0, dtype=torch.uint8)


@functools.cache
def operations() -> dict[str, Callable[[Tensor, float], Tensor]]:
    """name -> (uint8 frame [C, H, W], strength -1..1) -> frame: the 15 operations with the "increasing" ranges.

    Strength 1 is 30 degrees, a shear of 0.3, a shift of 0.45 of the side, 1 bit left of 4 (0 would be black), every
    level solarized, 110 added, and a factor of 0.1 or 1.9. What comes in from outside is grey 128.
    """
    # Importing torchvision takes longer than most commands; only a recipe with RandAugment needs it.
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as ops

    def warp(x: Tensor, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
        pixels = [round(shift[0] * x.shape[-1]), round(shift[1] * x.shape[-2])]
        degrees = [math.degrees(math.atan(slope)) for slope in shear]
        # Shears keep the top left corner in its place; shifts have no centre.
        return ops.affine(x, 0.0, pixels, 1.0, degrees, InterpolationMode.BILINEAR, fill=128.0, center=[0.0, 0.0])

    def solarize(x: Tensor, levels: int) -> Tensor:
        return ops.solarize(x, 256 - levels) if levels else x

    return {
        "auto_contrast": lambda x, s: ops.autocontrast(x),
        "equalize": lambda x, s: ops.equalize(x),
        "invert": lambda x, s: ops.invert(x),
        "rotate": lambda x, s: ops.rotate(x, 30 * s, InterpolationMode.BILINEAR, fill=128.0),
        "posterize": lambda x, s: ops.posterize(x, max(1, 4 - int(4 * abs(s)))),
        "solarize": lambda x, s: solarize(x, int(256 * abs(s))),
        # Pixels below 128 plus 110 at most do not overflow.
        "solarize_add": lambda x, s: torch.where(x < 128, x + int(110 * abs(s)), x),
        "colour": lambda x, s: ops.adjust_saturation(x, 1 + 0.9 * s),
        "contrast": lambda x, s: ops.adjust_contrast(x, 1 + 0.9 * s),
        "brightness": lambda x, s: ops.adjust_brightness(x, 1 + 0.9 * s),
        "sharpness": lambda x, s: ops.adjust_sharpness(x, 1 + 0.9 * s),
        "shear_x": lambda x, s: warp(x, shear=(0.3 * s, 0)),
        "shear_y": lambda x, s: warp(x, shear=(0, 0.3 * s)),
        "translate_x": lambda x, s: warp(x, shift=(0.45 * s, 0)),
        "translate_y": lambda x, s: warp(x, shift=(0, 0.45 * s)),
    }
