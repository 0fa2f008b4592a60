"""Training that goes on from a finished model: what of its recipe holds, and what `--set` may change. No stage."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mdltool.artifact import Artifact
from mdltool.errors import MdlError
from mdltool.overrides import apply_override
from mdltool.recipe import has_adapter_norms, validate
from mdltool.schema import Recipe
from mdltool.stages.plan import order_of

# What a recipe says of the training alone. The rest describes the network, its input or its test protocol.
_CHANGEABLE = r"train\.(?!bn\b)|domains\.|data\.(batch|augment|fraction|per_class|subset_seed)\b|losses\b|val\b"
_CHANGEABLE_KEYS = (
    "keys of train (but bn), domains, losses and val can be set, and batch, augment, fraction, per_class and "
    "subset_seed of data"
)


def settled(content: dict[str, Any], overrides: Sequence[str], source: Artifact, new: str = "") -> Recipe:
    """A recipe for training a finished model further, with overrides of what concerns the training alone.

    new: a pattern of the keys of what the model has not yet, which can be set too. Raises MdlError for a key that
    the model settles, and for every fault of the result.
    """
    content = copy.deepcopy(content)  # parts of it are the model's own recipe
    for override in overrides:
        if not re.match(f"{_CHANGEABLE}|{new}" if new else _CHANGEABLE, override):
            raise MdlError("the finished model settles this key", f"--set {override}", _CHANGEABLE_KEYS)
        apply_override(content, override)
    return validate(content, source.path, partial=True)


def unmixed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's augmentation without what mixes the frames of clips, which other streams cannot follow."""
    plain = {"mixup": 0.0, "cutmix": 0.0, "mix_scope": "masked", "smooth_classes": None}
    return {key: plain.get(key, value) for key, value in stored["data"]["augment"].items()}


