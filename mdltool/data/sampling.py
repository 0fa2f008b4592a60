"""Which frames a clip consists of: pure functions of a timeline (Omi et al., 4.1; spec omi_mdl 5.1, 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdltool.data.video import SAME_INSTANT_S, Timeline
from mdltool.errors import MdlError

SHORT = ("stretch", "repeat_last", "loop")
INDEX = ("count", "time", "stride", "segments")
STARTS = ("spaced_exclusive", "spaced_inclusive", "random", "centre")


@dataclass(frozen=True)
class Sampling:
    """num_frames of a video, taken by one of four rules.

    index: `count` spreads frame numbers evenly over an interval of clip_seconds, `time` presentation times; they
    differ where the frame rate varies. `stride` takes every stride_frames-th frame (MST-Adapter's dense sampling;
    spec mst_adapter 5). `segments` takes one frame of each of num_frames equal parts of the whole video: a random
    one where a generator is given, else the middle one.
    short: what a video shorter than the interval does: `stretch` spreads the frames it has, `repeat_last` keeps the
    nominal spacing and holds the last frame, `loop` keeps it and starts again.
    Raises MdlError for values outside these, and for a clip without its length.
    """

    num_frames: int
    clip_seconds: float | None = None
    short: str = "stretch"
    index: str = "count"
    stride_frames: int | None = None

    def __post_init__(self) -> None:
        _one_of("short", self.short, SHORT)
        _one_of("index", self.index, INDEX)
        wants = {"stride": ("stride_frames",), "segments": ()}.get(self.index, ("clip_seconds",))
        for name in ("clip_seconds", "stride_frames"):
            value = getattr(self, name)
            if (value is not None) != (name in wants):
                verb = "needs" if name in wants else "takes no"
                raise MdlError(f"sampling by {self.index} {verb} {name}", "data.sampling", "see: docs/data.md")
        length = self.clip_seconds if self.stride_frames is None else self.stride_frames
        if self.num_frames < 1 or (length is not None and not length > 0):
            raise MdlError(
                f"a clip of {self.num_frames} frames over {length} is impossible",
                None,
                "give at least one frame and more than 0 s",
            )
        if self.index == "stride" and self.short == "stretch":
            raise MdlError("sampling by stride cannot stretch a short video", "data.sampling.short", "loop")

    def span_s(self, timeline: Timeline) -> float:
        """Seconds of a video that a clip takes, from which its possible starts follow."""
        if self.index == "segments":
            return timeline.duration_s
        if self.stride_frames is not None:
            # One frame less than the clip covers, so that uniform starts reach the last possible frame as often.
            return (self.num_frames - 1) * self.stride_frames * timeline.duration_s / len(timeline)
        assert self.clip_seconds is not None
        return self.clip_seconds


def clip_indices(
    timeline: Timeline, start_s: float, sampling: Sampling, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Frame numbers int64 [num_frames] of the interval [start_s, start_s + clip_seconds), cut at the video's end.

    `count`: floor(k (n - 1) / (num_frames - 1)) over the interval's n frames, k = 0 .. num_frames - 1. `time`: the
    frames nearest to start_s + k clip_seconds / (num_frames - 1). An interval without frames takes the nearest one.
    Of a single frame, an image's above all, which has no duration, every rule takes that frame.
    """
    if len(timeline) == 1:
        return np.zeros(sampling.num_frames, np.int64)
    if sampling.index == "segments":
        return _by_segment(len(timeline), sampling.num_frames, rng)
    if sampling.stride_frames is not None:
        return _by_stride(timeline, start_s, sampling, sampling.stride_frames)
    assert sampling.clip_seconds is not None
    is_short = timeline.duration_s < sampling.clip_seconds - SAME_INSTANT_S
    if sampling.index == "time":
        return _by_time(timeline, start_s, sampling, is_short)
    stop_s = start_s + sampling.clip_seconds
    first, stop = np.searchsorted(timeline.times_s, np.array([start_s, stop_s]) - SAME_INSTANT_S).tolist()
    available = stop - first
    if available <= 0:
        return np.repeat(_nearest(timeline.times_s, np.array([(start_s + stop_s) / 2])), sampling.num_frames)
    if not is_short or sampling.short == "stretch":
        return first + _spread(available, sampling.num_frames)
    step_s = timeline.duration_s / len(timeline)
    nominal = _spread(max(round(sampling.clip_seconds / step_s), available), sampling.num_frames)
    return first + (np.minimum(nominal, available - 1) if sampling.short == "repeat_last" else nominal % available)


def random_start(duration_s: float, clip_seconds: float, rng: np.random.Generator) -> float:
    """Uniform in [0, max(duration - clip_seconds, 0)] seconds; one draw whatever the duration."""
    return float(rng.random()) * max(duration_s - clip_seconds, 0.0)


def view_starts(
    duration_s: float,
    clip_seconds: float,
    count: int,
    mode: str = "spaced_exclusive",
    rng: np.random.Generator | None = None,
) -> list[float]:
    """Starts in seconds of `count` intervals; with room = max(duration - clip_seconds, 0), for i = 0 .. count - 1:

    spaced_exclusive: i room / count. spaced_inclusive: i room / (count - 1). centre: (i + 1/2) room / count, for
    one interval the middle of the video. random: one uniform draw from rng each. Raises MdlError for another mode.
    """
    _one_of("starts", mode, STARTS)
    room = max(duration_s - clip_seconds, 0.0)
    if mode == "random":
        assert rng is not None, "random starts need a generator"
        return [float(rng.random()) * room for _ in range(count)]
    offset = 0.5 if mode == "centre" else 0.0
    parts = max(count - 1, 1) if mode == "spaced_inclusive" else count
    return [(i + offset) * room / parts for i in range(count)]


def _by_stride(timeline: Timeline, start_s: float, sampling: Sampling, stride: int) -> np.ndarray:
    frames = len(timeline)
    steps = np.arange(sampling.num_frames, dtype=np.int64) * stride
    first = int(start_s * frames / timeline.duration_s + 1e-6)
    indices = min(first, max(frames - 1 - int(steps[-1]), 0)) + steps
    return np.minimum(indices, frames - 1) if sampling.short == "repeat_last" else indices % frames


def _by_segment(frames: int, parts: int, rng: np.random.Generator | None) -> np.ndarray:
    place = np.full(parts, 0.5) if rng is None else rng.random(parts)
    return np.minimum((np.arange(parts) + place) * frames / parts, frames - 1).astype(np.int64)


def _by_time(timeline: Timeline, start_s: float, sampling: Sampling, is_short: bool) -> np.ndarray:
    seconds = sampling.clip_seconds or 0.0
    if is_short and sampling.short == "stretch":
        seconds = float(timeline.times_s[-1]) - start_s
    wanted_s = start_s + np.arange(sampling.num_frames) * seconds / max(sampling.num_frames - 1, 1)
    if is_short and sampling.short == "loop":
        wanted_s = wanted_s % timeline.duration_s
    return _nearest(timeline.times_s, wanted_s)


def _spread(available: int, num_frames: int) -> np.ndarray:
    return np.arange(num_frames, dtype=np.int64) * (available - 1) // max(num_frames - 1, 1)


def _nearest(times_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """Numbers of the frames nearest to the wanted times; of two equally near the earlier."""
    right = np.clip(np.searchsorted(times_s, wanted_s), 0, len(times_s) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted_s - times_s[left] <= times_s[right] - wanted_s, left, right).astype(np.int64)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MdlError(f"{name}: '{value}' is unknown", None, f"one of: {', '.join(allowed)}")
