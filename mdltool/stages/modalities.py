"""Which streams a finished model gains, and the recipes of its training and of the model afterwards. No stage.

The recipes here are plain JSON values, as model.json holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.recipe import validate
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.continuing import plain_losses, settled, unmixed
from mdltool.stages.plan import stream_specs
from mdltool.stages.sources import named, streams_for
from mdltool.types import STREAM_KINDS

_WIDTH = 512  # of what the cross-attention sees, where no recipe says it (spec cm3t 5.3)


@dataclass(frozen=True)
class Wanted:
    """What is to be added. modalities: kinds or names of streams. plan: a recipe whose streams, cross-attention and
    training of it are taken; None: the model's own. end_to_end: all adapters and the head of the domains train, and
    the new streams are founding ones. train_head: the heads train beside the new streams. all_found: of domains
    that were not named one by one, those which cannot gain it stay as they are.
    """

    modalities: tuple[str, ...]
    plan: Recipe | None = None
    overrides: tuple[str, ...] = ()
    end_to_end: bool = False
    train_head: bool = False
    all_found: bool = False


@dataclass(frozen=True)
class Addition:
    """What is added, settled. streams: domain -> names of its new streams. training: of them alone. recipe: of the
    model afterwards.
    """

    streams: dict[str, list[str]]
    training: Recipe
    recipe: Recipe

    def noted(self, training: Recipe) -> Addition:
        """With what the shards say of the streams' making, which a training recipe has taken from them."""
        recipe = self.recipe.model_copy(update={"streams": {**self.recipe.streams, **training.streams}})
        return replace(self, training=training, recipe=recipe)


def settle(
    content: Mapping[str, Any], wanted: Wanted, indices: Mapping[str, ShardIndex], source: Artifact
) -> Addition:
    """content: model.json. indices: training shards by domain.

    Raises MdlError for a modality that a domain has already or that its shards lack, and for every fault of the
    recipes that result.
    """
    stored = content["recipe"]
    present = {d: list(names) for d, names in content["spec"].get("streams", {}).items()}
    new = _of_domains(indices, wanted, dict(stored.get("streams") or {}), present)
    if not (wanted.end_to_end or wanted.train_head):
        _check_shared(new, present, ModelSpec.from_json(content["spec"]).sharing)
    parts = {name: part for streams in new.values() for name, part in streams.items()}
    streams = {d: list(found) for d, found in new.items()}
    after, number = _extended(stored, parts, streams, present, wanted.plan)
    given = {**stored["losses"], **stored["data"]["augment"]}
    if gone := [name for name in ("inf", "proj", "weights", "mixup", "cutmix") if given.get(name)]:
        console.say(f"the model's recipe goes on without {', '.join(gone)}: of frames alone, which streams are not")
    training = _training(after, stored, streams, wanted)
    allowed = [rf"streams\.({'|'.join(map(re.escape, parts))})\."]
    first = number == len(stored["adapters"])
    allowed += [rf"adapters\.({number}|caa)\."] if first else []
    recipe = settled(training, wanted.overrides, source, "|".join(allowed))
    changed = recipe.model_dump(mode="json")
    after |= {key: changed[key] for key in ("streams", "adapters")}
    return Addition(streams, recipe, validate(after, source.path, partial=not first))


def spec_with(spec: ModelSpec, added: Addition, late: bool) -> ModelSpec:
    """The spec of the model afterwards. late: a stream that comes to others joins no softmax of theirs (spec cm3t
    2.5); else it is a founding one. What another domain has in a shared cross-attention stays what it is there.
    """
    known = stream_specs(added.recipe)
    streams = {domain: dict(entries) for domain, entries in spec.streams.items()}
    sharing = [domain for domain in spec.sharing if domain in spec.streams]
    for domain, names in added.streams.items():
        shared = domain in spec.sharing
        others = domain in streams or (shared and bool(sharing))
        entries = {name: replace(known[domain][name], late=late and others) for name in names}
        if shared:
            held = {name: entry for other in spec.sharing for name, entry in streams.get(other, {}).items()}
            entries = {name: held.get(name, entry) for name, entry in entries.items()}
        streams[domain] = {**streams.get(domain, {}), **entries}
    adapters = list(spec.adapters)
    if not any(entry.type == "caa" for entry in adapters):
        (part,) = (part for part in added.recipe.adapters if part.type == "caa")
        adapters.append(AdapterSpec(part.type, part.sites, part.options))
    return replace(spec, streams=streams, adapters=adapters)


