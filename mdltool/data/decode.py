"""Video and image files to frames: one function, two video decoders with the same pixels (design, section 7).

The timeline comes from the container's packets, without decoding; then only the frames from the keyframe before the
first chosen one to the last chosen one are decoded, and only the chosen ones become RGB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdltool.data import decode_torchcodec
from mdltool.data.decode_pyav import PyavReader, quarter_turns
from mdltool.data.image import read_image
from mdltool.data.video import DecodeStats, FrameReader, FramesMissing, Timeline, VideoError, clip_timeline
from mdltool.errors import MdlError
from mdltool.types import is_image

if TYPE_CHECKING:  # the processes that only check videos start without it
    import torch

__all__ = [
    "DecodeStats",
    "Decoded",
    "Timeline",
    "VideoError",
    "VideoInfo",
    "available_backends",
    "check_video",
    "decode",
]

Choose = Callable[[Timeline], Sequence[int]]


@dataclass(frozen=True)
class Decoded:
    """The frames that were chosen, each once.

    frames: uint8 [U, 3, H, W], RGB, 0..255, upright, channels last in memory. indices: int64 [U], ascending: the
    frames' numbers in the clip. backend: the decoder that gave them (pyav, torchcodec; pillow for images).
    """

    frames: torch.Tensor
    indices: np.ndarray
    timeline: Timeline
    backend: str

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Positions in `frames` of the given frame numbers, all of which were chosen; any shape, int64."""
        rows = np.searchsorted(self.indices, indices)
        assert np.array_equal(self.indices[rows], indices), "a frame that was not chosen"
        return rows


@dataclass(frozen=True)
class VideoInfo:
    """What a usable video is. width, height: upright. frames, duration_s, fps: of the clip that `trim` keeps;
    fps is the measured mean, 0 where a single frame gives none."""

    width: int
    height: int
    frames: int
    duration_s: float
    codec: str
    fps: float


def available_backends() -> dict[str, str | None]:
    """Decoder name to None where it can be used, else to the reason why not."""
    return {"torchcodec": decode_torchcodec.fault(), "pyav": None}


def decode(
    source: Path | bytes,
    choose: Choose,
    *,
    trim: tuple[float, float] | None = None,
    image: bool | None = None,
    backend: str = "auto",
    threads: int = 1,
    stats: DecodeStats | None = None,
) -> Decoded:
    """Decode the frames that `choose` picks from the clip's timeline, opening and decoding the video once.

    choose: gets the clip's timeline and returns frame numbers, in any order, repeats allowed. trim: [start, stop)
    in seconds from the video's first frame; the clip's time 0 is its first frame. image: whether this is an image,
    a clip of one frame without duration; None: by the file's name, and bytes are a video. backend: "pyav";
    "torchcodec" (8-bit, even-sized H.264, HEVC, VP9 and AV1 by torchcodec, the rest by PyAV, at the price of
    opening those twice); "auto": what $MDLTOOL_DECODER says, else pyav. Images go through Pillow.

    A damaged video, whose chosen frames do not decode, is decoded again for the times of those that do, and
    `choose` is asked again. Raises VideoError, and MdlError for a backend that is not there.
    """
    stats = stats if stats is not None else DecodeStats()
    if image or (image is None and isinstance(source, Path) and is_image(source)):
        return _read_image(source, choose, stats)
    if _resolved(backend) == "torchcodec":
        try:
            return _read(decode_torchcodec.TorchcodecReader(source, threads, stats), choose, trim)
        except (VideoError, FramesMissing):
            pass  # PyAV takes it, or says what is wrong with it
    with closing(PyavReader(source, threads, stats)) as pyav:
        try:
            return _read(pyav, choose, trim)
        except FramesMissing:
            pyav.rebuild()
        try:
            return _read(pyav, choose, trim)
        except FramesMissing:
            raise VideoError("its frames decode differently from one time to the next") from None


def check_video(source: Path | bytes, *, full: bool, trim: tuple[float, float] | None = None) -> VideoInfo:
    """Whether a video is usable: its first frame decodes, or with `full` how many of its frames do.

    trim: as in `decode`. Raises VideoError with the reason when no frame decodes.
    """
    with closing(PyavReader(source, 1, DecodeStats())) as reader:
        if full:
            reader.rebuild()
        first, timeline = clip_timeline(reader.times_s, reader.step_s, trim)
        frame = reader.first_frame(first)
        width, height = frame.width, frame.height
        if quarter_turns(frame.rotation) % 2:
            width, height = height, width
        span = float(timeline.times_s[-1])
        fps = (len(timeline) - 1) / span if span > 0 else 0.0
        return VideoInfo(width, height, len(timeline), timeline.duration_s, reader.codec, fps)


def _resolved(backend: str) -> str:
    if backend == "auto":
        backend = os.environ.get("MDLTOOL_DECODER", "auto")
    if backend == "auto":
        return "pyav"
    if backend not in available_backends():
        raise MdlError(f"unknown decoder '{backend}'", "MDLTOOL_DECODER", "one of: auto, pyav, torchcodec")
    fault = available_backends()[backend]
    if fault is not None:
        raise MdlError(f"{backend} cannot be used here: {fault}", "MDLTOOL_DECODER", "use pyav")
    return backend


def _read_image(source: Path | bytes, choose: Choose, stats: DecodeStats) -> Decoded:
    import torch

    pixels = read_image(source)
    stats.opened += 1
    stats.decoded += 1
    timeline = Timeline(np.zeros(1), 0.0)
    indices = np.unique(np.asarray(choose(timeline), dtype=np.int64))
    assert indices.tolist() == [0], "an image has one frame"
    return Decoded(torch.from_numpy(pixels[None]).permute(0, 3, 1, 2), indices, timeline, "pillow")


def _read(reader: FrameReader, choose: Choose, trim: tuple[float, float] | None) -> Decoded:
    import torch

    first, timeline = clip_timeline(reader.times_s, reader.step_s, trim)
    indices = np.unique(np.asarray(choose(timeline), dtype=np.int64))
    assert indices[0] >= 0, "a frame before the clip was chosen"
    assert indices[-1] < len(timeline), "a frame after the clip was chosen"
    frames = torch.from_numpy(reader.read(first + indices)).permute(0, 3, 1, 2)
    return Decoded(frames, indices, timeline, reader.backend)
