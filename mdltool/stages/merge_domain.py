"""`model merge`: a domain's file into a model with the same backbone; what the model had stays bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact, begin
from mdltool.domain_pack import DomainPack
from mdltool.errors import MdlError
from mdltool.model_store import (
    find_backbone,
    label_spaces,
    load_model,
    refuse_fused,
    stored_tensors,
    write_description,
)
from mdltool.recipe import validate
from mdltool.stages.continuing import with_streams
from mdltool.train.checkpoint import save_tensors


def run(source: Artifact, pack: DomainPack, name: str, out: Path, *, weights: str = "last", work: Path) -> Artifact:
    """Write the model with the domain of a file, called `name` there.

    weights: which of the model's; they are the new model's last. Raises MdlError where the domain does not fit or
    its name is taken.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    domains = label_spaces(content)
    if name in domains:
        raise MdlError(f"the model has a domain '{name}' already", source.path, "give another name: --as NAME")
    content_of_both = _joined(content["recipe"], name, pack.recipe, pack.where)
    recipe = validate(content_of_both, pack.where, partial=True).model_dump(mode="json")
    own = bool(content["own_backbone"])
    inputs = [source.as_input("model")] + ([] if own else [find_backbone(source, work).as_input("backbone")])
    request = {"domain": name, "file": pack.digest(), "weights": weights}
    draft = begin(out, kind="model", stage="model merge", inputs=inputs, request=request)
    if isinstance(draft, Artifact):
        return draft
    _announce(content["recipe"]["views"], pack, name)
    domains[name] = pack.space
    with draft:
        model = load_model(source, weights, work)
        model.mount(name, pack)
        save_tensors(draft.path / "weights" / "last.safetensors", stored_tensors(model, own))
        counts = model.parameter_counts()
        summary = write_description(draft.path, model.spec, recipe, domains, own, counts)
        return draft.commit(summary | {"added": name})


def _joined(stored: dict[str, Any], name: str, part: Any, where: object) -> dict[str, Any]:
    """The model's recipe with the domain; the domain's entry says what differs from everybody's."""
    data, domain = stored["data"], dict(part["domain"])
    everybodys = {
        "sampling": data["sampling"],
        "flip": data["augment"]["flip"],
        "views": stored["views"]["grid"],
    }
    if domain["augment"] == "none":  # left out, it would mean no flips
        del everybodys["flip"]
    domain |= {key: None for key, value in everybodys.items() if domain[key] == value}
    batch = data["batch"]
    if isinstance(batch, dict):
        batch = {**batch, name: part["batch"] or max(batch.values())}
    elif part["batch"] not in (None, batch) and stored["train"]["batches"] == "in_turn":
        batch = {**dict.fromkeys(stored["domains"], batch), name: part["batch"]}
    data = {**data, "batch": batch}
    if (proportions := data.get("proportions")) is not None:
        added = {"weights": part["proportion"], "replicas": part["replicas"]}
        named = {key: {**proportions[key], name: value} for key, value in added.items() if value is not None}
        data["proportions"] = {**proportions, **named}
    return {**stored, **with_streams(stored, name, domain, part.get("streams", {}), where), "data": data}


def _announce(views: dict[str, Any], pack: DomainPack, name: str) -> None:
    """Say where this model's test protocol is not the one that the domain had."""
    given = pack.recipe["views"]
    differing = [f"{key} {views.get(key)} (it had {given[key]})" for key in given if given[key] != views.get(key)]
    if differing:
        console.warn(f"'{name}' is now scored by this model's views: {', '.join(differing)}")
