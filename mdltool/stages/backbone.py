"""`backbone pretrain`: shards -> backbone artifact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mdltool.artifact import Artifact, Draft, partial_path
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_store import backbone_with_weights, save_backbone, seeded
from mdltool.schema import Recipe
from mdltool.stages.fitting import fit, gather_data
from mdltool.stages.plan import model_spec
from mdltool.stages.weights import about
from mdltool.train.distributed import join_world
from mdltool.train.plan import Progress
from mdltool.train.together import begin_together, open_together


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
    if recipe.heads.type != "linear":
        raise MdlError("pretraining keeps its head as the classifier", "heads.type", "--set heads.type=linear")
    data = gather_data(recipe, shards)
    (domain,) = data
    spec = model_spec(recipe, {domain: len(data[domain].train_index.classes)})
    inputs = [data[domain].train.as_input("train")]
    if (val := data[domain].val) is not None:
        inputs.append(val.as_input("val"))
    world = join_world()
    draft = begin_together(
        world,
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
    progress = fit(recipe, model, data, partial_path(out), own_backbone=True, workers=workers)
    if draft is not None:
        _keep_head(model.to("cpu"), domain)
        _commit(draft, model, domain, list(data[domain].train_index.classes), progress)
    return open_together(world, out, "backbone")


def _commit(draft: Draft, model: MultiDomainModel, domain: str, classes: list[str], progress: Progress) -> None:
    spec = model.spec
    note = about(spec.backbone, model.backbone, spec.backbone_options)
    note |= {"weights": f"pretrained on {domain}", "classes": classes}
    save_backbone(draft.path, model.backbone, note)
    summary = {
        "name": spec.backbone,
        "weights": note["weights"],
        "parameters": note["parameters"],
        "updates": progress.update,
        "seconds": round(progress.seconds, 2),
        "val": progress.last_scores,
    }
    draft.commit(summary, volatile=("metrics.jsonl", "tensorboard"), drop=("checkpoints", "weights"))


def _keep_head(model: MultiDomainModel, domain: str) -> None:
    """The domain's head takes the place of the library's classifier."""
    head = model.heads[domain].state_dict()
    classifier = model.backbone.classifier
    model.backbone.classifier = {key: head[key.rsplit(".", 1)[1]].clone() for key in classifier}
