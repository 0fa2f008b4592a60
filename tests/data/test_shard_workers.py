"""Worker processes: order, crashes, hangs, and faults that concern the whole run."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from mdltool.data.video import VideoError
from mdltool.data.workers import Failed, Pool
from mdltool.errors import MdlError

TIMEOUT_S = 1.0


def work(task: tuple[str, str]) -> str:
    """Does what its task says, in a worker."""
    kind, text = task
    if kind == "sleep":
        time.sleep(float(text))
    elif kind == "hang":
        while True:  # as a decoder in C, it does not look at signals that Python handles
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
            time.sleep(60)
    elif kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "crash once":
        marker = Path(text)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(3)
    elif kind == "unusable":
        raise VideoError(text)
    elif kind == "defect":
        raise ZeroDivisionError(text)
    elif kind == "full disk":
        raise OSError(errno.ENOSPC, "full", text)
    elif kind == "fault":
        raise MdlError(text, "here", "mend it")
    return f"{kind} {text}"


def run(tasks: list[tuple[str, str]], workers: int = 2) -> list[str | Failed]:
    with Pool(work, workers, lambda task: TIMEOUT_S) as pool:
        return list(pool.map(tasks))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_whoever_is_faster(workers: int) -> None:
    tasks = [("sleep", str(0.05 * (number % 3 == 0))) for number in range(30)]
    assert run(tasks, workers) == [f"sleep {text}" for _, text in tasks]


def test_no_tasks_and_a_pool_used_twice() -> None:
    assert run([]) == []
    with Pool(work, 2, lambda task: TIMEOUT_S) as pool:
        assert list(pool.map([("a", "1")])) == ["a 1"]
        assert list(pool.map([("b", "2"), ("c", "3")])) == ["b 2", "c 3"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_costs_its_task_only(workers: int) -> None:
    tasks = [("ok", str(number)) for number in range(12)]
    tasks[3], tasks[7] = ("crash", ""), ("exit", "")
    results = run(tasks, workers)
    assert results[3] == Failed("the decoder crashed (SIGSEGV)")
    assert results[7] == Failed("the decoder crashed (exit code 3)")
    assert [r for r in results if not isinstance(r, Failed)] == [f"ok {n}" for n in range(12) if n not in (3, 7)]


def test_a_worker_that_was_killed_gets_another_chance(tmp_path: Path) -> None:
    assert run([("crash once", str(tmp_path / "marker"))]) == [f"crash once {tmp_path / 'marker'}"]


def test_a_hang_ends_and_costs_its_task_only() -> None:
    results = run([("ok", "1"), ("hang", ""), ("ok", "2"), ("ok", "3")], workers=1)
    assert results == ["ok 1", Failed("it takes longer than 1 s: the decoder hangs"), "ok 2", "ok 3"]


def test_reasons_of_unusable_tasks() -> None:
    results = run([("unusable", "no video stream"), ("defect", "oops")])
    assert results == [Failed("no video stream"), Failed("ZeroDivisionError: oops")]


def test_faults_of_the_whole_run_are_raised() -> None:
    with pytest.raises(OSError, match="No space left") as full:
        run([("ok", "1"), ("full disk", "/disk/file")])
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/disk/file")
    with pytest.raises(MdlError, match="broken") as fault:
        run([("fault", "broken")])
    assert (fault.value.where, fault.value.fix) == ("here", "mend it")


def test_no_process_is_left_when_the_caller_gives_up() -> None:
    with Pool(work, 2, lambda task: TIMEOUT_S) as pool:
        results = pool.map([("sleep", "0"), ("hang", ""), ("hang", "")])
        assert next(results) == "sleep 0"
        processes = [worker.process for worker in pool._workers]
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


def test_only_so_many_tasks_are_begun_ahead() -> None:
    begun = []

    def tasks() -> object:
        for number in range(500):
            begun.append(number)
            yield ("ok", str(number))

    with Pool(work, 2, lambda task: TIMEOUT_S) as pool:
        results = pool.map(tasks())
        next(results)
        time.sleep(0.2)
        assert len(begun) < 50
        assert sum(1 for _ in results) == 499
