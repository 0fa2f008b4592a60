"""T x S views of a video: every frame decoded and resized once, whatever the views share (spec omi_mdl 5.3)."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdltool.data.sampling import Sampling, clip_indices, view_starts
from mdltool.data.video import DecodeStats, Timeline
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ViewSpec:
    """temporal positions x spatial crops, and how each is taken.

    starts: see sampling.view_starts. axis, rounding: see transforms.crop_corners. seed: of random starts.
    Raises MdlError when the crop does not fit into frames of short_side.
    """

    temporal: int
    spatial: int
    sampling: Sampling
    short_side: int
    crop: int
    starts: str = "spaced_exclusive"
    axis: str = "horizontal"
    rounding: str = "floor"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.short_side:
            raise MdlError(
                f"crops of {self.crop} pixels do not fit a shorter side of {self.short_side}",
                None,
                "crop <= short_side",
            )


@dataclass(frozen=True)
class Views:
    """frames: uint8 [T * S, 3, F, crop, crop], temporal-major. distinct: views that differ. backend: decoder."""

    frames: Tensor
    distinct: int
    backend: str


def parse_views(text: str) -> tuple[int, int]:
    """`10x3` -> (10, 3). Raises MdlError for anything that is not T x 1 or T x 3."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([13])", text)
    if match is None:
        raise MdlError(f"'{text}' is no choice of views", "--views", "TxS with S 1 or 3, e.g. 10x3 or 1x1")
    return int(match[1]), int(match[2])


def load_views(
    video: bytes | Path,
    spec: ViewSpec,
    *,
    trim: tuple[float, float] | None = None,
    image: bool | None = None,
    key: str = "",
    threads: int = 1,
    stats: DecodeStats | None = None,
) -> Views:
    """Every view of a video, opened and decoded once. Raises VideoError for a video that cannot be used.

    trim, image: as in decode.decode. key: the clip's key, which with the seed decides random starts.
    """
    from mdltool.data.decode import decode
    from mdltool.data.transforms import crop_corners, scaled

    picked: list[np.ndarray] = []

    def choose(timeline: Timeline) -> Sequence[int]:
        rng = np.random.default_rng([spec.seed, zlib.crc32(os.fsencode(key))])
        starts = view_starts(timeline.duration_s, spec.sampling.span_s(timeline), spec.temporal, spec.starts, rng)
        picked[:] = [clip_indices(timeline, start, spec.sampling) for start in starts]
        return np.concatenate(picked).tolist()

    decoded = decode(video, choose, trim=trim, image=image, threads=threads, stats=stats)
    height, width = decoded.frames.shape[-2:]
    size = scaled(height, width, spec.short_side)
    corners = crop_corners(*size, spec.crop, spec.spatial, spec.axis, spec.rounding)
    frames = _cut(decoded.frames, decoded.rows(np.stack(picked)), size, spec.short_side, corners, spec.crop)
    distinct = len({indices.tobytes() for indices in picked}) * len(set(corners))
    return Views(frames, distinct, decoded.backend)


def _cut(
    frames_U3HW: Tensor,
    rows_TF: np.ndarray,
    size: tuple[int, int],
    short_side: int,
    corners: Sequence[tuple[int, int]],
    crop: int,
) -> Tensor:
    """uint8 [T * S, 3, F, crop, crop] of the distinct frames, where rows_TF says which frame stands where.

    Frame by frame: resized and made planar once, in a buffer that stays in the processor's cache while its crops
    are copied to every place that shows them. NumPy, because it allocates large arrays in huge pages.
    """
    import torch

    from mdltool.data.transforms import resized

    temporal, num_frames = rows_TF.shape
    views = np.empty((temporal, len(corners), 3, num_frames, crop, crop), np.uint8)
    planar = np.empty((3, *size), np.uint8)
    for row in range(len(frames_U3HW)):
        np.copyto(planar, resized(frames_U3HW[row : row + 1], short_side)[0].numpy())
        for t, f in np.argwhere(rows_TF == row).tolist():
            for s, (y, x) in enumerate(corners):
                views[t, s, :, f] = planar[:, y : y + crop, x : x + crop]
    return torch.from_numpy(views).flatten(0, 1)
