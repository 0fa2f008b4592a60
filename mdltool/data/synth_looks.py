"""The looks of the generated domains: picture size, frame rate, palette, background, texture, camera."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How one domain looks, and which classes it has.

    width, height: pixels, even. fps: frames per second. appearance: classes told by the figure; motions: pairs
    told by direction (keys of synth_figures.MOVERS). background: a key of BACKGROUNDS, painted from `ground` (two
    colours). paints: colours of figures. jitter: largest camera offset, pixels. grain: amplitude of the noise of
    every frame, grey levels. glow: width of the halo round a figure, pixels. chalky: share of the figure that a
    rough texture rubs out, 0..1. outline: colour of its edge.
    """

    width: int
    height: int
    fps: int
    appearance: tuple[str, ...]
    motions: tuple[str, ...]
    background: str
    ground: tuple[Colour, Colour]
    paints: tuple[Colour, ...]
    jitter: float = 0.0
    grain: int = 0
    glow: float = 0.0
    chalky: float = 0.0
    outline: Colour | None = None


LOOKS: dict[str, Look] = {
    "chalk": Look(
        width=128,
        height=96,
        fps=12,
        appearance=("disc", "triangle", "cross", "bars"),
        motions=("move", "spin"),
        background="smudges",
        ground=((34, 62, 52), (62, 92, 80)),
        paints=((240, 240, 232), (250, 226, 140), (246, 176, 186), (166, 214, 242)),
        jitter=0.6,
        grain=3,
        chalky=0.35,
    ),
    "neon": Look(
        width=144,
        height=112,
        fps=25,
        appearance=("ring", "star", "triangle", "square"),
        motions=("rise", "open"),
        background="gradient",
        ground=((10, 6, 30), (46, 12, 66)),
        paints=((255, 60, 180), (60, 240, 255), (170, 255, 70), (255, 190, 60)),
        glow=7.0,
    ),
    "field": Look(
        width=96,
        height=128,
        fps=30,
        appearance=("ring", "cross", "square", "heart"),
        motions=("move", "open"),
        background="grass",
        ground=((58, 112, 40), (112, 158, 70)),
        paints=((250, 250, 250), (222, 40, 40), (36, 60, 190), (250, 214, 30)),
        jitter=2.5,
        grain=5,
        outline=(24, 30, 20),
    ),
    "paper": Look(
        width=128,
        height=96,
        fps=15,
        appearance=("disc", "star", "hourglass", "bars"),
        motions=("rise", "spin"),
        background="ruled",
        ground=((244, 240, 226), (196, 208, 226)),
        paints=((30, 40, 110), (150, 24, 40), (20, 100, 70), (40, 40, 40)),
        jitter=0.4,
        grain=2,
        chalky=0.1,
    ),
    "dusk": Look(
        width=112,
        height=112,
        fps=24,
        appearance=("triangle", "heart", "ring", "hourglass"),
        motions=("grow", "move"),
        background="gradient",
        ground=((250, 168, 90), (120, 70, 130)),
        paints=((24, 16, 36), (44, 20, 30), (16, 26, 44)),
        jitter=1.5,
        grain=6,
    ),
    "mosaic": Look(
        width=160,
        height=120,
        fps=20,
        appearance=("square", "star", "disc", "cross"),
        motions=("spin", "grow"),
        background="checker",
        ground=((206, 190, 170), (168, 186, 190)),
        paints=((190, 30, 60), (20, 90, 150), (10, 110, 80), (110, 40, 130)),
        outline=(250, 250, 246),
    ),
}


def paint_background(look: Look, rng: np.random.Generator, margin: int) -> Array:
    """The still scene behind the figure: float32 [height + 2 margin, width + 2 margin, 3], values 0..255."""
    height, width = look.height + 2 * margin, look.width + 2 * margin
    mix = BACKGROUNDS[look.background](rng, height, width)[..., None]
    near, far = (np.array(colour, np.float32) for colour in look.ground)
    return (near + mix * (far - near)).astype(np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: int) -> Array:
    """Noise of one scale, bilinear between random values every `cell` pixels: float32 [height, width] in 0..1."""
    knots = rng.random((height // cell + 2, width // cell + 2), np.float32)
    return _stretch(_stretch(knots, height, cell).T, width, cell).T


def _stretch(knots: Array, length: int, cell: int) -> Array:
    # not a matrix product: its threads cost more than they save, and its last bits depend on their number
    before, part = np.divmod(np.arange(length), cell)
    weight = (part / cell).astype(np.float32)[:, None]
    return knots[before] * (1 - weight) + knots[before + 1] * weight


def _smudges(rng: np.random.Generator, height: int, width: int) -> Array:
    return 0.7 * smooth_noise(rng, height, width, 24) + 0.3 * smooth_noise(rng, height, width, 6)


def _grass(rng: np.random.Generator, height: int, width: int) -> Array:
    return 0.5 * smooth_noise(rng, height, width, 12) + 0.5 * smooth_noise(rng, height, width, 3)


def _gradient(rng: np.random.Generator, height: int, width: int) -> Array:
    slope = rng.uniform(-0.3, 0.3)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    along = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    return np.clip(down + np.float32(slope) * along, 0, 1)


def _ruled(rng: np.random.Generator, height: int, width: int) -> Array:
    pitch = int(rng.integers(12, 17))
    first = int(rng.integers(pitch))
    rows = (np.arange(height) + first) % pitch < 2
    columns = (np.arange(width) + first) % pitch < 2
    return (rows[:, None] | columns[None, :]).astype(np.float32)


def _checker(rng: np.random.Generator, height: int, width: int) -> Array:
    cell = int(rng.integers(14, 21))
    first = int(rng.integers(cell))
    rows = (np.arange(height) + first) // cell
    columns = (np.arange(width) + first) // cell
    return ((rows[:, None] + columns[None, :]) % 2).astype(np.float32)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "smudges": _smudges,
    "grass": _grass,
    "gradient": _gradient,
    "ruled": _ruled,
    "checker": _checker,
}
