"""`compress --extend`: a domain of another model onto a compressed model's shared factors -> model (spec
residual_adapters 2.5, last paragraph).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool import console
from mdltool.adapters.factored import FactorSpec
from mdltool.artifact import Artifact, Draft
from mdltool.compress.factoring import SiteWeight, extended_factors, site_weights
from mdltool.domain_pack import model_form
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.model import build_model
from mdltool.model_spec import ModelSpec
from mdltool.model_store import WEIGHTS, label_spaces, refuse_fused, write_description
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.compression import (
    Finetune,
    finetuned,
    read_model_tensors,
    sizes,
    training_of,
)
from mdltool.stages.continuing import alone, joined, recipe_of
from mdltool.stages.fitting import Scope
from mdltool.stages.making import commit_model, inputs_of, make_model, progress_summary
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import join_world
from mdltool.train.together import by_main

_START = "start.safetensors"


def run(
    source: Artifact,
    other: Artifact,
    domain: str | None,
    out: Path,
    *,
    work: Path,
    grow: int = 0,
    finetune: Finetune | None = None,
) -> Artifact:
    """Add a domain, with the other model's adapters fitted to the shared factors by least squares.

    domain: None for the only one that the source has not. grow: as many more components at every weight, for what
    the shared factors cannot hold; the old domains have zeros there. finetune: of the new domain alone. Raises
    MdlError for a source that is not compressed, and another model that is not of the same form and backbone.
    """
    job = _job(source, other, domain, grow)
    stored = job.new["recipe"]
    task = stored["domains"][job.domain]["task"]
    own = alone(job.old["recipe"], job.domain, task)
    part = recipe_of(Recipe.model_validate(stored), job.domain)
    own |= {"domains": {job.domain: part["domain"]}, "streams": part.get("streams", {})}
    recipe = joined(job.old["recipe"], Recipe.model_validate(own), job.domain, source)
    training = training_of(own, job.new["domains"], finetune, source)
    request = {
        "domain": job.domain,
        "grow": grow,
        "finetune": training.recipe.model_dump(mode="json") if training is not None else None,
    }
    own_backbone = bool(job.old["own_backbone"])

    def make(draft: Draft | None) -> None:
        progress = None
        with draft or nullcontext():
            spec, table = by_main(join_world(), lambda: _extend(job, draft, training is None))
        if training is not None:
            scope = Scope(only=(f"{job.domain}/",))
            progress = finetuned(spec, _START, source, training, scope, out, work)
        if draft is not None:
            spaces = label_spaces(job.old) | {job.domain: label_spaces(job.new)[job.domain]}
            write_text(draft.path / "extension.json", json.dumps({"weights": table}, indent=1))
            summary = write_description(draft.path, spec, recipe, spaces, own_backbone, sizes(spec))
            summary |= {"added": job.domain, "grown": grow, "lost": lost(table), **progress_summary(progress)}
            commit_model(draft, summary, drop=(_START,))

    data, resume = (training.data, training.resume) if training is not None else (None, None)
    inputs = inputs_of(source, data, work, [other])
    return make_model(out, make, stage="compress --extend", inputs=inputs, request=request, resume=resume)


@dataclass(frozen=True)
class _Job:
    """old, new: what model.json of the two models says."""

    source: Artifact
    other: Artifact
    domain: str
    grow: int
    old: Mapping[str, Any]
    new: Mapping[str, Any]


def _job(source: Artifact, other: Artifact, domain: str | None, grow: int) -> _Job:
    old, new = source.load_json("model.json"), other.load_json("model.json")
    for content, artifact in ((old, source), (new, other)):
        refuse_fused(content, artifact.path)
    spec, theirs = ModelSpec.from_json(old["spec"]), ModelSpec.from_json(new["spec"])
    if not spec.factors:
        raise MdlError("this model is not compressed", source.path, "mdltool compress it first, or add-domain")
    if grow and all(factor.independent for site in spec.factors.values() for factor in site.values()):
        raise MdlError("its domains share no factors that could grow", source.path, "leave out --grow")
    if theirs.factors:
        raise MdlError("the domain's adapters are compressed already", other.path, "give the model before that")
    if model_form(replace(spec, factors={})) != model_form(theirs):
        what = "the two models differ in more than their domains (backbone, adapters, BatchNorms or heads)"
        raise MdlError(what, other.path, "train the new domain with the recipe of the first")
    added = [name for name in theirs.domains if name not in spec.domains]
    if domain is None and len(added) != 1:
        what = (
            f"{len(added)} of its domains are new ({', '.join(added)})" if added else "none of its domains is new"
        )
        raise MdlError(what, other.path, "--extend MODEL:DOMAIN")
    domain = domain or added[0]
    if domain in spec.domains:
        raise MdlError(f"the model has a domain '{domain}' already", source.path, "extend it by another")
    if domain not in theirs.domains:
        raise MdlError(f"the model has no domain '{domain}'", other.path, did_you_mean(domain, theirs.domains))
    _check_backbone(source, other, old, new)
    return _Job(source, other, domain, grow, old, new)


def _check_backbone(source: Artifact, other: Artifact, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Of models that name their backbone; what models hold themselves is compared tensor by tensor."""
    digests = [[e.digest for e in artifact.inputs if e.role == "backbone"] for artifact in (source, other)]
    if old["own_backbone"] != new["own_backbone"] or (not old["own_backbone"] and digests[0] != digests[1]):
        raise _another_backbone(other)