def _planned(plan: Recipe | None, domain: str) -> dict[str, Any]:
    parts = streams_for(plan, domain) if plan is not None else {}
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def _of_domains(
    indices: Mapping[str, ShardIndex],
    wanted: Wanted,
    own: Mapping[str, Any],
    present: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
    """By domain, the recipe's entries of its new streams. own: the model's recipe's, where the plan has none."""
    new, refused = {}, {}
    for domain, index in indices.items():
        known = _planned(wanted.plan, domain) or own
        try:
            new[domain] = _of_domain(domain, index, wanted, known, present.get(domain, []))
        except MdlError as error:
            if not wanted.all_found:
                raise
            refused[domain] = error
    if refused and not new:
        raise next(iter(refused.values()))
    for domain, why in refused.items():
        console.say(f"{domain} stays as it is: {why.what}")
    return new


def _check_shared(
    new: Mapping[str, Iterable[str]], present: Mapping[str, Sequence[str]], sharing: Sequence[str]
) -> None:
    """Raise MdlError for a domain whose new streams its shared cross-attention has already."""
    held = {name: other for other in sharing for name in present.get(other, ())}
    for domain, names in new.items():
        if domain in sharing and held.keys() >= set(names):
            other = held[next(iter(names))]
            raise MdlError(
                f"'{domain}' shares its cross-attention with '{other}', which has {', '.join(names)} already: "
                "there is nothing new to train",
                "--modality",
                "--train-head trains the head of the domain with the stream as it is",
            )


def _of_domain(
    domain: str, index: ShardIndex, wanted: Wanted, known: Mapping[str, Any], present: Sequence[str]
) -> dict[str, Any]:
    """The recipe's entries of one domain's new streams, by name."""
    found: dict[str, Any] = {}
    for word in wanted.modalities:
        parts = {name: known[name] for name in named(word, {name: part["kind"] for name, part in known.items()})}
        stored = named(word, {name: info.kind for name, info in index.streams.items()})
        parts = parts or {name: _entry(index, name) for name in stored}
        if not parts:
            raise _lacking(domain, word, index)
        fresh = {name: part for name, part in parts.items() if name not in present}
        if not fresh:
            raise MdlError(
                f"the model has {word} for the domain '{domain}' already ({', '.join(parts)})",
                f"--modality {word}",
                "take the model that it was added to, to train it again",
            )
        for name in fresh:
            if name not in index.streams:
                raise _lacking(domain, name, index)
        found |= fresh
    return found


def _entry(index: ShardIndex, name: str) -> dict[str, Any]:
    info = index.streams[name]
    return {
        "kind": info.kind,
        "width": _WIDTH,
        "input": info.width,
        "extractor": info.extractor,
        "embedder": "linear",
    }


def _lacking(domain: str, word: str, index: ShardIndex) -> MdlError:
    have = ", ".join(index.streams) or "no streams"
    known = word in STREAM_KINDS or word.partition("_")[0] in STREAM_KINDS
    return MdlError(
        f"the shards of '{domain}' have no {word} (they have {have})",
        index.folder,
        f"shard again with --modality {word}" if known else did_you_mean(word, {*index.streams, *STREAM_KINDS}),
    )


def _extended(
    stored: Mapping[str, Any],
    parts: Mapping[str, Any],
    new: Mapping[str, list[str]],
    present: Mapping[str, list[str]],
    plan: Recipe | None,
) -> tuple[dict[str, Any], int]:
    """(the model's recipe with the new streams, where among its adapters the cross-attention is)."""
    adapters = list(stored["adapters"])
    number = next((i for i, entry in enumerate(adapters) if entry["type"] == "caa"), len(adapters))
    if number == len(adapters):
        planned = plan.model_dump(mode="json")["adapters"] if plan is not None else []
        adapters.append(next((entry for entry in planned if entry["type"] == "caa"), {"type": "caa"}))
    domains = {
        name: {**part, "streams": [*present.get(name, []), *new.get(name, [])]}
        for name, part in stored["domains"].items()
    }
    own = {"streams": {**(stored.get("streams") or {}), **parts}, "adapters": adapters, "domains": domains}
    frames = {"losses": plain_losses(stored), "data": {**stored["data"], "augment": unmixed(stored)}}
    return {**stored, **own, **frames, "published": None}, number


def _training(
    after: Mapping[str, Any], stored: Mapping[str, Any], domains: Iterable[str], wanted: Wanted
) -> dict[str, Any]:
    """The recipe's last step that trains cross-attention, else the model's last, of the new streams alone."""
    steps = stored["train"]["steps"]
    planned = wanted.plan.model_dump(mode="json")["train"]["steps"] if wanted.plan is not None else []
    own = [step for step in (*steps, *planned) if "caa" in (step.get("adapters") or ())]
    step = {**(own or steps)[-1], "adapters": None if wanted.end_to_end else ["caa"]}
    step["mute"] = steps[-1].get("mute", [])  # what the model computes stays
    step["regime"] = "frozen" if wanted.end_to_end or wanted.train_head else "adapters"
    batch = stored["data"]["batch"]
    if isinstance(batch, dict):
        batch = {name: clips for name, clips in batch.items() if name in domains}
    train = {**stored["train"], "steps": [step], "batches": "in_turn", "split": "rows", "sync_bn": False}
    return {
        **after,
        "domains": {name: after["domains"][name] for name in domains},
        "losses": plain_losses(stored),
        "train": train,
        "data": {**after["data"], "batch": batch, "proportions": None},
    }
