"""What both decoders share: the timeline of a video, counts, and the two ways in which a video can fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# Presentation times are rationals and `trim` went through decimal text: closer than this is the same instant.
SAME_INSTANT_S = 1e-6


class VideoError(Exception):
    """The video cannot be used. reason: a short true sentence for quarantine lists and messages."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FramesMissing(Exception):
    """Packets that promised frames did not decode to them: the timeline is wrong. Never leaves decode()."""


@dataclass(frozen=True)
class Timeline:
    """Presentation times of the frames of a clip.

    times_s: float64 [N] seconds, ascending, the first is 0. duration_s: the last time plus the typical frame step.
    """

    times_s: np.ndarray
    duration_s: float

    def __len__(self) -> int:
        return len(self.times_s)


@dataclass
class DecodeStats:
    """Counts what decoding cost. opened: containers opened. decoded: frames that came out of a decoder."""

    opened: int = 0
    decoded: int = 0


class FrameReader(Protocol):
    """One opened video. times_s: float64 [N], the container's own presentation times of its frames, ascending.

    step_s: duration of a frame where a single frame gives no other measure.
    """

    @property
    def backend(self) -> str: ...

    @property
    def times_s(self) -> np.ndarray: ...

    @property
    def step_s(self) -> float: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [U, H, W, 3], RGB, of the frames at ascending indices. Raises FramesMissing."""
        ...

    def close(self) -> None: ...


def clip_timeline(times_s: np.ndarray, step_s: float, trim: tuple[float, float] | None) -> tuple[int, Timeline]:
    """The part of a video that `trim` [start, stop) keeps, in seconds from the video's first frame.

    Returns the index of the clip's first frame in the video, and the clip's timeline.
    Raises VideoError when no frame is left.
    """
    if len(times_s) == 0:
        raise VideoError("the video stream holds no frames")
    relative = times_s - times_s[0]
    first, stop = 0, len(relative)
    if trim is not None:
        first, stop = np.searchsorted(relative, np.asarray(trim) - SAME_INSTANT_S)
        if first >= stop:
            raise VideoError(
                f"no frame lies between {trim[0]:g} and {trim[1]:g} s of a video of {relative[-1] + step_s:.3f} s"
            )
    kept = relative[first:stop] - relative[first]
    step = float(np.median(np.diff(relative))) if len(relative) > 1 else step_s
    return int(first), Timeline(kept, float(kept[-1]) + step)


def head(source: Path | bytes) -> bytes:
    """The first 4096 bytes. Raises OSError."""
    if isinstance(source, bytes):
        return source[:4096]
    with open(source, "rb") as file:
        return file.read(4096)


def wrong_content(source: Path | bytes, wanted: str) -> str | None:
    """Why a file is nothing of the kind, where its first bytes tell. wanted: "a video", "an image"."""
    try:
        content = head(source)
    except OSError as fault:
        return f"the file cannot be read ({fault.strerror})"
    if not content:
        return "the file is empty"
    start = content.lstrip()[:64].lower()
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer, not {wanted}"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"an HTML page, not {wanted}"
    return None
