"""Items of a data set made ahead by worker processes, in the order of the requests."""

from __future__ import annotations

import atexit
import functools
import math
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mdltool import console
from mdltool.errors import MdlError

# The trainer decides when to stop; workers end with it.
_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Answers(Dataset[Any]):
    """Another data set, whose MdlError comes as a value: DataLoader would replace it by its traceback's text."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.dataset[request]
        except MdlError as error:
            return error


def load_ahead(dataset: Dataset[Any], requests: Iterable[Any], workers: int) -> Iterator[Any]:
    """dataset[request] of every request. Raises the MdlError of the first that has one, when its turn comes."""
    loader = DataLoader(
        _Answers(dataset),
        batch_size=None,  # each request is a whole item, made in one worker
        sampler=requests,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        collate_fn=_unchanged,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # else iterating draws from the global one, which training has to keep exact
    )
    items, processes = _started(loader)
    end = functools.partial(_kill, processes)
    # An exception on its way out keeps this generator alive, and Python would wait for what ignores its SIGTERM.
    atexit.register(end)
    try:
        for item in items:
            if isinstance(item, MdlError):
                raise item
            yield item
    finally:
        del items  # asks the workers to end
        end()  # one that hangs in a video does not
        atexit.unregister(end)


def _started(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The loader's iterator and its workers."""
    others = set(multiprocessing.active_children())
    # Blocked until the workers have started, who inherit that: a signal must not find one before it ignores it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        items = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return items, [child for child in multiprocessing.active_children() if child not in others]


def end_workers() -> None:
    """Kill the workers that are left; for a process that ends without its exit handlers."""
    _kill(multiprocessing.active_children())


def _kill(processes: Sequence[BaseProcess]) -> None:
    alive = [process for process in processes if process.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a fault
    for process in alive:
        process.kill()


def empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor; in a worker in shared memory, so that it is not copied on its way out."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    for number in _TRAINERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def usable(workers: int, work: int, unit: str) -> int:
    """Workers that get something to do; the rest is not started."""
    if workers > work:
        _announce_idle(workers - work, workers, work, unit)
    return min(workers, work)


@functools.cache
def _announce_idle(idle: int, workers: int, work: int, unit: str) -> None:
    # Cached: once for a number of workers, not at every validation.
    console.say(f"{idle} of {workers} workers have nothing to read ({work} {unit}) and idle")
