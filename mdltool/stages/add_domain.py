"""`add-domain`: a finished model + a new domain's shards -> model, everything old bit-identical."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from mdltool import console
from mdltool.artifact import Artifact, Draft, partial_path
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.model import MultiDomainModel
from mdltool.model_store import (
    extended,
    find_backbone,
    label_spaces,
    load_model,
    refuse_fused,
    seeded,
    stored_tensors,
    write_model_json,
)
from mdltool.registry import did_you_mean
from mdltool.source_adapters import begin_as_source
from mdltool.stages.continuing import alone, joined, settled
from mdltool.stages.fitting import Scope, fit, gather_data
from mdltool.stages.plan import completed, model_spec
from mdltool.stages.sources import with_sources
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import begin_together, open_together
from mdltool.types import LabelSpace


def run(
    source: Artifact,
    domain: str,
    shards: Iterable[Artifact],
    out: Path,
    *,
    work: Path,
    overrides: Sequence[str] = (),
    start_from: str | None = None,
    resume: bool = False,
    workers: int = 1,
) -> Artifact:
    """Train adapters, head and BatchNorm statistics of a new domain on a finished model, all else frozen.

    The training is the last step of the model's own recipe, with `overrides`. Raises MdlError for a domain that the
    model has, and for a start_from that it has not.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    _check(content, domain, start_from)
    shards = list(shards)
    recipe = settled(alone(content["recipe"], domain, _task(shards)), overrides, source)
    whole = joined(content["recipe"], recipe, domain, source)
    data = gather_data(recipe, shards)
    recipe = with_sources(recipe, data)
    given = (("model", source), ("train", data[domain].train), ("val", data[domain].val))
    inputs = [artifact.as_input(role) for role, artifact in given if artifact is not None]
    own = bool(content["own_backbone"])
    backbone = None if own else find_backbone(source, work)
    inputs += [backbone.as_input("backbone")] if backbone is not None else []
    request = {"recipe": recipe.model_dump(mode="json"), "start_from": start_from}
    world = join_world()
    how = "must" if resume else "ask"
    draft = begin_together(
        world,
        out,
        kind="model",
        stage="add-domain",
        inputs=inputs,
        request=request,
        resume=how,
        completed=completed,
    )
    if isinstance(draft, Artifact):
        return draft
    seeded(recipe.train.seed)
    names = data[domain].train_index.classes
    own_spec = model_spec(recipe, {domain: len(names)})
    with draft or nullcontext():
        old, streams = load_model(source, work=work), own_spec.streams.get(domain)
        model = extended(old, domain, len(names), start_from, own_spec.normalize, streams)
        if start_from is None:
            _begin(model, backbone, recipe.backbone.adapters, domain)
    scope = Scope(only=(f"{domain}/",))
    progress = fit(recipe, model, data, partial_path(out), own_backbone=own, workers=workers, scope=scope)
    if draft is not None:
        save_tensors(draft.path / "weights" / "last.safetensors", stored_tensors(model.to("cpu"), own))
        spaces = label_spaces(content) | {domain: data[domain].train_index.space}
        _commit(draft, model, whole, spaces, own, progress)
    return open_together(world, out, "model")


def _begin(model: MultiDomainModel, backbone: Artifact | None, choice: str, domain: str) -> None:
    """Begin the new domain's adapters as the backbone's own, or fresh where the backbone is the model's own.

    Filters that were trained with the model's domains are no longer those that the source's adapters go with.
    """
    begin_as_source(model, backbone, choice, [domain])
    if backbone is None and model.sites:
        console.say(
            f"{domain}: its adapters begin fresh, since the backbone was trained with the model's domains; "
            "--init-from DOMAIN begins them as another domain's"
        )


def _commit(
    draft: Draft,
    model: MultiDomainModel,
    recipe: dict[str, Any],
    spaces: dict[str, LabelSpace],
    own_backbone: bool,
    progress: Progress,
) -> None:
    write_model_json(draft.path, model.spec, recipe, spaces, own_backbone, model.parameter_counts())
    write_text(draft.path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    summary = {
        "recipe": recipe["name"],
        "added": list(spaces)[-1],
        "domains": {name: {"classes": len(space.classes)} for name, space in spaces.items()},
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "val": progress.last_scores,
    }
    draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints",))


def _check(content: dict[str, Any], domain: str, start_from: str | None) -> None:
    domains = content["domains"]
    if domain in domains:
        raise MdlError(f"the model has a domain '{domain}' already", "--data", "give the new domain another name")
    if start_from is not None and start_from not in domains:
        raise MdlError(f"the model has no domain '{start_from}'", "--init-from", did_you_mean(start_from, domains))


def _task(shards: Sequence[Artifact]) -> str:
    """The task of the new domain; where its shards differ in it, gather_data refuses them."""
    return ShardIndex.open(shards[0]).task if shards else "single_label"
