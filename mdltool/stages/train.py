"""`train`: shards + backbone -> model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from mdltool.artifact import Artifact, Draft, partial_path
from mdltool.files import write_text
from mdltool.model import MultiDomainModel, build_model, reuse_classifier
from mdltool.model_spec import ModelSpec
from mdltool.model_store import (
    backbone_with_weights,
    changes_backbone,
    choose_backbone,
    seeded,
    stored_tensors,
    write_model_json,
)
from mdltool.schema import Recipe
from mdltool.source_adapters import begin_as_source, check_source_adapters
from mdltool.stages.fitting import DomainData, fit, gather_data
from mdltool.stages.plan import check, completed, model_spec
from mdltool.stages.sources import with_sources
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import begin_together, open_together


def run(
    recipe: Recipe,
    shards: Iterable[Artifact],
    backbone: Artifact | None,
    out: Path,
    *,
    work: Path,
    resume: bool = False,
    workers: int = 1,
) -> Artifact:
    """Train a recipe's model on shards; an interrupted run is continued with `resume`."""
    check(recipe)
    data = gather_data(recipe, shards)
    recipe = with_sources(recipe, data)
    spec = model_spec(recipe, {name: len(d.train_index.classes) for name, d in data.items()})
    source = choose_backbone(backbone, work, spec, recipe.backbone.weights)
    check_source_adapters(spec, source, recipe.backbone.adapters)
    inputs = [d.train.as_input("train") for d in data.values()]
    inputs += [d.val.as_input("val") for d in data.values() if d.val is not None]
    inputs += [source.as_input("backbone")] if source is not None else []
    world = join_world()
    request, how = recipe.model_dump(mode="json"), "must" if resume else "ask"
    draft = begin_together(
        world, out, kind="model", stage="train", inputs=inputs, request=request, resume=how, completed=completed
    )
    if isinstance(draft, Artifact):
        return draft
    seeded(recipe.train.seed)
    spaces = {name: d.train_index.space for name, d in data.items()}
    with draft or nullcontext():
        model = _initial(recipe, spec, source, {name: space.classes for name, space in spaces.items()})
    regimes: set[str] = {step.regime for step in recipe.train.steps}
    # Random weights have no artifact to point at, so they are stored whatever the regime.
    own_backbone = source is None or changes_backbone(regimes, spec.bn)
    progress = fit(recipe, model, data, partial_path(out), own_backbone=own_backbone, workers=workers)
    if draft is not None:
        model.to("cpu")
        save_tensors(draft.path / "weights" / "last.safetensors", stored_tensors(model, own_backbone))
        counts = model.parameter_counts()
        write_model_json(draft.path, spec, request, spaces, own_backbone, counts)
        write_text(draft.path / "recipe.yaml", yaml.safe_dump(request, sort_keys=False))
        _commit(draft, recipe, data, progress, counts)
    return open_together(world, out, "model")


def _initial(
    recipe: Recipe, spec: ModelSpec, source: Artifact | None, classes: Mapping[str, Sequence[str]]
) -> MultiDomainModel:
    """The model before training, with what it takes over from its backbone's."""
    model = build_model(spec, backbone_with_weights(spec, source))
    if recipe.heads.reuse_pretrained and source is not None:
        pretrained = source.load_json("backbone.json").get("classes", [])
        reuse_classifier(model, {n: list(c) for n, c in classes.items()}, pretrained)
    begin_as_source(model, source, recipe.backbone.adapters, spec.domains)
    return model


def _commit(
    draft: Draft, recipe: Recipe, data: dict[str, DomainData], progress: Progress, counts: dict[str, Any]
) -> Artifact:
    summary = {
        "recipe": recipe.name,
        "domains": {
            name: {"classes": len(d.train_index.classes), "clips": len(d.train_index)} for name, d in data.items()
        },
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "best_step": progress.best_update,
        "updates_to_best": progress.best_update,
        "seconds_to_best": None if progress.best_seconds is None else round(progress.best_seconds, 2),
        "val": progress.last_scores,
        "parameters": {key: value for key, value in counts.items() if key != "per_domain"},
    }
    return draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints",))
