"""`backbone pretrain`: shards -> backbone artifact."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from mdltool.artifact import Artifact, Draft, partial_path
from mdltool.data.order import rng_for
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_store import backbone_with_weights, save_backbone, seeded
from mdltool.schema import Recipe
from mdltool.source_adapters import save_source_adapters
from mdltool.stages.fitting import DomainData, fit, gather_data
from mdltool.stages.making import data_inputs
from mdltool.stages.plan import check, completed, model_spec
from mdltool.stages.weights import about
from mdltool.train.plan import Progress
from mdltool.train.together import make_together

_CLASSES = 98  # purpose of the random numbers that choose classes


def pretrain(
    recipe: Recipe,
    shards: Iterable[Artifact],
    out: Path,
    *,
    classes: int | None = None,
    resume: bool = False,
    workers: int = 1,
) -> Artifact:
    """Train a classifier on one domain and keep its backbone, classifier included under the library's keys.

    The recipe's series adapters, if any, are trained with it and kept beside it. classes: use so many of the data's
    classes, drawn by the recipe's seed, fewer of them part of more; None: all.
    """
    _check(recipe)
    check(recipe)
    data = gather_data(recipe, shards)
    (domain,) = data
    if classes is not None:
        data = {domain: of_classes(data[domain], classes, recipe.train.seed)}
    spec = model_spec(recipe, {domain: len(data[domain].train_index.classes)})

    def make(draft: Draft | None) -> None:
        with draft or nullcontext():
            seeded(recipe.train.seed)
            model = build_model(spec, backbone_with_weights(spec, None))
        progress = fit(recipe, model, data, partial_path(out), own_backbone=True, workers=workers)
        if draft is not None:
            _keep_head(model.to("cpu"), domain)
            _commit(draft, model, domain, list(data[domain].train_index.classes), progress)

    return make_together(
        out,
        make,
        kind="backbone",
        stage="backbone pretrain",
        inputs=data_inputs(data),
        request=recipe.model_dump(mode="json") | ({} if classes is None else {"classes": classes}),
        resume="must" if resume else "ask",
        completed=completed,
    )


def _check(recipe: Recipe) -> None:
    """Raise MdlError for what does not leave a backbone behind, or only a part of one."""
    if len(recipe.domains) != 1:
        raise MdlError("pretraining takes a recipe with one domain", recipe.name, "tiny_pretrain is one")
    if any(entry.type != "series" for entry in recipe.adapters):
        raise MdlError("a backbone is pretrained with series adapters or none", "adapters", "--adapters none")
    if recipe.adapters and any(step.regime != "joint" for step in recipe.train.steps):
        what = "adapters and backbone are pretrained together"
        raise MdlError(what, "train.steps.regime", "--set train.steps.0.regime=joint")
    if recipe.train.bn in ("per_domain", "per_domain_stats", "recalibrate"):
        raise MdlError("pretraining is of the backbone's own BatchNorms", "train.bn", "--set train.bn=shared")
    if recipe.heads.type != "linear":
        raise MdlError("pretraining keeps its head as the classifier", "heads.type", "--set heads.type=linear")


def of_classes(data: DomainData, count: int, seed: int) -> DomainData:
    """The data of `count` of the classes, in their order. Raises MdlError where there are not so many."""
    names = data.train_index.classes
    if data.train_index.task != "single_label":
        raise MdlError("only single labels are of one class each", "--classes", "leave it out")
    if not 2 <= count <= len(names):
        raise MdlError(
            f"there are {len(names)} classes, not {count} to take", "--classes", f"from 2 to {len(names)}"
        )
    numbers = np.sort(rng_for(seed, "", _CLASSES).permutation(len(names))[:count])
    val = data.val_index.of_classes(numbers) if data.val_index is not None else None
    return replace(data, train_index=data.train_index.of_classes(numbers), val_index=val)


def _commit(draft: Draft, model: MultiDomainModel, domain: str, classes: list[str], progress: Progress) -> None:
    spec = model.spec
    note = about(spec.backbone, model.backbone, spec.backbone_options)
    parameters = sum(parameter.numel() for parameter in model.backbone_parameters())
    note |= {"weights": f"pretrained on {domain}", "classes": classes, "parameters": parameters}
    if model.sites:
        note |= save_source_adapters(draft.path, model, domain)
    save_backbone(draft.path, model.backbone, note)
    summary = {
        "name": spec.backbone,
        "weights": note["weights"],
        "parameters": note["parameters"],
        "classes": len(classes),
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "val": progress.last_scores,
    }
    if model.sites:
        types = ", ".join(entry.type for entry in spec.adapters)
        summary["adapters"] = f"{types} at {len(model.sites)} sites"
        summary["adapter_parameters"] = note["adapter_parameters"]
    draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints", "weights"))


def _keep_head(model: MultiDomainModel, domain: str) -> None:
    """The domain's head takes the place of the library's classifier."""
    head = model.heads[domain].state_dict()
    classifier = model.backbone.classifier
    model.backbone.classifier = {key: head[key.rsplit(".", 1)[1]].clone() for key in classifier}
