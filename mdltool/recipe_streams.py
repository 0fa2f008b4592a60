"""What a recipe's streams, and the adapters that train in a step, do not go with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mdltool.adapters import ADAPTERS
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_READERS = ("mhva", "adaptformer")  # whose bottleneck caa reads


def stream_faults(recipe: Recipe) -> list[str]:
    """Faults between streams, their adapter and the steps."""
    faults = [
        f"streams.{name}: a stream's name is lower case letters, digits, _ and -"
        for name in recipe.streams
        if not _NAME.fullmatch(name)
    ]
    types = [entry.type for entry in recipe.adapters]
    if recipe.streams and "caa" not in types:
        faults.append("streams: no adapter reads them; add {type: caa} to adapters")
    faults += _adapter_faults(types) + _embedder_faults(recipe) + _domain_faults(recipe)
    faults += _step_faults(recipe, types)
    if recipe.streams:
        augment = recipe.data.augment
        if augment.mixup or augment.cutmix:
            faults.append("data.augment: mixup and cutmix mix frames, which streams cannot follow; leave them out")
        losses = recipe.losses
        whole = (recipe.train.batches == "mixed", losses.inf, losses.proj, losses.weights)
        if any(whole):
            faults.append("streams: mixed batches and the losses inf, proj and weights are for frames alone")
    return faults


def _adapter_faults(types: list[str]) -> list[str]:
    if "caa" not in types:
        return []
    place = types.index("caa")
    if types.count("caa") > 1:
        return ["adapters: one entry of caa holds all streams"]
    if not any(kind in _READERS for kind in types[:place]):
        return [
            f"adapters.{place}: caa reads the bottleneck of a vision adapter; put mhva or adaptformer before it"
        ]
    return []


def _embedder_faults(recipe: Recipe) -> list[str]:
    faults = []
    if recipe.streams:
        from mdltool.adapters.embedders import EMBEDDERS  # here, since it imports torch

        for name, part in recipe.streams.items():
            if part.embedder not in EMBEDDERS:
                hint = did_you_mean(part.embedder, EMBEDDERS)
                faults.append(f"streams.{name}.embedder: there is no embedder '{part.embedder}'; {hint}")
            elif part.embedder == "none" and part.input not in (None, part.width):
                faults.append(
                    f"streams.{name}.embedder: 'none' leaves an input of {part.input}, but the width is "
                    f"{part.width}; use linear"
                )
    return faults


def _domain_faults(recipe: Recipe) -> list[str]:
    faults = []
    for domain, part in recipe.domains.items():
        for name in part.streams or ():
            if name not in recipe.streams:
                hint = did_you_mean(name, recipe.streams) if recipe.streams else "the recipe names none"
                faults.append(f"domains.{domain}.streams: there is no stream '{name}'; {hint}")
    return faults


def sharing_faults(recipe: Recipe) -> list[str]:
    """Domains that are said to share a cross-attention and are not there."""
    return [
        f"adapters.{i}.share: there is no domain '{name}'; {did_you_mean(name, recipe.domains)}"
        for i, entry in enumerate(recipe.adapters)
        if entry.type == "caa"
        for name in entry.options.get("share", [])
        if name not in recipe.domains
    ]


def _step_faults(recipe: Recipe, types: Iterable[str]) -> list[str]:
    faults = []
    for i, step in enumerate(recipe.train.steps):
        for key, named in (("adapters", step.adapters or ()), ("mute", step.mute)):
            for kind in named:
                if kind not in types:
                    hint = did_you_mean(kind, types) if types else "the recipe has no adapters"
                    what = "no such adapter in the recipe" if kind in ADAPTERS else "there is no such adapter"
                    faults.append(f"train.steps.{i}.{key}: '{kind}': {what}; {hint}")
        if step.adapters is not None and (not step.adapters or step.regime == "heads"):
            faults.append(f"train.steps.{i}.adapters: a step without adapters is regime: heads, and names none")
        trains = step.adapters if step.adapters is not None else types
        if step.regime in ("frozen", "joint", "adapters") or step.adapters is not None:
            both = [kind for kind in step.mute if step.adapters is not None and kind in trains]
            faults += [f"train.steps.{i}.mute: '{kind}' is to train, so it cannot be muted" for kind in both]
    return faults