def _another_backbone(other: Artifact) -> MdlError:
    what = "the domain was trained on another backbone, or beside other shared layers"
    return MdlError(what, other.path, "train it on the backbone of the compressed model")


def _extend(job: _Job, draft: Draft | None, final: bool) -> tuple[ModelSpec, list[dict[str, Any]]]:
    """Write the extended tensors into the draft: of each kind of weights that both have, or of the last alone."""
    assert draft is not None, "rank 0 has the draft"
    spec, theirs = ModelSpec.from_json(job.old["spec"]), ModelSpec.from_json(job.new["spec"])
    with torch.device("meta"):
        weights = {weight.name: weight for weight in site_weights(build_model(theirs))}
    table: list[dict[str, Any]] = []
    factors = {site: dict(entries) for site, entries in spec.factors.items()}
    names = [n for n in WEIGHTS if all(f"weights/{n}.safetensors" in a.files for a in (job.source, job.other))]
    for name in names if final else names[:1]:
        tensors, dense = (read_model_tensors(a, s, name) for a, s in ((job.source, spec), (job.other, theirs)))
        for key in tensors:  # what both share
            if key in dense and key.startswith(("backbone/", "shared/")) and not tensors[key].equal(dense[key]):
                raise _another_backbone(job.other)
        tensors |= {key: value for key, value in dense.items() if key.startswith(f"{job.domain}/")}
        own = []
        for site, entries in spec.factors.items():
            for parameter, entry in entries.items():
                if f"{site}/{parameter}" not in weights:
                    what = f"the domain has no {site}/{parameter}, which the compressed model has in factors"
                    raise MdlError(what, job.other.path, "give a domain with the same streams, or use add-domain")
                weight = replace(weights[f"{site}/{parameter}"], axes=entry.axes)
                row, factors[site][parameter] = _weight(tensors, weight, entry, job)
                own.append(row)
        table = table or own
        save_tensors(draft.path / (f"weights/{name}.safetensors" if final else _START), tensors)
    full = [f"{row['site']} {row['parameter']} ({row['grown']})" for row in table if row["grown"] < job.grow]
    if full:
        more = f" and {len(full) - 3} more" if len(full) > 3 else ""
        named = ", ".join(full[:3])
        console.say(f"{len(full)} weight(s) have no room for --grow {job.grow} and take fewer: {named}{more}")
    gone = 100 * lost(table)
    console.say(f"{job.domain}: the shared factors lose {gone:.1f} % of its adapters' squared norm")
    added = theirs.of([job.domain])
    domains, normalize = {**spec.domains, **added.domains}, {**spec.normalize, **added.normalize}
    streams = {**spec.streams, **added.streams}
    return replace(spec, domains=domains, normalize=normalize, factors=factors, streams=streams), table


def _weight(
    tensors: dict[str, Tensor], weight: SiteWeight, entry: FactorSpec, job: _Job
) -> tuple[dict[str, Any], FactorSpec]:
    """Replace the new domain's dense weight among the tensors by its factors."""
    dense = tensors.pop(weight.key(job.domain))
    old = list(job.old["domains"])
    grown, energy, gone = extended_factors(tensors, weight, entry, job.domain, old, dense, job.grow)
    row = {
        "site": weight.site,
        "parameter": weight.parameter,
        "rank": grown.rank,
        "grown": grown.rank - entry.rank,
        "energy": energy,
        "lost": gone,
    }
    return row, grown


def lost(table: Sequence[Mapping[str, Any]]) -> float:
    """Fraction of the new domain's squared norm, over all weights."""
    whole = sum(row["energy"] for row in table)
    return sum(row["lost"] for row in table) / whole if whole else 0.0
