"""The figures of the generated videos, as signed distances.

Every figure maps float32 arrays x, y (right and down, in units of the figure's radius) and its opening
(0 closed .. 1 open, used by the figures that open) to the distance to its edge in the same unit, negative inside.
Distances are exact near the edge, which is all that anti-aliasing needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Figure = Callable[[Array, Array, float], Array]


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _disc(x: Array, y: Array, _: float) -> Array:
    return np.hypot(x, y) - 0.92


def _square(x: Array, y: Array, _: float) -> Array:
    return _box(x, y, 0.8, 0.8)


def _triangle(x: Array, y: Array, _: float) -> Array:
    return np.maximum(y - 0.2, 0.866 * np.abs(x) - 0.5 * (y - 0.2)) - 0.54


def _ring(x: Array, y: Array, _: float) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.2


def _cross(x: Array, y: Array, _: float) -> Array:
    return np.minimum(_box(x, y, 0.28, 0.95), _box(x, y, 0.95, 0.28))


def _bars(x: Array, y: Array, _: float) -> Array:
    across = np.abs(x)
    return np.maximum(np.minimum(across, np.abs(across - 0.7)) - 0.18, np.abs(y) - 0.9)


def _star(x: Array, y: Array, _: float) -> Array:
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    tip = np.array([1.0, 0.0])
    notch = 0.42 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal /= np.hypot(*normal)
    return radius * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1]) - normal[0]


def _heart(x: Array, y: Array, _: float) -> Array:
    side = np.abs(x)
    lobes = np.hypot(side - 0.45, y + 0.3) - 0.52
    point = np.maximum(0.72 * side + 0.69 * y - 0.637, 0.69 * side - 0.72 * y - 0.527)
    return np.minimum(lobes, point)


def _hourglass(x: Array, y: Array, _: float) -> Array:
    height = np.abs(y)
    return np.maximum(height - 0.88, 0.74 * (np.abs(x) - 0.9 * height - 0.08))


def _lens(x: Array, y: Array, _: float) -> Array:
    return 0.55 * (np.hypot(x, y / 0.55) - 1.0)


def _chevron(x: Array, y: Array, _: float) -> Array:
    side = np.abs(x)
    return np.maximum(0.78 * np.abs(y - 0.8 * side + 0.35) - 0.24, side - 0.95)


def _pill(x: Array, y: Array, _: float) -> Array:
    return np.hypot(x, np.maximum(np.abs(y) - 0.55, 0)) - 0.44


def _drop(x: Array, y: Array, _: float) -> Array:
    cone = np.maximum(0.887 * np.abs(x) - 0.4615 * (y + 1), y - 0.023)
    return np.minimum(np.hypot(x, y - 0.3) - 0.6, cone)


def _hook(x: Array, y: Array, _: float) -> Array:
    return np.minimum(_box(x + 0.4, y, 0.26, 0.9), _box(x - 0.1, y - 0.64, 0.76, 0.26))


def _wedge(x: Array, y: Array, _: float) -> Array:
    return _mouth(x, y, 0.65)


def _mouth(x: Array, y: Array, opening: float) -> Array:
    half_angle = np.radians(5 + 75 * opening)
    gap = np.abs(y) * np.cos(half_angle) - x * np.sin(half_angle)
    return np.maximum(np.hypot(x, y) - 0.92, -gap)


def _doors(x: Array, y: Array, opening: float) -> Array:
    leaf = np.abs(x) - (0.04 + 0.5 * opening)
    return np.maximum(np.hypot(leaf, y) - 0.7, -leaf)


def _flower(x: Array, y: Array, _: float) -> Array:
    radius = np.hypot(x, y)
    cosine = -y / np.maximum(radius, 1e-3)
    return 0.8 * (radius - 0.68 - 0.28 * cosine * (4 * cosine * cosine - 3))  # three petals: cos(3 angle)


def _diamond(x: Array, y: Array, _: float) -> Array:
    return np.abs(0.707 * (np.abs(x) + np.abs(y)) - 0.5) - 0.17


# The classes that are told by what the figure is.
APPEARANCE: dict[str, Figure] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "bars": _bars,
    "heart": _heart,
    "hourglass": _hourglass,
}

# What moves in the classes that are told by direction: figures of their own, so that a single frame tells which
# motion it is from but never its direction. The two that spin have no rotational symmetry, so that a turn between
# two sampled frames is never ambiguous.
MOVERS: dict[str, tuple[Figure, ...]] = {
    "move": (_lens, _chevron),
    "rise": (_pill, _drop),
    "open": (_mouth, _doors),
    "spin": (_hook, _wedge),
    "grow": (_flower, _diamond),
}
