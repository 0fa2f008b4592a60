"""The pictures of a generated clip: a figure's course, and its painting before a domain's scene."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdltool.data.synth_figures import APPEARANCE, MOVERS, Figure
from mdltool.data.synth_looks import Look, paint_background, smooth_noise

Frames = NDArray[np.uint8]
Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Track:
    """A figure's course, float32 [T] each: centre and radius in pixels, tilt in radians, opening 0..1."""

    x: Array
    y: Array
    radius: Array
    tilt: Array
    opening: Array


def play(look: Look, domain: str, course: str, instance_seed: int, num_frames: int | None = None) -> Frames:
    """The clip of an appearance class, or of a motion forwards: uint8 RGB [T, H, W, 3]; None draws T."""
    rng = np.random.default_rng([zlib.crc32(f"{domain}/{course}".encode()), instance_seed])
    num_frames = num_frames or round(look.fps * rng.uniform(2.7, 3.3))
    track = follow(look, course, num_frames, rng)
    figures = MOVERS.get(course) or (APPEARANCE[course],)
    figure = figures[rng.integers(len(figures))]
    return _paint(look, figure, track, rng)


def _wave(time: Array, amplitude: float, rng: np.random.Generator) -> Array:
    """A slow oscillation of random phase: the same process forwards and backwards."""
    frequency, phase = rng.uniform(0.4, 0.9), rng.uniform(0, 2 * np.pi)
    return np.float32(amplitude) * np.sin(2 * np.pi * frequency * time + phase, dtype=np.float32)


def follow(look: Look, course: str, num_frames: int, rng: np.random.Generator) -> Track:
    """Where the figure is in every frame. Motions are monotone and span the clip, so any part shows them."""
    short = min(look.width, look.height)
    time = np.arange(num_frames, dtype=np.float32) / np.float32(look.fps)
    progress = np.linspace(0, 1, num_frames, dtype=np.float32)
    moves = course in MOVERS
    wobble = short * (0.02 if moves else 0.07)
    x = look.width / 2 + short * rng.uniform(-0.05, 0.05) + _wave(time, wobble, rng)
    y = look.height / 2 + short * rng.uniform(-0.05, 0.05) + _wave(time, wobble, rng)
    radius = short * rng.uniform(0.32, 0.38) * (1 + _wave(time, 0.02 if moves else 0.06, rng))
    tilt = rng.uniform(-0.2, 0.2) + _wave(time, 0.05 if moves else 0.15, rng)
    opening = np.zeros_like(progress)
    if course == "move":
        x += look.width * rng.uniform(0.45, 0.55) * (progress - 0.5)
        radius *= 0.8
    elif course == "rise":
        y -= look.height * rng.uniform(0.45, 0.55) * (progress - 0.5)
        radius *= 0.8
    elif course == "spin":
        tilt += 2 * np.pi * (rng.uniform() + rng.uniform(0.55, 0.72) * progress)
    elif course == "open":
        opening = progress
    elif course == "grow":
        radius *= 0.4 + 0.8 * progress
    return Track(x, y, np.asarray(radius, np.float32), np.asarray(tilt, np.float32), opening)


def _paint(look: Look, figure: Figure, track: Track, rng: np.random.Generator) -> Frames:
    margin = int(np.ceil(look.jitter)) + 1
    scene = paint_background(look, rng, margin).astype(np.uint8)
    paint = np.array(look.paints[rng.integers(len(look.paints))], np.float32)
    rough = 1 - look.chalky * smooth_noise(rng, look.height, look.width, 2)
    num_frames = len(track.x)
    shake = np.clip(rng.normal(0, look.jitter / 2, (num_frames, 2)), -look.jitter, look.jitter)
    shifts = np.rint(shake).astype(int)
    grain = rng.integers(-look.grain, look.grain + 1, (2 * look.height, 2 * look.width, 1), np.int16)
    corners = rng.integers(0, (look.height, look.width), (num_frames, 2))
    frames = np.empty((num_frames, look.height, look.width, 3), np.uint8)
    for t, ((down, right), (top, left)) in enumerate(zip(shifts, corners, strict=True)):
        y, x = margin + down, margin + right
        picture = scene[y : y + look.height, x : x + look.width].copy()
        _draw(picture, look, figure, track, t, (right, down), paint, rough)
        if look.grain:
            noise = grain[top : top + look.height, left : left + look.width]
            picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
        frames[t] = picture
    return frames


def _draw(
    picture: Frames,
    look: Look,
    figure: Figure,
    track: Track,
    t: int,
    shift: tuple[int, int],
    paint: Array,
    rough: Array,
) -> None:
    """Paint the figure of frame t into `picture`, within the window that it reaches."""
    centre_x, centre_y, radius = track.x[t] - shift[0], track.y[t] - shift[1], track.radius[t]
    reach = 1.35 * radius + 2 * look.glow + 2
    rows = slice(max(0, int(centre_y - reach)), max(0, int(centre_y + reach) + 1))
    columns = slice(max(0, int(centre_x - reach)), max(0, int(centre_x + reach) + 1))
    window = picture[rows, columns]
    y = (np.arange(window.shape[0], dtype=np.float32)[:, None] + rows.start - centre_y) / radius
    x = (np.arange(window.shape[1], dtype=np.float32)[None, :] + columns.start - centre_x) / radius
    cos, sin = np.cos(track.tilt[t]), np.sin(track.tilt[t])
    distance = figure(cos * x + sin * y, cos * y - sin * x, float(track.opening[t])) * radius
    cover = np.clip(0.5 - distance, 0, 1)
    if look.chalky:
        cover *= rough[rows, columns]
    if look.glow:
        cover = np.maximum(cover, 0.6 * np.exp(-np.maximum(distance, 0) / (look.glow / 2)))
    ink: Array = paint
    if look.outline is not None:
        edge = np.clip(distance + 2.5, 0, 1)[..., None]
        ink = paint + edge * (np.array(look.outline, np.float32) - paint)
    window[:] = (window + cover[..., None] * (ink - window)).astype(np.uint8)
