"""`train`: shards + backbone -> model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from mdltool.artifact import Artifact, Draft
from mdltool.model import MultiDomainModel, build_model, reuse_classifier
from mdltool.model_spec import ModelSpec
from mdltool.model_store import (
    backbone_with_weights,
    changes_backbone,
    choose_backbone,
    seeded,
    write_description,
)
from mdltool.schema import Recipe
from mdltool.source_adapters import begin_as_source, check_source_adapters
from mdltool.stages.fitting import gather_data
from mdltool.stages.making import (
    commit_model,
    data_inputs,
    make_model,
    progress_summary,
    trained,
)
from mdltool.stages.plan import check, model_spec
from mdltool.stages.sources import with_sources


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
    spaces = {name: d.train_index.space for name, d in data.items()}
    request = recipe.model_dump(mode="json")

    def make(draft: Draft | None) -> None:
        seeded(recipe.train.seed)
        with draft or nullcontext():
            model = _initial(recipe, spec, source, {name: space.classes for name, space in spaces.items()})
        regimes: set[str] = {step.regime for step in recipe.train.steps}
        # Random weights have no artifact to point at, so they are stored whatever the regime.
        own = source is None or changes_backbone(regimes, spec.bn)
        progress = trained(recipe, model, data, out, own_backbone=own, workers=workers)
        if draft is not None:
            summary = write_description(draft.path, spec, request, spaces, own, model.parameter_counts())
            for name, about in summary["domains"].items():
                about["clips"] = len(data[name].train_index)
            commit_model(draft, summary | progress_summary(progress))

    inputs = data_inputs(data) + ([source.as_input("backbone")] if source is not None else [])
    return make_model(out, make, stage="train", inputs=inputs, request=request, resume=resume)


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
