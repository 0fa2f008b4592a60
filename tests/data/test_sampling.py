"""The paper's sampling rules, against numbers of the specification and independent computations."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from mdltool.data.sampling import Sampling, clip_indices, random_start, view_starts
from mdltool.data.video import Timeline
from mdltool.errors import MdlError

TAU = 80 / 30


def steady(frames: int, rate: float = 30.0) -> Timeline:
    return Timeline(np.arange(frames) / rate, frames / rate)


def test_eighty_frames_at_thirty_a_second() -> None:
    wanted = [0, 5, 10, 15, 21, 26, 31, 36, 42, 47, 52, 57, 63, 68, 73, 79]
    assert clip_indices(steady(380), 0.0, Sampling(16, TAU)).tolist() == wanted
    assert clip_indices(steady(380), 10.0, Sampling(16, TAU)).tolist() == [300 + i for i in wanted]


@pytest.mark.parametrize("rate", [12, 23.976, 25, 29.97, 30, 60])
@pytest.mark.parametrize("num_frames", [1, 2, 8, 16])
def test_agrees_with_exact_arithmetic(rate: float, num_frames: int) -> None:
    rng = np.random.default_rng(0)
    timeline = steady(400, rate)
    for start_s in rng.random(50) * (timeline.duration_s - TAU):
        inside = [i for i, t in enumerate(timeline.times_s) if start_s <= t < start_s + TAU]
        spacing = Fraction(len(inside) - 1, max(num_frames - 1, 1))
        wanted = [inside[int(k * spacing)] for k in range(num_frames)]
        assert clip_indices(timeline, start_s, Sampling(num_frames, TAU)).tolist() == wanted


def test_a_varying_rate_counts_frames_or_measures_time() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 2.0, 3.0, 4.0])
    timeline = Timeline(times, 5.0)
    assert clip_indices(timeline, 0.0, Sampling(4, 4.0)).tolist() == [0, 2, 4, 6]
    assert clip_indices(timeline, 0.0, Sampling(5, 4.0, index="time")).tolist() == [0, 4, 5, 6, 7]
    rng = np.random.default_rng(1)
    for start_s in rng.random(50):
        wanted = [int(np.argmin(np.abs(times - (start_s + k * 4.0 / 6)))) for k in range(7)]
        assert clip_indices(timeline, start_s, Sampling(7, 4.0, index="time")).tolist() == wanted


def test_a_gap_takes_the_nearest_frame() -> None:
    timeline = Timeline(np.array([0.0, 1.0, 10.0, 11.0]), 12.0)
    assert clip_indices(timeline, 2.0, Sampling(3, 2.0)).tolist() == [1, 1, 1]
    assert clip_indices(timeline, 7.0, Sampling(3, 2.0)).tolist() == [2, 2, 2]


def test_videos_shorter_than_the_interval() -> None:
    timeline = steady(10)  # a third of a second; the interval asks for 80 frames
    nominal = [0, 5, 10, 15, 21, 26, 31, 36, 42, 47, 52, 57, 63, 68, 73, 79]
    stretched = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9]
    assert clip_indices(timeline, 0.0, Sampling(16, TAU)).tolist() == stretched
    assert clip_indices(timeline, 0.0, Sampling(16, TAU, short="repeat_last")).tolist() == [
        min(i, 9) for i in nominal
    ]
    assert clip_indices(timeline, 0.0, Sampling(16, TAU, short="loop")).tolist() == [i % 10 for i in nominal]


def test_short_videos_by_time() -> None:
    timeline = steady(11, 10.0)  # frames at 0, 0.1 .. 1.0
    assert clip_indices(timeline, 0.0, Sampling(6, 2.0, index="time")).tolist() == [0, 2, 4, 6, 8, 10]
    held = Sampling(5, 2.0, short="repeat_last", index="time")
    assert clip_indices(timeline, 0.0, held).tolist() == [0, 5, 10, 10, 10]
    looped = Sampling(5, 2.0, short="loop", index="time")
    assert clip_indices(timeline, 0.0, looped).tolist() == [0, 5, 10, 4, 9]


def test_one_frame_is_enough() -> None:
    single = Timeline(np.array([0.0]), 0.04)
    for short in ("stretch", "repeat_last", "loop"):
        for index in ("count", "time"):
            assert clip_indices(single, 0.0, Sampling(4, TAU, short, index)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("index", ["count", "time"])
@pytest.mark.parametrize("short", ["stretch", "repeat_last", "loop"])
def test_indices_stay_inside_and_never_step_back_without_a_loop(short: str, index: str) -> None:
    rng = np.random.default_rng(2)
    for frames in (1, 2, 3, 17, 79, 80, 81, 200):
        times = np.cumsum(rng.random(frames) * 0.05 + 0.01)
        timeline = Timeline(times - times[0], float(times[-1] - times[0]) + 0.03)
        start_s = random_start(timeline.duration_s, TAU, rng)
        indices = clip_indices(timeline, start_s, Sampling(16, TAU, short, index))
        assert indices.dtype == np.int64
        assert 0 <= indices.min() <= indices.max() < frames
        assert short == "loop" or (np.diff(indices) >= 0).all()


def test_random_starts_are_uniform_over_the_room() -> None:
    rng = np.random.default_rng(3)
    starts = np.array([random_start(10.0, 4.0, rng) for _ in range(4000)])
    assert starts.min() >= 0
    assert starts.max() < 6
    assert np.allclose(np.quantile(starts, [0.25, 0.5, 0.75]), [1.5, 3.0, 4.5], atol=0.2)
    assert random_start(3.0, 4.0, rng) == 0.0


def test_ten_views_of_twelve_and_two_thirds_seconds() -> None:
    assert np.allclose(view_starts(12 + 2 / 3, TAU, 10), range(10))
    assert np.allclose(view_starts(12 + 2 / 3, TAU, 10, "spaced_inclusive"), np.arange(10) * 10 / 9)
    assert view_starts(2.0, TAU, 10) == [0.0] * 10
    assert view_starts(12 + 2 / 3, TAU, 1, "centre") == pytest.approx([5.0])
    assert view_starts(12 + 2 / 3, TAU, 1) == [0.0]
    assert np.allclose(view_starts(10 + TAU, TAU, 2, "centre"), [2.5, 7.5])


def test_random_views_depend_on_their_generator_only() -> None:
    draws = [view_starts(10.0, 4.0, 5, "random", np.random.default_rng(seed)) for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]
    assert all(0 <= start < 6 for start in draws[0])
    # the i-th start does not depend on how many are drawn
    assert view_starts(10.0, 4.0, 3, "random", np.random.default_rng(7)) == draws[0][:3]


def test_unknown_words_are_refused() -> None:
    for make in (
        lambda: Sampling(16, TAU, short="pad"),
        lambda: Sampling(16, TAU, index="frames"),
        lambda: Sampling(0, TAU),
        lambda: Sampling(16, 0.0),
        lambda: view_starts(10.0, TAU, 10, "even"),
    ):
        with pytest.raises(MdlError):
            make()


def test_dense_sampling_takes_every_nth_frame_and_wraps() -> None:
    """Spec mst_adapter 5: start uniform in 0..max(0, F - 1 - (T - 1) stride), frame start + i stride modulo F."""
    sampling = Sampling(8, None, "loop", "stride", 16)
    timeline, rng = steady(300), np.random.default_rng(0)
    starts = set()
    for _ in range(6000):
        start_s = random_start(timeline.duration_s, sampling.span_s(timeline), rng)
        indices = clip_indices(timeline, start_s, sampling)
        assert np.array_equal(np.diff(indices), [16] * 7)
        starts.add(int(indices[0]))
    assert starts == set(range(300 - 112))
    short = clip_indices(steady(50), 0.0, sampling)
    assert short.tolist() == [i * 16 % 50 for i in range(8)]
    held = Sampling(8, None, "repeat_last", "stride", 16)
    assert clip_indices(steady(50), 0.0, held).tolist() == [0, 16, 32, 48, 49, 49, 49, 49]
    spaced = view_starts(timeline.duration_s, sampling.span_s(timeline), 3, "spaced_inclusive")
    assert [int(clip_indices(timeline, s, sampling)[0]) for s in spaced] == [0, 94, 187]


def test_segments_give_one_frame_each() -> None:
    sampling = Sampling(4, index="segments")
    assert clip_indices(steady(40), 0.0, sampling).tolist() == [5, 15, 25, 35]
    assert clip_indices(steady(2), 0.0, sampling).tolist() == [0, 0, 1, 1]
    drawn = [clip_indices(steady(40), 0.0, sampling, np.random.default_rng(i)) for i in range(300)]
    assert all((picked // 10 == np.arange(4)).all() for picked in drawn)
    assert {int(picked[2]) for picked in drawn} == set(range(20, 30))
    assert sampling.span_s(steady(40)) == steady(40).duration_s


@pytest.mark.parametrize(
    "values",
    [(4, None), (4, 1.0, "loop", "stride"), (4, None, "stretch", "stride", 3), (4, 1.0, "loop", "segments")],
)
def test_incomplete_rules_are_refused(values: tuple) -> None:
    with pytest.raises(MdlError):
        Sampling(*values)
