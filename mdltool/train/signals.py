"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 ask for a checkpoint after the current update. Yields "was there one?"."""
    caught: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, lambda received, _: caught.append(received))
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
