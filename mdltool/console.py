"""All printing. Results go to stdout, everything else to stderr. The only module that imports rich."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mdltool.artifact import Artifact

_PLAIN_SECONDS = 10.0  # between progress lines where stderr is not a terminal


def _stderr() -> Console:
    from rich.console import Console

    # soft_wrap keeps paths whole where a log file has no width
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def _is_first() -> bool:
    """Of several processes the first speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One line for the user, on stderr."""
    if _is_first():
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One warning line, on stderr."""
    say(f"warning: {message}")


def result(text: str) -> None:
    """A result, on stdout, with nothing around it."""
    if _is_first():
        print(text, flush=True)


def result_json(value: Any) -> None:
    """One JSON object on stdout."""
    result(json.dumps(value, indent=1, ensure_ascii=False))


def emit(artifact: Artifact, as_json: bool) -> None:
    """A stage's result: its artifact's path alone, or with --json one object."""
    if as_json:
        result_json(
            {
                "artifact": str(artifact.path),
                "kind": artifact.kind,
                "digest": artifact.digest,
                "summary": artifact.summary,
            }
        )
    else:
        result(str(artifact.path))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], to_stdout: bool = False) -> None:
    """A table; numbers are right-aligned. to_stdout: it is the command's result (describe, recipe list)."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left")
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    for name, right in zip(columns, numeric, strict=True):
        grid.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*("" if cell is None else str(cell) for cell in row))
    stream = sys.stdout if to_stdout else sys.stderr
    # markup off: brackets in a cell are text (mdltool[flow], a class of that name)
    Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 160).print(grid)


def _is_number(cell: Any) -> bool:
    text = str(cell if cell is not None else "").strip().rstrip("%")
    return text in ("", "-") or text.replace(",", "").replace(".", "").lstrip("+-").isdigit()


@contextmanager
def progress(label: str, total: int | None, unit: str = "clips", before: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left; plain lines where stderr is not a terminal.

    before: how many of the total an earlier run did, which the rate leaves out. Yields `advance(n=1, note="")`.
    """
    if not _is_first():
        yield lambda n=1, note="": None
    elif sys.stderr.isatty():
        with _rich_progress(label, total, unit, before) as advance:
            yield advance
    else:
        with _plain_progress(label, total, unit, before) as advance:
            yield advance


@contextmanager
def _rich_progress(label: str, total: int | None, unit: str, before: int) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=_stderr(), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=before, rate="", note="")
        started, done = time.monotonic(), 0

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:.1f} {unit}/s", note=note)

        yield advance


@contextmanager
def _plain_progress(label: str, total: int | None, unit: str, before: int) -> Iterator[Callable[..., None]]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            rate = done / (now - started)
            reached = before + done
            left = f", {(total - reached) / rate:.0f} s left" if total and rate else ""
            say(f"{label}: {reached}/{total or '?'} {unit}, {rate:.1f} {unit}/s{left} {note}".rstrip())

    yield advance
