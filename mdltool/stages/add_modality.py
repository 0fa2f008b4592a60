"""`add-modality`: a finished model + shards with a modality -> model, everything old bit-identical (Agrawal, CM3T,
section 3.3; spec cm3t 2.8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact, Draft
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel
from mdltool.model_store import grown, label_spaces, load_model, refuse_fused, seeded, write_description
from mdltool.registry import did_you_mean
from mdltool.stages.begin_streams import begin_streams
from mdltool.stages.fitting import Scope, gather_data, train_indices
from mdltool.stages.making import commit_model, inputs_of, make_model, progress_summary, trained
from mdltool.stages.modalities import Addition, Wanted, settle, spec_with
from mdltool.stages.sources import with_sources


@dataclass(frozen=True)
class Start:
    """Whose streams the new ones begin as: a domain of a model on the same backbone."""

    model: Artifact
    domain: str


def run(
    source: Artifact,
    wanted: Wanted,
    shards: Iterable[Artifact],
    out: Path,
    *,
    work: Path,
    start: Start | None = None,
    resume: bool = False,
    workers: int = 1,
) -> Artifact:
    """Train the cross-attention to new streams on a finished model, all else frozen.

    Raises MdlError for a model without a vision adapter to read from, a modality that it has or that the shards
    lack, and a start whose streams do not fit.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    shards = list(shards)
    added = settle(content, wanted, train_indices(shards, content["domains"]), source)
    data = gather_data(added.training, [part for part in shards if part.summary["domain"] in added.streams])
    added = added.noted(with_sources(added.training, data))
    own = bool(content["own_backbone"])
    inputs = inputs_of(source, data, work) + ([start.model.as_input("start")] if start is not None else [])
    request: dict[str, Any] = {"recipe": added.training.model_dump(mode="json"), "streams": added.streams}
    request |= {"start_from": start.domain} if start is not None else {}

    def make(draft: Draft | None) -> None:
        seeded(added.training.train.seed)
        with draft or nullcontext():
            old = load_model(source, work=work)
            model = grown(old, spec_with(old.spec, added, late=not wanted.end_to_end))
            new = [key for key in model.tensors() if key not in old.tensors()]
            if start is not None:
                _begin_as(model, new, start, work)
        scope = Scope(only=tuple(_trainable(model, new, added, wanted)))
        progress = trained(added.training, model, data, out, own_backbone=own, workers=workers, scope=scope)
        if draft is not None:
            recipe = added.recipe.model_dump(mode="json")
            counts = model.parameter_counts()
            summary = write_description(draft.path, model.spec, recipe, label_spaces(content), own, counts)
            commit_model(draft, summary | {"added": added.streams} | progress_summary(progress))

    return make_model(out, make, stage="add-modality", inputs=inputs, request=request, resume=resume)


def _trainable(model: MultiDomainModel, new: list[str], added: Addition, wanted: Wanted) -> list[str]:
    """The tensors that may train: the new ones and, as the user wants it, the domains' heads or all of theirs."""
    owned = [key for key in model.tensors() if key.split("/", 1)[0] in added.streams]
    if wanted.end_to_end:
        return [*new, *owned]
    heads = [key for key in owned if key.split("/", 2)[1] == "head"]
    return [*new, *heads] if wanted.train_head else new


def _begin_as(model: MultiDomainModel, new: Sequence[str], start: Start, work: Path) -> None:
    """Copy another domain's tensors of the same streams into the new ones. What it has not begins afresh."""
    other = load_model(start.model, work=work)
    if start.domain not in other.spec.domains:
        hint = did_you_mean(start.domain, other.spec.domains)
        raise MdlError(f"that model has no domain '{start.domain}'", "--init-from", hint)
    if other.digests()["backbone"] != model.digests()["backbone"]:
        what = "that model is on another backbone, whose bottlenecks are other features"
        raise MdlError(what, "--init-from", "take a model that was trained on the same frozen backbone")
    copied = begin_streams(model, new, other, start.domain)
    if not copied:
        streams = ", ".join(other.spec.streams.get(start.domain, ())) or "none"
        what = f"nothing of the new streams is like that domain's (its streams: {streams})"
        raise MdlError(what, "--init-from", "give the streams the same names and widths")
    console.say(f"{copied} of {len(new)} new tensors begin as those of {start.domain} in {start.model.path}")
