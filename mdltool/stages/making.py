"""How stages make a model artifact: what it is made from, its files, and what its summary says. No stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdltool.artifact import Artifact, Draft, Input, partial_path
from mdltool.model import MultiDomainModel
from mdltool.model_store import find_backbone, stored_tensors
from mdltool.schema import Recipe
from mdltool.stages.fitting import DomainData, Scope, fit
from mdltool.stages.plan import completed
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import make_together


def make_model(
    out: Path,
    make: Callable[[Draft | None], object],
    *,
    stage: str,
    inputs: Sequence[Input],
    request: Mapping[str, Any],
    resume: bool | None,
) -> Artifact:
    """`make_together` of a model. resume: whether an interrupted run is to go on; None: nothing of it could."""
    return make_together(
        out,
        make,
        kind="model",
        stage=stage,
        inputs=inputs,
        request=request,
        resume="never" if resume is None else "must" if resume else "ask",
        completed=completed,
    )


def data_inputs(data: Mapping[str, DomainData]) -> list[Input]:
    """The shards that a model is trained and validated on."""
    train = [part.train.as_input("train") for part in data.values()]
    return train + [part.val.as_input("val") for part in data.values() if part.val is not None]


def inputs_of(
    source: Artifact, data: Mapping[str, DomainData] | None, work: Path, others: Sequence[Artifact] = ()
) -> list[Input]:
    """What a model is made from that another one, `source`, becomes. data: None where nothing is trained, and the
    backbone, which is not needed then, may be anywhere.
    """
    inputs = [source.as_input("model"), *(other.as_input("domain") for other in others)]
    inputs += data_inputs(data or {})
    if source.load_json("model.json")["own_backbone"]:
        return inputs
    if data is not None:
        return [*inputs, find_backbone(source, work).as_input("backbone")]
    return [*inputs, *(entry for entry in source.inputs if entry.role == "backbone")]


def trained(
    recipe: Recipe,
    model: MultiDomainModel,
    data: dict[str, DomainData],
    out: Path,
    *,
    own_backbone: bool,
    workers: int,
    scope: Scope | None = None,
) -> Progress:
    """Train a model in the draft of `out`, to which rank 0 writes the last weights."""
    folder = partial_path(out)
    progress = fit(recipe, model, data, folder, own_backbone=own_backbone, workers=workers, scope=scope)
    if join_world().is_main:
        tensors = stored_tensors(model.to("cpu"), own_backbone)
        save_tensors(folder / "weights" / "last.safetensors", tensors)
    return progress


def progress_summary(progress: Progress | None) -> dict[str, Any]:
    """What the summary says of a training, if there was one."""
    if progress is None:
        return {}
    return {
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "best_step": progress.best_update,
        "updates_to_best": progress.best_update,
        "seconds_to_best": None if progress.best_seconds is None else round(progress.best_seconds, 2),
        "val": progress.last_scores,
    }


def commit_model(draft: Draft, summary: Mapping[str, Any], drop: Sequence[str] = ()) -> Artifact:
    """Make the artifact whole. drop: working files beside the checkpoints."""
    return draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints", *drop))
