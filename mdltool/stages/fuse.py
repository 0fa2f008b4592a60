"""`fuse`: one domain's adapters folded into the backbone's weights; `fuse --undo` takes it back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool.artifact import Artifact, Draft, begin
from mdltool.compress.fusing import check_foldable, digest_of_tensors, fused, is_sum, layer_of, subtract
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import ModelSpec
from mdltool.model_store import (
    WEIGHTS,
    find_backbone,
    label_spaces,
    load_model,
    read_tensors,
    refuse_fused,
    stored_tensors,
    write_description,
)
from mdltool.registry import did_you_mean
from mdltool.stages.plan import without_domain
from mdltool.train.checkpoint import save_tensors
from mdltool.types import LabelSpace

ORIGINAL = "original"  # the folder with what --undo needs
REACH = 1e-4  # of the largest difference of logits, relative to the largest logit


def run(
    source: Artifact,
    domain: str | None,
    out: Path,
    *,
    work: Path,
    fold_bn: bool = False,
    keep_original: bool = True,
) -> Artifact:
    """Write the model of one domain without adapters; every weights file of the source is fused.

    domain may be left out for a model of one domain. fold_bn: BatchNorms go into the convolution before them.
    keep_original: keep the source's files, so that `undo` gives back their bytes. Raises MdlError for a fused
    model, an unknown domain, adapters that no weight can hold, and logits that differ by more than REACH.
    """
    content = source.load_json("model.json")
    refuse_fused(content, source.path)
    domain = _chosen(content["domains"], domain, source)
    own = bool(content["own_backbone"])
    inputs = [source.as_input("model")] + ([] if own else [find_backbone(source, work).as_input("backbone")])
    request = {"domain": domain, "fold_bn": fold_bn, "keep_original": keep_original}
    draft = begin(out, kind="model", stage="fuse", inputs=inputs, request=request)
    if isinstance(draft, Artifact):
        return draft
    recipe, spaces = _alone(content, domain)
    original = draft.path / ORIGINAL
    with draft:
        if keep_original:
            _copy(source, [name for name, entry in source.files.items() if not entry.get("volatile")], draft)
        difference = {}
        for weights in _weights(source.files):
            model = load_model(source, weights, work)
            _check(model, domain, fold_bn, source)
            if not keep_original and (not own or (not fold_bn and is_sum(model, domain))):
                save_tensors(original / _file(weights), _own_tensors(model, domain, own))
                _describe(original, model.spec, recipe, spaces, own)
            model, difference[weights] = _fuse(model, domain, fold_bn, draft.path / _file(weights))
        counts = model.parameter_counts()
        summary = write_description(draft.path, model.spec, recipe, spaces, True, counts) | {
            "fused": f"domain {domain}",
            "difference": difference,
            "undo": "no" if not original.is_dir() else "the model" if keep_original else "the domain alone",
        }
        return draft.commit(summary)


def undo(source: Artifact, out: Path) -> Artifact:
    """Write the model that a fused one was made from.

    Its files are the same bytes, all domains included. Without the originals it is the fused domain alone: by
    subtraction where the backbone was trained, exact where it is named by its digest. Raises MdlError for a model
    that is not fused, was changed, or was fused without what is needed.
    """
    content = source.load_json("model.json")
    if content["spec"].get("fused") is None:
        raise MdlError("this model is not fused", source.path, "give one that `mdltool fuse` made")
    kept = [name for name in source.files if name.startswith(f"{ORIGINAL}/")]
    if not kept:
        raise MdlError(
            "this model was fused with --no-keep-original, and what was folded into it cannot be subtracted",
            source.path,
            f"take the model that it was made from: {source.inputs[0].path}",
        )
    inputs = [source.as_input("model"), *(entry for entry in source.inputs if entry.role == "backbone")]
    draft = begin(out, kind="model", stage="fuse --undo", inputs=inputs, request={})
    if isinstance(draft, Artifact):
        return draft
    with draft:
        _copy(source, kept, draft)
        before = source.load_json(f"{ORIGINAL}/model.json")
        if before["own_backbone"] and not source.request["keep_original"]:
            for weights in _weights(source.files):
                restored = _subtracted(source, ModelSpec.from_json(before["spec"]), weights)
                save_tensors(draft.path / _file(weights), restored)
        domains = {name: {"classes": len(entry["classes"])} for name, entry in before["domains"].items()}
        return draft.commit({"recipe": before["recipe"]["name"], "undone": source.name, "domains": domains})


def _chosen(domains: Mapping[str, Any], domain: str | None, source: Artifact) -> str:
    if domain is None and len(domains) == 1:
        return next(iter(domains))
    if domain is None:
        raise MdlError(
            "the model has several domains; a fused one has one", source.path, f"--domain {' or '.join(domains)}"
        )
    if domain not in domains:
        raise MdlError(f"the model has no domain '{domain}'", source.path, did_you_mean(domain, domains))
    return domain


def _alone(content: Mapping[str, Any], domain: str) -> tuple[dict[str, Any], dict[str, LabelSpace]]:
    """The recipe and the labels of a model.json for one domain."""
    recipe = content["recipe"]
    for other in [name for name in content["domains"] if name != domain]:
        recipe = without_domain(recipe, other)
    return recipe, {domain: label_spaces(content)[domain]}


def _weights(files: Mapping[str, Any]) -> list[str]:
    return [name for name in WEIGHTS if _file(name) in files]


def _file(weights: str) -> str:
    return f"weights/{weights}.safetensors"


def _copy(source: Artifact, names: list[str], draft: Draft) -> None:
    """Copy files of an artifact into the draft's ORIGINAL, or out of the artifact's. Raises for damaged ones."""
    faults = source.verify(names)
    if faults:
        raise MdlError(f"the model's files were changed ({'; '.join(faults[:3])})", source.path, "make it again")
    for name in names:
        inside = name.removeprefix(f"{ORIGINAL}/")
        target = draft.path / (inside if inside != name else f"{ORIGINAL}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(name), target)


def _check(model: MultiDomainModel, domain: str, fold_bn: bool, source: Artifact) -> None:
    if not (model.sites or model.norms or fold_bn):
        raise MdlError(
            "this model has neither adapters nor BatchNorms by domain: there is nothing to fuse",
            source.path,
            "--fold-bn folds its BatchNorms",
        )
    check_foldable(model, domain, source.path)


def _fuse(model: MultiDomainModel, domain: str, fold_bn: bool, path: Path) -> tuple[MultiDomainModel, float]:
    """Fuse and store one set of weights. Returns the fused model and how far its logits are off."""
    header = {"domain": domain, "base": _base_digest(model), "adapters": _adapter_digest(model, domain)}
    shape = (2, 3, model.spec.num_frames, model.spec.crop, model.spec.crop)
    clips_BCTHW = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected_BN = model(clips_BCTHW, domain)
    model = fused(model, domain, fold_bn)
    with torch.inference_mode():
        difference = float((model(clips_BCTHW, domain) - expected_BN).abs().max() / expected_BN.abs().max())
    if not difference <= REACH:  # NaN too
        raise MdlError(
            f"the fused model's logits differ by {difference:.1e} of the largest, more than {REACH:g}",
            path.name,
            "without --fold-bn it is closer" if fold_bn else "report it: folding these adapters is exact",
        )
    save_tensors(path, stored_tensors(model, True), {"fused": json.dumps(header)})
    return model, difference


def _base_digest(model: MultiDomainModel) -> str:
    """sha256 of the weights that adapters are folded into, as they are before."""
    return digest_of_tensors({name: layer_of(site).weight for name, site in model.sites.items()})


def _adapter_digest(model: MultiDomainModel, domain: str) -> str:
    """sha256 of the domain's adapters and of what domains share at their sites."""
    tensors = {
        key: value for key, value in model.tensors(False).items() if key.startswith((f"{domain}/", "shared/"))
    }
    return digest_of_tensors(
        {key: value for key, value in tensors.items() if not key.startswith(f"{domain}/head/")}
    )


