"""Processes that look after one task at a time: a decoder that crashes or hangs costs its clip, not the run."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar

from mdltool.data.video import VideoError
from mdltool.errors import MdlError

Task = TypeVar("Task")
Done = TypeVar("Done")

_READY = "ready"
_TASKS_AHEAD = 8  # per worker
_ATTEMPTS = 2  # a worker may also fall to the memory another one used
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Failed:
    """A task that could not be done. reason: a short true sentence."""

    reason: str


@dataclass
class _Worker:
    process: ForkServerProcess
    connection: Connection


class Pool(Generic[Task, Done]):
    """Worker processes that apply one function to tasks.

    function: a module's function, of one argument. timeout_s: of one task; the kernel ends what runs longer, in
    whatever code it hangs, also when this process has died. A fork server starts the workers, so that neither
    threads nor open files of this process are copied. Use as a context manager.
    """

    def __init__(self, function: Callable[[Task], Done], count: int, timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([function.__module__])
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._ahead = _TASKS_AHEAD * count
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._started: list[_Worker] = []
        self._starting = threading.Lock()
        self._closed = False
        for _ in range(count):
            self._idle.put(None)

    def __enter__(self) -> Pool[Task, Done]:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._starting:
            self._closed = True
        for worker in list(self._started):
            worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._started:
            worker.process.join()
            worker.connection.close()

    def map(self, tasks: Iterable[Task]) -> Iterator[Done | Failed]:
        """The tasks' results in their order; some tasks are worked on ahead of the one that is asked for.

        Raises what concerns the whole run and not one task: OSError for a full disk, MdlError.
        """
        pending: deque[Future[Done | Failed]] = deque()
        for task in tasks:
            pending.append(self._threads.submit(self._run, task))
            if len(pending) > self._ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _run(self, task: Task) -> Done | Failed:
        worker = self._idle.get()
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                worker = worker or self._start()
                try:
                    worker.connection.send(task)
                    answer = worker.connection.recv()
                except (EOFError, ConnectionError):
                    reason, again = self._bury(worker)
                    worker = None
                    if self._closed or not again or attempt == _ATTEMPTS:
                        return Failed(reason)
                else:
                    if isinstance(answer, Exception):
                        raise answer
                    return answer
        finally:
            self._idle.put(worker)
        raise AssertionError("every attempt returns")

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._function, self._timeout_s), daemon=True)
        worker = _Worker(process, ours)
        with self._starting:
            if self._closed:
                raise CancelledError
            process.start()
            self._started.append(worker)
        theirs.close()
        try:
            ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f"a worker process did not start (exit code {process.exitcode})") from None
        return worker

    def _bury(self, worker: _Worker) -> tuple[str, bool]:
        """Why a worker died, and whether another attempt may end otherwise."""
        worker.process.join()
        worker.connection.close()
        self._started.remove(worker)
        code = worker.process.exitcode or 0
        if code == -signal.SIGALRM:
            return f"it takes longer than {self._timeout_s:g} s: the decoder hangs", False
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"the decoder crashed ({name})", True


def _serve(connection: Connection, function: Callable[[Any], Any], timeout_s: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, in whatever code it is
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(_READY)
        while True:
            task = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            answer = _answer(function, task)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(answer)


def _answer(function: Callable[[Any], Any], task: Any) -> Any:
    """The function's result, a Failed, or an exception that is not about this task alone."""
    try:
        return function(task)
    except VideoError as error:
        return Failed(error.reason)
    except MdlError as error:
        return error
    except Exception as error:
        if getattr(error, "errno", None) in _OUT_OF_SPACE:
            # FFmpeg's errors cannot be pickled
            return OSError(error.errno, error.strerror, getattr(error, "filename", None))  # type: ignore[attr-defined]
        return Failed(f"{type(error).__name__}: {error}")
