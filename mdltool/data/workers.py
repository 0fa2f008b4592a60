"""Processes that look after one task at a time: a decoder that crashes or hangs costs its clip, not the run."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from mdltool.data.video import VideoError
from mdltool.errors import MdlError

Task = TypeVar("Task")
Done = TypeVar("Done")

_READY = "ready"
_QUEUED = 4  # tasks that lie ready at each worker, so that none waits while this process writes
_AHEAD = 8  # finished or begun tasks per worker beyond the one that is asked for
_ATTEMPTS = 2  # a worker may also fall to the memory another one used
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Failed:
    """A task that could not be done. reason: a short true sentence."""

    reason: str


@dataclass(frozen=True)
class _Numbered(Generic[Task]):
    number: int
    task: Task
    attempt: int = 1


@dataclass
class _Worker(Generic[Task]):
    """A process and what it was sent and has not answered; it answers in order."""

    process: BaseProcess
    connection: Connection
    sent: deque[_Numbered[Task]] = field(default_factory=deque)


@dataclass
class _Order(Generic[Task, Done]):
    """One pass over tasks. handed, asked: the numbers of the next task to begin and of the next result to give."""

    tasks: Iterator[Task]
    handed: int = 0
    asked: int = 0
    again: deque[_Numbered[Task]] = field(default_factory=deque)
    results: dict[int, Done | Failed] = field(default_factory=dict)

    def next(self, ahead: int) -> _Numbered[Task] | None:
        """The next task, unless all are begun, or `ahead` of them beyond the one asked for."""
        if self.again:
            return self.again.popleft()
        if self.handed - self.asked >= ahead:
            return None
        for task in self.tasks:
            self.handed += 1
            return _Numbered(self.handed - 1, task)
        return None


class Pool(Generic[Task, Done]):
    """Worker processes that apply one function to tasks.

    function: a module's function, of one argument. limit_s: the seconds that a task may take; the kernel ends what
    runs longer, in whatever code it hangs, also when this process has died. A fork server starts the workers, so
    that neither threads nor open files of this process are copied. preload: what it imports once for all of them.
    Use as a context manager.
    """

    def __init__(
        self,
        function: Callable[[Task], Done],
        count: int,
        limit_s: Callable[[Task], float],
        preload: Sequence[str] = (),
    ) -> None:
        self._function = function
        self._count = count
        self._limit_s = limit_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([function.__module__, *preload])
        forkserver.ensure_running()  # it loads the module while this process goes on
        self._workers: list[_Worker[Task]] = []

    def __enter__(self) -> Pool[Task, Done]:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def map(self, tasks: Iterable[Task]) -> Iterator[Done | Failed]:
        """The tasks' results in their order; some tasks are worked on ahead of the one that is asked for.

        Raises what concerns the whole run and not one task: OSError for a full disk, MdlError.
        """
        order: _Order[Task, Done] = _Order(iter(tasks))
        while True:
            self._hand_out(order)
            waiting = order.asked not in order.results
            if waiting and not any(worker.sent for worker in self._workers):
                return
            self._collect(order, None if waiting else 0)
            if order.asked in order.results:
                yield order.results.pop(order.asked)
                order.asked += 1

    def _hand_out(self, order: _Order[Task, Done]) -> None:
        """Send tasks until every worker has enough, the shortest queue first."""
        while True:
            worker = min(self._workers, key=lambda w: len(w.sent), default=None)
            if (worker is None or worker.sent) and len(self._workers) < self._count:
                worker = None
            if worker is not None and len(worker.sent) >= _QUEUED:
                return
            item = order.next(_AHEAD * self._count)
            if item is None:
                return
            worker = worker or self._start()
            worker.sent.append(item)
            with contextlib.suppress(ConnectionError):  # a death is noticed when the answers are collected
                worker.connection.send((item.task, self._limit_s(item.task)))

    def _collect(self, order: _Order[Task, Done], timeout_s: float | None) -> None:
        """Take the answers that are there, or wait for one."""
        connections = {worker.connection: worker for worker in self._workers if worker.sent}
        for connection in wait(list(connections), timeout_s):
            worker = connections[connection]  # type: ignore[index]
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionError):
                self._bury(worker, order)
                continue
            if isinstance(answer, Exception):
                raise answer
            order.results[worker.sent.popleft().number] = answer

    def _start(self) -> _Worker[Task]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()
        worker: _Worker[Task] = _Worker(process, ours)
        self._workers.append(worker)
        try:
            ours.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise RuntimeError(f"a worker process did not start (exit code {process.exitcode})") from None
        return worker

    def _bury(self, worker: _Worker[Task], order: _Order[Task, Done]) -> None:
        """Blame a worker's death on the task it had in hand; the others go to another worker."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        culprit = worker.sent.popleft()
        code = worker.process.exitcode or 0
        if code == -signal.SIGALRM:
            limit_s = self._limit_s(culprit.task)
            order.results[culprit.number] = Failed(f"it takes longer than {limit_s:.0f} s: the decoder hangs")
        elif culprit.attempt < _ATTEMPTS:
            worker.sent.appendleft(replace(culprit, attempt=culprit.attempt + 1))
        else:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            order.results[culprit.number] = Failed(f"the decoder crashed ({name})")
        order.again.extend(worker.sent)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, in whatever code it is
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(_READY)
        while True:
            task, limit_s = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, limit_s)
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
        code = getattr(error, "errno", None)
        if code in OUT_OF_SPACE:  # FFmpeg's own exceptions cannot be pickled
            return OSError(code, os.strerror(code), getattr(error, "filename", None))
        return Failed(f"{type(error).__name__}: {error}")
