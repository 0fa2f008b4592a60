"""Adapters that a backbone was pretrained with (spec residual_adapters 2.6): stored beside it, copied into domains.

The series form is a part of the network that was pretrained: the filters alone are another, worse one. The artifact
holds them in `adapters.safetensors` under <site>/<param>, and their entries in `backbone.json` under `adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool import console
from mdltool.artifact import Artifact
from mdltool.compress.factoring import fit_factors
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec, method_of
from mdltool.model_store import read_tensors
from mdltool.train.checkpoint import save_tensors

_FILE = "adapters.safetensors"
_ASIDE = frozenset({"placement", "stem", "convs", "layers", "init", "bias_init", "dropout"})


def save_source_adapters(folder: Path, model: MultiDomainModel, domain: str) -> dict[str, Any]:
    """Write the adapters of the domain that was pretrained on. Returns what backbone.json says of them."""
    tensors = _of_domain(model, domain)
    save_tensors(folder / _FILE, tensors)
    parameters = sum(p.numel() for site in model.sites.values() for p in site.adapters[domain].parameters())
    return {"adapters": [asdict(entry) for entry in model.spec.adapters], "adapter_parameters": parameters}


def check_source_adapters(spec: ModelSpec, backbone: Artifact | None, choice: str) -> None:
    """Raise MdlError where a model of `spec` cannot take a backbone's own adapters. Builds no weights.

    choice: copy, or ignore for the bare filters.
    """
    stored = _stored(backbone, choice)
    if backbone is None or not stored:
        return
    with torch.device("meta"):
        own = _of_domain(build_model(spec), next(iter(spec.domains)))
    sites = _sites(stored)
    shapes = {key: value.shape for key, value in own.items() if key.split("/", 1)[0] in sites}
    entries = [AdapterSpec(**entry) for entry in backbone.load_json("backbone.json")["adapters"]]
    same = shapes == {key: value.shape for key, value in stored.items()}
    if not same or any(part not in _functions(spec.adapters) for part in _functions(entries)):
        types = ", ".join(dict.fromkeys(entry.type for entry in entries))
        raise MdlError(
            f"this backbone was pretrained with {types} adapters in it, at {len(sites)} sites, and the recipe has "
            "not the same ones; without them it is another network",
            backbone.path,
            "take a recipe with these adapters, such as residual_series, or a backbone of `pretrain --adapters "
            "none`, or the bare filters: --set backbone.adapters=ignore",
        )


def begin_as_source(
    model: MultiDomainModel, backbone: Artifact | None, choice: str, domains: Iterable[str]
) -> None:
    """Begin the adapters of `domains` as a backbone's own, where it has any and `choice` is copy.

    Of a compressed model as near to them as the shared factors allow.
    """
    stored = _stored(backbone, choice)
    if not stored:
        return
    own = model.tensors(with_backbone=False)
    with torch.no_grad():
        for domain in domains:
            for key, value in stored.items():
                site, name = key.split("/", 1)
                if name in model.spec.factors.get(site, {}):
                    fit_factors(model.sites[site].adapters[domain], name, value)
                else:
                    own[f"{domain}/{key}"].copy_(value)
    console.say(f"adapters begin as those that the backbone was pretrained with, at {len(_sites(stored))} sites")


def _stored(backbone: Artifact | None, choice: str) -> dict[str, Tensor]:
    """<site>/<param> -> tensor of a backbone's own adapters; empty where it has none, or they are to be ignored."""
    if backbone is None or choice == "ignore" or _FILE not in backbone.files:
        return {}
    return read_tensors(backbone.file(_FILE))


def _sites(stored: Iterable[str]) -> set[str]:
    return {key.split("/", 1)[0] for key in stored}


def _functions(entries: Iterable[AdapterSpec]) -> list[tuple[str, dict[str, Any]]]:
    """Type and options of each entry, without those that only say where adapters go, begin, or drop in training."""
    options = [(entry.type, method_of(entry)[1].model_dump(mode="json")) for entry in entries]
    return [(name, {k: v for k, v in chosen.items() if k not in _ASIDE}) for name, chosen in options]


def _of_domain(model: MultiDomainModel, domain: str) -> Mapping[str, Tensor]:
    """A domain's adapters: <site>/<param> -> tensor."""
    found = model.tensors(with_backbone=False).items()
    parts = ((key.split("/", 2), value) for key, value in found)
    return {
        f"{site}/{name}": value for (owner, site, name), value in parts if owner == domain and site in model.sites
    }
