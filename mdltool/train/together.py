"""One artifact that several processes make: rank 0 builds it, the others work along and wait until it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mdltool.artifact import Artifact, Completed, Draft, Input, begin, open_artifact
from mdltool.errors import Elsewhere, MdlError
from mdltool.train.distributed import World, broadcast_object

T = TypeVar("T")


def begin_together(
    world: World,
    out: Path,
    *,
    kind: str,
    stage: str,
    inputs: Iterable[Input],
    request: Mapping[str, Any],
    resume: str = "never",
    completed: Completed = dict,
) -> Artifact | Draft | None:
    """`begin` on rank 0 alone, for its lock admits one process.

    Returns the artifact on every rank where it is there already; else rank 0's draft, and None on the others, which
    read and write below `partial_path(out)` once this returns. Raises rank 0's MdlError on every rank, so that none
    is left waiting.
    """
    draft: Artifact | Draft | None = None
    fault: MdlError | None = None
    if world.is_main:
        try:
            draft = begin(
                out, kind=kind, stage=stage, inputs=inputs, request=request, resume=resume, completed=completed
            )
        except MdlError as error:
            fault = error
    fault, whole = broadcast_object((fault, isinstance(draft, Artifact)), world)
    if fault is not None:
        raise fault if world.is_main else Elsewhere(str(fault))
    return open_artifact(out, kind) if whole else draft


def by_main(world: World, work: Callable[[], T]) -> T:
    """What rank 0 makes, plain values, on every rank. Raises rank 0's MdlError on every rank."""
    made: T | None = None
    fault: MdlError | None = None
    if world.is_main:
        try:
            made = work()
        except MdlError as error:
            fault = error
    fault, made = broadcast_object((fault, made), world)
    if fault is not None:
        raise fault if world.is_main else Elsewhere(str(fault))
    return made


def open_together(world: World, out: Path, kind: str) -> Artifact:
    """The artifact that rank 0 has just committed, on every rank."""
    broadcast_object(None, world)
    return open_artifact(out, kind)
