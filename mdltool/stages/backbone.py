"""`backbone pretrain` and `backbone import`: weights -> backbone artifact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool.artifact import Artifact, begin, sha256_file
from mdltool.backbones import BACKBONES
from mdltool.backbones.base import Backbone
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model, count
from mdltool.model_store import backbone_with_weights, read_tensors, save_backbone, seeded
from mdltool.recipe import Recipe
from mdltool.stages.fitting import fit, gather_data
from mdltool.stages.plan import model_spec


def pretrain(
    recipe: Recipe,
    shards: Iterable[Artifact],
    out: Path,
    *,
    resume: bool = False,
    workers: int = 1,
) -> Artifact:
    """Train a classifier on one domain and keep its backbone, classifier included under the library's keys."""
    if len(recipe.domains) != 1 or recipe.adapters:
        raise MdlError(
            "pretraining takes a recipe with one domain and no adapters", recipe.name, "tiny_pretrain is one"
        )
    data = gather_data(recipe, shards)
    (domain,) = data
    spec = model_spec(recipe, {domain: len(data[domain].train_index.classes)})
    inputs = [data[domain].train.as_input("train")]
    if (val := data[domain].val) is not None:
        inputs.append(val.as_input("val"))
    draft = begin(
        out,
        kind="backbone",
        stage="backbone pretrain",
        inputs=inputs,
        request=recipe.model_dump(mode="json"),
        resume="must" if resume else "ask",
    )
    if isinstance(draft, Artifact):
        return draft
    seeded(recipe.train.seed)
    model = build_model(spec, backbone_with_weights(spec, None))
    progress = fit(recipe, model, data, draft.path, own_backbone=True, workers=workers)
    model.to("cpu")
    _keep_head(model, domain)
    about = _about(spec.backbone, model.backbone, spec.backbone_options)
    about |= {"weights": f"pretrained on {domain}", "classes": list(data[domain].train_index.classes)}
    save_backbone(draft.path, model.backbone, about)
    summary = {
        "name": spec.backbone,
        "weights": about["weights"],
        "parameters": about["parameters"],
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "val": progress.last_scores,
    }
    return draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints", "weights"))


def _keep_head(model: MultiDomainModel, domain: str) -> None:
    """The domain's head takes the place of the library's classifier."""
    head = model.heads[domain].state_dict()
    classifier = model.backbone.classifier
    model.backbone.classifier = {key: head[key.rsplit(".", 1)[1]].clone() for key in classifier}


def import_file(
    name: str, file: Path, out: Path, *, tag: str = "imported", classes: list[str] | None = None
) -> Artifact:
    """Read an official checkpoint (PyTorchVideo `.pyth`, or safetensors with the same keys) into an artifact."""
    if not file.is_file():
        raise MdlError("there is no such file", file, "give the checkpoint that you downloaded")
    factory = BACKBONES.load(name, "NAME")
    request = {"name": name, "sha256": sha256_file(file), "tag": tag, "classes": classes or []}
    draft = begin(out, kind="backbone", stage="backbone import", inputs=[], request=request)
    if isinstance(draft, Artifact):
        return draft
    try:
        backbone = factory(factory.Options(), factory.default_frames, factory.default_crop)
        backbone.load_library_state(read_checkpoint(file), file)
    except MdlError:
        draft.abandon()
        raise
    about = _about(name, backbone, {}) | {"weights": tag, "classes": classes or [], "source": file.name}
    save_backbone(draft.path, backbone, about)
    return draft.commit({"name": name, "weights": tag, "parameters": about["parameters"]})


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file; code inside a pickle is refused, never run.

    PyTorchVideo's files hold them under `model_state`; `state_dict` and bare dictionaries are read too.
    """
    if file.suffix == ".safetensors":
        return read_tensors(file)
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes provoke
        reason = str(error).strip().splitlines()[0]
        raise MdlError(
            f"this file is no checkpoint that can be read without running code in it ({reason})",
            file,
            "download it again, or save its state dict alone where it was made: torch.save(model.state_dict(), F)",
        ) from None
    for key in ("model_state", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MdlError("this file holds no dictionary of tensors", file, "give a checkpoint of the backbone")
    return content


def _about(name: str, backbone: Backbone, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "options": options,
        "num_frames": backbone.num_frames,
        "crop": backbone.crop,
        "parameters": count([backbone]),
    }
