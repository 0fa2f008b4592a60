"""Models and backbones in and out of artifacts.

A model artifact holds `model.json`, `weights/last.safetensors` and, after validation, `weights/best.safetensors`.
The backbone's weights are in them when training changed them; else the model names its backbone by digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mdltool.adapters.factored import FactorSpec, has_weight, value, weight_of
from mdltool.artifact import Artifact, latest, open_artifact
from mdltool.backbones.base import Backbone
from mdltool.compress.factoring import fit_factors
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec, build_backbone
from mdltool.train.checkpoint import save_tensors
from mdltool.types import LabelSpace, StreamSpec

# which weights -> without what a model has none of them
WEIGHTS = {"last": "", "best": "validation", "ema": "train.ema"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU. Raises MdlError for a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MdlError(
            f"this safetensors file cannot be read ({error})", path, "mdltool inspect --verify"
        ) from None


def changes_backbone(regimes: set[str], bn: str) -> bool:
    """Whether training can change the backbone's own tensors: its weights, or its running statistics."""
    return bool(regimes & {"joint", "full"}) or bn in ("shared", "recalibrate")


def write_description(
    folder: Path,
    spec: ModelSpec,
    recipe: Mapping[str, Any],
    spaces: Mapping[str, LabelSpace],
    own_backbone: bool,
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Write model.json and recipe.yaml, everything but the tensors: enough to rebuild the model and to say what it
    is. Returns what the summary says of every model. parameters: as parameter_counts gives them.
    """
    content = {
        "spec": spec.to_json(),
        "recipe": recipe,
        "domains": {domain: space.as_json() for domain, space in spaces.items()},
        "own_backbone": own_backbone,
        "parameters": parameters,
    }
    write_text(folder / "model.json", json.dumps(content, indent=1))
    write_text(folder / "recipe.yaml", yaml.safe_dump(dict(recipe), sort_keys=False))
    return {
        "recipe": recipe["name"],
        "domains": {name: {"classes": len(space.classes)} for name, space in spaces.items()},
        "parameters": {key: value for key, value in parameters.items() if key != "per_domain"},
    }


def label_spaces(content: Mapping[str, Any]) -> dict[str, LabelSpace]:
    """Domain -> its labels, of a model.json."""
    return {domain: LabelSpace.from_json(entry) for domain, entry in content["domains"].items()}


def load_model(artifact: Artifact, weights: str = "last", work: Path | None = None) -> MultiDomainModel:
    """A trained model in eval mode, on the CPU.

    weights: last, best or ema. work: where to look for the backbone of a model that stores it by digest, when it is
    no longer at the path that the model remembers.
    """
    if weights not in WEIGHTS:
        raise MdlError(f"'{weights}' are no weights of a model", "--weights", f"one of: {', '.join(WEIGHTS)}")
    content = artifact.load_json("model.json")
    name = f"weights/{weights}.safetensors"
    if weights != "last" and name not in artifact.files:
        raise MdlError(
            f"this model has no {weights} weights: it was trained without {WEIGHTS[weights]}",
            artifact.path,
            "use last",
        )
    spec = ModelSpec.from_json(content["spec"])
    backbone = build_backbone(spec)
    own = bool(content["own_backbone"])
    if not own:
        source = find_backbone(artifact, work)
        backbone.load_library_state(read_tensors(source.file("backbone.safetensors")), source.path)
    model = build_model(spec, backbone)
    model.load_tensors(read_tensors(artifact.file(name)), artifact.path, with_backbone=own)
    return model.eval()


def refuse_fused(content: Mapping[str, Any], where: object) -> None:
    """Raise MdlError for the model.json of a fused model, whose adapters are in its weights."""
    fused = content["spec"].get("fused")
    if fused is not None:
        raise MdlError(
            f"this model is fused for '{fused['domain']}': its adapters are part of its weights",
            where,
            "take the model that it was made from, or undo it: mdltool fuse MODEL --undo",
        )


def extended(
    model: MultiDomainModel,
    domain: str,
    outputs: int,
    start_from: str | None = None,
    normalize: Mapping[str, dict[str, list[float]]] | None = None,
    streams: Mapping[str, StreamSpec] | None = None,
) -> MultiDomainModel:
    """The model with one more domain; every old tensor is the same. start_from: the domain whose adapters and
    BatchNorm statistics the new one's begin as, instead of fresh ones and the backbone's own. normalize: of the new
    domain, as ModelSpec has it. streams: of the new domain.
    """
    domains, own_pixels = {**model.spec.domains, domain: outputs}, {**model.spec.normalize, **(normalize or {})}
    with_streams = {**model.spec.streams, **({domain: dict(streams)} if streams else {})}
    spec = replace(model.spec, domains=domains, normalize=own_pixels, streams=with_streams)
    larger, old = grown(model, spec), model.tensors()
    with torch.no_grad():
        for key, tensor in larger.tensors().items():
            source = _begin_as(key, start_from, larger) if key.startswith(f"{domain}/") else key
            if source != key and source in old:
                tensor.copy_(old[source])
    if start_from is None:
        _begin_factors(larger, domain)
    return larger.eval()


def grown(model: MultiDomainModel, spec: ModelSpec) -> MultiDomainModel:
    """A model of a spec that says more than this model's; every old tensor is the same, and new ones are fresh."""
    larger = build_model(spec)
    old, own = model.tensors(), larger.tensors()
    with torch.no_grad():
        for key in own.keys() & old.keys():
            own[key].copy_(old[key])
    return larger.eval()


def _begin_factors(model: MultiDomainModel, domain: str) -> None:
    """A new domain's private factors are what the shared ones hold of fresh adapters."""
    for site, entries in model.spec.factors.items():
        dense = model.sites[site].build(domain, model.spec.streams.get(domain, {}))
        for name in entries:
            if has_weight(dense, name):
                fit_factors(model.sites[site].adapters[domain], name, value(weight_of(dense, name)))


def reduced(model: MultiDomainModel, domain: str) -> MultiDomainModel:
    """The model without a domain; every other tensor is the same; shared factors that it alone used go with it."""
    smaller = build_model(model.spec.of(name for name in model.spec.domains if name != domain))
    old = model.tensors()
    smaller.load_tensors({key: old[key] for key in smaller.tensors()}, domain)
    smaller.spec = replace(smaller.spec, factors=_held_factors(smaller))
    return smaller.eval()


def _held_factors(model: MultiDomainModel) -> dict[str, dict[str, FactorSpec]]:
    """The spec's factors without those of weights that no domain has: of streams that went with a domain."""
    found = {}
    for site, entries in model.spec.factors.items():
        adapters = list(model.sites[site].adapters.values())
        found[site] = {name: e for name, e in entries.items() if any(has_weight(a, name) for a in adapters)}
    return {site: entries for site, entries in found.items() if entries}


def _begin_as(key: str, start_from: str | None, model: MultiDomainModel) -> str:
    """The old tensor that a new domain's tensor starts as; its own key, which is no old one, for a fresh start."""
    _, site, name = key.split("/", 2)
    if site == "head":
        return key
    if start_from is not None:
        return f"{start_from}/{site}/{name}"
    return f"backbone/{site}.{name}" if site in model.norms else key


def find_backbone(artifact: Artifact, work: Path | None) -> Artifact:
    """The backbone artifact that a model was trained on, by its digest."""
    wanted = next((entry for entry in artifact.inputs if entry.role == "backbone"), None)
    assert wanted is not None, "a model without its own backbone has one among its inputs"
    places = [Path(wanted.path)]
    if work is not None and (work / "backbone").is_dir():
        places += sorted(path.parent for path in (work / "backbone").glob("*/artifact.json"))
    for place in places:
        if (place / "artifact.json").is_file():
            found = open_artifact(place)
            if found.digest == wanted.digest:
                return found
    raise MdlError(
        f"the model's backbone is not here (digest {wanted.digest[:12]}, it was at {wanted.path})",
        artifact.path,
        "put that backbone artifact back, or into the work directory under backbone/",
    )


def save_backbone(folder: Path, backbone: Backbone, about: Mapping[str, Any]) -> None:
    """Write backbone.safetensors (the library's own keys, classifier included) and backbone.json."""
    save_tensors(folder / "backbone.safetensors", backbone.library_state())
    write_text(folder / "backbone.json", json.dumps(dict(about), indent=1))


def choose_backbone(given: Artifact | None, work: Path, spec: ModelSpec, tag: str) -> Artifact | None:
    """The backbone artifact for a recipe: the given one, else the work directory's latest; None for `scratch`.

    Raises MdlError when the recipe wants pretrained weights and none are there, or they are another network's.
    """
    found = given
    if found is None and tag != "scratch":
        found = latest(work, "backbone")
        if found is None:
            raise MdlError(
                f"the recipe wants {spec.backbone} with '{tag}' weights, and there is no backbone in {work}",
                "backbone.weights",
                f"mdltool backbone import {spec.backbone} --file CHECKPOINT, or --set backbone.weights=scratch",
            )
    if found is None:
        return None
    about = found.load_json("backbone.json")
    if about["name"] != spec.backbone:
        raise MdlError(
            f"this backbone is {about['name']}, the recipe wants {spec.backbone}",
            found.path,
            "give the right one with --backbone",
        )
    return found


def backbone_with_weights(spec: ModelSpec, source: Artifact | None) -> Backbone:
    """The spec's backbone, with an artifact's weights or random ones."""
    backbone = build_backbone(spec)
    if source is not None:
        backbone.load_library_state(read_tensors(source.file("backbone.safetensors")), source.path)
    return backbone


def stored_tensors(model: MultiDomainModel, own_backbone: bool) -> dict[str, Tensor]:
    """What goes into a model's weights file."""
    return {key: value.detach() for key, value in model.tensors(own_backbone).items()}


def seeded(seed: int) -> None:
    """Seed torch's generator: initial weights are a function of the recipe's seed alone."""
    torch.manual_seed(seed)
