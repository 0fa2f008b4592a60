"""T x S views of a video: every frame decoded and resized once, whatever the views share (spec omi_mdl 5.3)."""

from __future__ import annotations

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
    """temporal positions x spatial crops, and how each is taken. starts: spaced_exclusive, spaced_inclusive,
    random or centre. axis, rounding: see transforms.crop_corners. seed: of random starts."""

    temporal: int
    spatial: int
    sampling: Sampling
    short_side: int
    crop: int
    starts: str = "spaced_exclusive"
    axis: str = "horizontal"
    rounding: str = "floor"
    seed: int = 0


@dataclass(frozen=True)
class Views:
    """frames: uint8 [T * S, 3, F, crop, crop], temporal-major. distinct: how many differ. backend: decoder."""

    frames: Tensor
    distinct: int
    backend: str


def parse_views(text: str) -> tuple[int, int]:
    """`10x3` -> (10, 3). Raises MdlError for anything that is not T x 1 or T x 3."""
    match = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if match is None:
        raise MdlError(f"'{text}' is no choice of views", "--views", "TxS with S 1 or 3, e.g. 10x3 or 1x1")
    return int(match[1]), int(match[2])


def load_views(
    video: bytes | Path,
    spec: ViewSpec,
    *,
    trim: tuple[float, float] | None = None,
    key: str = "",
    threads: int = 1,
    stats: DecodeStats | None = None,
) -> Views:
    """Every view of a video, opened and decoded once. Raises VideoError for a video that cannot be used.

    key: the clip's key, which with the seed decides random starts.
    """
    import torch

    from mdltool.data.decode import decode
    from mdltool.data.transforms import crop_corners, resized

    picked: list[np.ndarray] = []

    def choose(timeline: Timeline) -> Sequence[int]:
        rng = np.random.default_rng([spec.seed, zlib.crc32(key.encode())])
        starts = view_starts(timeline.duration_s, spec.sampling.clip_seconds, spec.temporal, spec.starts, rng)
        picked[:] = [clip_indices(timeline, start, spec.sampling) for start in starts]
        return np.concatenate(picked).tolist()

    decoded = decode(video, choose, trim=trim, threads=threads, stats=stats)
    frames_UCHW = resized(decoded.frames, spec.short_side)
    height, width = frames_UCHW.shape[-2:]
    corners = crop_corners(height, width, spec.crop, spec.spatial, spec.axis, spec.rounding)
    rows = [torch.from_numpy(decoded.rows(indices)) for indices in picked]
    views = torch.empty(
        (len(rows), len(corners), 3, spec.sampling.num_frames, spec.crop, spec.crop), dtype=torch.uint8
    )
    for s, (y, x) in enumerate(corners):
        # planar once per crop and distinct frame; the views then copy whole planes
        crop_CUHW = frames_UCHW[..., y : y + spec.crop, x : x + spec.crop].permute(1, 0, 2, 3).contiguous()
        for t, chosen in enumerate(rows):
            torch.index_select(crop_CUHW, 1, chosen, out=views[t, s])
    distinct = len({indices.tobytes() for indices in picked}) * len(set(corners))
    return Views(views.flatten(0, 1), distinct, decoded.backend)
