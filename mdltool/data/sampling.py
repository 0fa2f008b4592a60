"""Which frames a clip consists of: pure functions of a timeline (Omi et al., 4.1; spec omi_mdl 5.1, 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdltool.data.video import SAME_INSTANT_S, Timeline
from mdltool.errors import MdlError

SHORT = ("stretch", "repeat_last", "loop")
INDEX = ("count", "time")
STARTS = ("spaced_exclusive", "spaced_inclusive", "random", "centre")


@dataclass(frozen=True)
class Sampling:
    """num_frames spread over an interval of clip_seconds.

    index: what is spread evenly, `count` frame numbers or `time` presentation times; they differ where the frame
    rate varies. short: what a video shorter than the interval does: `stretch` spreads the frames it has,
    `repeat_last` keeps the nominal spacing and holds the last frame, `loop` keeps it and starts again.
    Raises MdlError for values outside these.
    """

    num_frames: int
    clip_seconds: float
    short: str = "stretch"
    index: str = "count"

    def __post_init__(self) -> None:
        _one_of("short", self.short, SHORT)
        _one_of("index", self.index, INDEX)
        if self.num_frames < 1 or not self.clip_seconds > 0:
            raise MdlError(
                f"a clip of {self.num_frames} frames over {self.clip_seconds} s is impossible",
                None,
                "give at least one frame and more than 0 s",
            )


def clip_indices(timeline: Timeline, start_s: float, sampling: Sampling) -> np.ndarray:
    """Frame numbers int64 [num_frames] of the interval [start_s, start_s + clip_seconds), cut at the video's end.

    `count`: floor(k (n - 1) / (num_frames - 1)) over the interval's n frames, k = 0 .. num_frames - 1. `time`: the
    frames nearest to start_s + k clip_seconds / (num_frames - 1). An interval without frames takes the nearest one.
    """
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


def _by_time(timeline: Timeline, start_s: float, sampling: Sampling, is_short: bool) -> np.ndarray:
    seconds = sampling.clip_seconds
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