def _own_tensors(model: MultiDomainModel, domain: str, own: bool) -> dict[str, Tensor]:
    """The domain's own tensors, and of a stored backbone what subtraction does not give back."""
    prefixes = (f"{domain}/", "shared/", *(f"backbone/{norm}." for norm in model.norms))
    return {key: value for key, value in stored_tensors(model, own).items() if key.startswith(prefixes)}


def _describe(
    folder: Path, spec: ModelSpec, recipe: dict[str, Any], spaces: Mapping[str, LabelSpace], own: bool
) -> None:
    """The model.json and recipe.yaml of some domains of a model that is not fused."""
    alone = spec.of(spaces)
    with torch.device("meta"):
        counts = build_model(alone).parameter_counts()
    write_description(folder, alone, recipe, spaces, own, counts)


def _subtracted(source: Artifact, spec: ModelSpec, weights: str) -> dict[str, Tensor]:
    """The weights of the domain alone, its adapters taken out of the fused backbone."""
    kept = read_tensors(source.file(f"{ORIGINAL}/{_file(weights)}"))
    folded = read_tensors(source.file(_file(weights)))
    model = build_model(spec)
    model.load_tensors({key: folded[key] for key in model.tensors() if key in folded} | kept, source.path)
    subtract(model, next(iter(spec.domains)))
    return stored_tensors(model, True)
