"""`add-domain`: a finished model + a new domain's shards -> model, everything old bit-identical."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact, Draft
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel
from mdltool.model_store import (
    extended,
    find_backbone,
    label_spaces,
    load_model,
    refuse_fused,
    seeded,
    write_description,
)
from mdltool.registry import did_you_mean
from mdltool.source_adapters import begin_as_source
from mdltool.stages.continuing import alone, joined, settled
from mdltool.stages.fitting import Scope, gather_data
from mdltool.stages.making import commit_model, inputs_of, make_model, progress_summary, trained
from mdltool.stages.plan import model_spec
from mdltool.stages.sources import with_sources


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
    own = bool(content["own_backbone"])
    backbone = None if own else find_backbone(source, work)

    def make(draft: Draft | None) -> None:
        seeded(recipe.train.seed)
        space = data[domain].train_index.space
        own_spec = model_spec(recipe, {domain: len(space.classes)})
        with draft or nullcontext():
            old, streams = load_model(source, work=work), own_spec.streams.get(domain)
            model = extended(old, domain, len(space.classes), start_from, own_spec.normalize, streams)
            if start_from is None:
                _begin(model, backbone, recipe.backbone.adapters, domain)
        scope = Scope(only=(f"{domain}/",))
        progress = trained(recipe, model, data, out, own_backbone=own, workers=workers, scope=scope)
        if draft is not None:
            spaces = label_spaces(content) | {domain: space}
            summary = write_description(draft.path, model.spec, whole, spaces, own, model.parameter_counts())
            commit_model(draft, summary | {"added": domain} | progress_summary(progress))

    inputs = inputs_of(source, data, work)
    request = {"recipe": recipe.model_dump(mode="json"), "start_from": start_from}
    return make_model(out, make, stage="add-domain", inputs=inputs, request=request, resume=resume)


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


def _check(content: dict[str, Any], domain: str, start_from: str | None) -> None:
    domains = content["domains"]
    if domain in domains:
        raise MdlError(f"the model has a domain '{domain}' already", "--data", "give the new domain another name")
    if start_from is not None and start_from not in domains:
        raise MdlError(f"the model has no domain '{start_from}'", "--init-from", did_you_mean(start_from, domains))


def _task(shards: Sequence[Artifact]) -> str:
    """The task of the new domain; where its shards differ in it, gather_data refuses them."""
    return ShardIndex.open(shards[0]).task if shards else "single_label"
