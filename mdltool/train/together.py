"""One artifact that several processes make: rank 0 builds it, the others work along and wait until it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mdltool.artifact import Artifact, Completed, Draft, Input, begin, open_artifact
from mdltool.errors import Elsewhere, MdlError
from mdltool.train.distributed import World, broadcast_object, join_world

T = TypeVar("T")


def make_together(
    out: Path,
    make: Callable[[Draft | None], object],
    *,
    kind: str,
    stage: str,
    inputs: Iterable[Input],
    request: Mapping[str, Any],
    resume: str = "never",
    completed: Completed = dict,
) -> Artifact:
    """The artifact `out` on every rank: the one that is there already, or what `make` commits.

    make: run on every rank, on rank 0 with the draft and on the others with None; they read and write below
    `partial_path(out)`. The rest is `begin`'s, which rank 0 alone runs, for its lock admits one process. Raises
    begin's MdlError on every rank, so that none is left waiting.
    """
    world = join_world()
    kept: dict[str, Draft] = {}

    def is_whole() -> bool:
        begun = begin(
            out, kind=kind, stage=stage, inputs=inputs, request=request, resume=resume, completed=completed
        )
        if isinstance(begun, Draft):
            kept["draft"] = begun
        return isinstance(begun, Artifact)

    if not by_main(world, is_whole):
        make(kept.get("draft"))
        broadcast_object(None, world)  # rank 0 has committed it
    return open_artifact(out, kind)


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