def plain_losses(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's losses without those that have parameters of their own, which a finished model has no more."""
    return {k: v for k, v in stored["losses"].items() if k not in ("norm", "inf", "proj", "weights")}


def alone(stored: Mapping[str, Any], domain: str, task: str) -> dict[str, Any]:
    """The model's recipe for a new domain alone: its last step, with everything old frozen.

    One domain has batches and a loss of its own, however the others were trained.
    """
    step = {**stored["train"]["steps"][-1], "regime": "frozen", "adapters": None}
    batch = stored["data"]["batch"]
    single = {"batch": max(batch.values()) if isinstance(batch, dict) else batch, "proportions": None}
    single |= {"fraction": 1.0, "per_class": None, "subset_seed": 0}  # how much there was of the others' training
    augment = {**stored["data"]["augment"], "mix_scope": "masked", "smooth_classes": None}
    train = _frozen(stored, step) | {"batches": "in_turn", "split": "rows"}
    return {
        **stored,
        "published": None,
        "domains": {domain: {"task": task}},
        "losses": plain_losses(stored),
        "train": train,
        "data": {**stored["data"], **single, "augment": augment},
    }


def _frozen(stored: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was trained, with one step in which the BatchNorms that domains share are frozen."""
    train = {**stored["train"], "steps": [step]}
    moving = train["bn"] in ("per_domain", "per_domain_stats")
    if not moving and not has_adapter_norms(Recipe.model_validate(stored)):
        train["sync_bn"] = False
    return train


def joined(stored: Mapping[str, Any], recipe: Recipe, domain: str, source: Artifact) -> dict[str, Any]:
    """The model's recipe with the new domain of a recipe for it alone. Raises MdlError where that is no recipe."""
    batch = stored["data"]["batch"]
    if isinstance(batch, dict):
        batch = {**batch, domain: recipe.data.batch}
    part = recipe_of(recipe, domain)
    settled_here = {key: part["domain"][key] for key in ("flip", "streams")}  # the new domain's --set may say them
    own = {**recipe.domains[domain].model_dump(mode="json"), **settled_here}
    both = with_streams(stored, domain, own, part.get("streams", {}), source.path)
    content = {**stored, **both, "data": {**stored["data"], "batch": batch}}
    return validate(content, f"{source.path} with {domain}", partial=True).model_dump(mode="json")


def with_streams(
    stored: Mapping[str, Any], name: str, domain: Mapping[str, Any], parts: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """`streams` and `domains` of a model's recipe with one more domain, each domain naming its own streams.

    domain, parts: of the new one, as recipe_of gives them. Raises MdlError where one of its streams is another in
    the model's recipe.
    """
    known = dict(stored.get("streams") or {})
    for stream, part in parts.items():
        there = known.setdefault(stream, part)
        if differing := [key for key in part if _settled(part)[key] != _settled(there).get(key)]:
            key = differing[0]
            what = f"'{name}' has a stream '{stream}' with {key} {part[key]}, the model has {there.get(key)}"
            raise MdlError(what, where, "train the domain with the model's streams, or with streams of other names")
    domains = {**stored["domains"], name: domain}
    if known:
        every = list(stored.get("streams") or {})
        before = {
            old: {**part, "streams": every if part.get("streams") is None else part["streams"]}
            for old, part in stored["domains"].items()
        }
        domains = {**before, name: {**domain, "streams": domain.get("streams") or []}}
    return {"streams": known, "domains": domains}


def _settled(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**part, "input": part.get("input") or part["width"]}


def finetuning(
    stored: Mapping[str, Any], updates: int, clips: Mapping[str, int], overrides: Sequence[str], source: Artifact
) -> Recipe:
    """A model's recipe for `updates` more updates: its last step with everything shared frozen, the schedule's
    milestones and warm-up at the same fractions of the way. clips: of each domain's training split.
    """
    for override in overrides:
        if re.match(r"domains\.[^.]+\.normalize\b", override):
            raise MdlError("the finished model settles this key", f"--set {override}", _CHANGEABLE_KEYS)
    recipe = Recipe.model_validate(stored)
    last = recipe.train.steps[-1]
    step, schedule = last.model_dump(mode="json"), last.schedule.model_dump(mode="json")
    if schedule["unit"] == "epoch":
        assert last.epochs is not None
        whole, schedule["unit"] = last.epochs, "update"
    else:
        whole = last.updates or (last.epochs or 0) * order_of(recipe, clips).epoch
    schedule["milestones"] = [max(1, round(m * updates / whole)) for m in schedule["milestones"]]
    schedule["warmup"] = round(schedule["warmup"] * updates / whole)
    step |= {"regime": "frozen", "adapters": None, "updates": updates, "epochs": None, "schedule": schedule}
    content = {
        **stored,
        "published": None,
        "losses": plain_losses(stored),
        "train": _frozen(stored, step),
    }
    result = settled(content, overrides, source)
    trained, *more = result.train.steps
    if more or trained.regime not in ("frozen", "heads", "adapters") or trained.updates != updates:
        raise MdlError(
            "fine-tuning is one step of as many updates as --finetune says, and its backbone is frozen",
            "--set train.steps",
            "leave out regime (but frozen, heads or adapters), updates and epochs",
        )
    return result


def recipe_of(recipe: Recipe, domain: str) -> dict[str, Any]:
    """What a recipe says of a domain, of it alone or of all: enough to be in another model what it is in this.

    `streams` is left out where the domain has none.
    """
    part = recipe.domains[domain].model_dump(mode="json")
    part["sampling"] = part["sampling"] or recipe.data.sampling.model_dump(mode="json")
    if part["flip"] is None:
        part["flip"] = 0.0 if part["augment"] == "none" else recipe.data.augment.flip
    part["views"] = part["views"] or recipe.views.grid
    named = list(recipe.streams) if part["streams"] is None else part["streams"]
    part["streams"] = named or None
    streams = {name: recipe.streams[name].model_dump(mode="json") for name in named}
    proportions = recipe.data.proportions
    return {
        "domain": part,
        "batch": recipe.batch_of(domain) if recipe.train.batches == "in_turn" else None,
        "proportion": proportions.weights.get(domain) if proportions else None,
        "replicas": proportions.replicas.get(domain) if proportions else None,
        "views": recipe.views.model_dump(mode="json", exclude={"grid"}),
    } | ({"streams": streams} if streams else {})
