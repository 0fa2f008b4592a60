"""Which frames a clip consists of: pure functions of a timeline (Omi et al., 4.1; spec omi_mdl 5.1, 5.3, 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mdltool.data.video import SAME_INSTANT_S, Timeline


@dataclass(frozen=True)
class Sampling:
    """num_frames spread over a stretch of clip_seconds.

    short: what a video shorter than that does: `stretch` spreads the frames it has, `repeat_last` keeps the nominal
    spacing and holds the last frame, `loop` keeps it and starts again. index: `count` spaces frames by number,
    `time` by presentation time; they differ where the rate varies.
    """

    num_frames: int
    clip_seconds: float
    short: str = "stretch"
    index: str = "count"


def clip_indices(timeline: Timeline, start_s: float, sampling: Sampling) -> np.ndarray:
    """Frame numbers int64 [num_frames] of the stretch [start_s, start_s + clip_seconds).

    `count`: floor(k (n - 1) / (num_frames - 1)) over its n frames. A stretch without a frame takes the nearest one.
    """
    times = timeline.times_s
    num = sampling.num_frames
    stop_s = start_s + sampling.clip_seconds
    is_short = timeline.duration_s < sampling.clip_seconds - SAME_INSTANT_S
    if sampling.index == "time" or (is_short and sampling.short != "stretch"):
        wanted_s = start_s + np.arange(num) * sampling.clip_seconds / max(num - 1, 1)
        if is_short and sampling.short == "loop":
            wanted_s = wanted_s % timeline.duration_s
        elif is_short and sampling.short == "stretch":
            wanted_s = start_s + np.arange(num) * (times[-1] - start_s) / max(num - 1, 1)
        return nearest(times, wanted_s)
    first = int(np.searchsorted(times, start_s - SAME_INSTANT_S))
    stop = int(np.searchsorted(times, stop_s - SAME_INSTANT_S))
    if first >= stop:
        return np.full(num, nearest(times, np.array([start_s]))[0])
    n = stop - first
    return first + np.arange(num, dtype=np.int64) * (n - 1) // max(num - 1, 1)


def nearest(times_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """Numbers of the frames nearest to the wanted times; of two equally near the earlier."""
    right = np.clip(np.searchsorted(times_s, wanted_s), 1, max(len(times_s) - 1, 1))
    if len(times_s) == 1:
        return np.zeros(len(wanted_s), dtype=np.int64)
    left = right - 1
    closer_left = wanted_s - times_s[left] <= times_s[right] - wanted_s
    return np.where(closer_left, left, right).astype(np.int64)


def random_start(duration_s: float, clip_seconds: float, rng: np.random.Generator) -> float:
    """Uniform in [0, max(duration - clip_seconds, 0)]; one draw whatever the duration."""
    return float(rng.random()) * max(duration_s - clip_seconds, 0.0)


def view_starts(
    duration_s: float,
    clip_seconds: float,
    count: int,
    mode: str = "spaced_exclusive",
    rng: np.random.Generator | None = None,
) -> list[float]:
    """Starts in seconds of `count` stretches (spec omi_mdl 5.3).

    spaced_exclusive: i * room / count. spaced_inclusive: i * room / (count - 1). centre: all at room / 2.
    random: uniform draws from rng. room = max(duration - clip_seconds, 0).
    """
    room = max(duration_s - clip_seconds, 0.0)
    if mode == "centre":
        return [room / 2] * count
    if mode == "random":
        assert rng is not None, "random starts need a generator"
        return [float(rng.random()) * room for _ in range(count)]
    parts = count if mode == "spaced_exclusive" else max(count - 1, 1)
    return [i * room / parts for i in range(count)]
