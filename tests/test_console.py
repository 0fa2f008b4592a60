"""The progress of a run that an earlier one began."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from mdltool import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 10 s after the one before."""
    ticks: Iterator[int] = count(0, 10)
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(ticks)))


def test_the_rate_and_the_time_left_are_of_this_run_alone(clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 1500, "updates", before=400) as advance:
        advance(20)
        advance(20, "loss 0.5")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "train: 420/1500 updates, 2.0 updates/s, 540 s left"
    assert second == "train: 440/1500 updates, 2.0 updates/s, 530 s left loss 0.5"


def test_without_a_total_no_time_is_left(clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("download x", None, "MB", before=7) as advance:
        advance(5)
    assert capsys.readouterr().err == "download x: 12/? MB, 0.5 MB/s\n"
