"""What `train` and `backbone pretrain` share: shards to streams, a recipe to a trainer. No stage itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mdltool.artifact import Artifact
from mdltool.data.index import ShardIndex
from mdltool.data.loader import TrainLoader, ViewLoader
from mdltool.data.order import InTurn, Share
from mdltool.errors import MdlError
from mdltool.evaluate.scores import score_domain, tensors_of
from mdltool.model import ModelSpec, MultiDomainModel
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe, Step
from mdltool.stages.plan import sampling, train_transform, val_views
from mdltool.tasks import TASKS, Task
from mdltool.train.distributed import World, join_world
from mdltool.train.log import make_accelerator
from mdltool.train.loop import Progress, RunParts, StepSpec, Trainer, TrainSpec
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.types import Batch


@dataclass(frozen=True)
class DomainData:
    """One domain's shards: train always, val where given; both with the same classes."""

    train: Artifact
    val: Artifact | None
    train_index: ShardIndex
    val_index: ShardIndex | None


def gather_data(recipe: Recipe, shards: Iterable[Artifact]) -> dict[str, DomainData]:
    """Sort shards into the recipe's domains by what they say of themselves.

    Raises MdlError for a domain without training data, one the recipe does not know, doubles, and class lists that
    differ between the splits or from the recipe's count.
    """
    train: dict[str, tuple[Artifact, ShardIndex]] = {}
    val: dict[str, tuple[Artifact, ShardIndex]] = {}
    for artifact in shards:
        index = ShardIndex.open(artifact)
        if index.domain not in recipe.domains:
            raise MdlError(
                f"the recipe has no domain '{index.domain}'",
                artifact.path,
                did_you_mean(index.domain, recipe.domains),
            )
        split = train if index.split == "train" else val
        if index.domain in split:
            raise MdlError(
                f"two sets of shards for {index.domain} ({index.split})", artifact.path, "give one of them"
            )
        split[index.domain] = (artifact, index)
    found = {}
    for name, part in recipe.domains.items():
        if name not in train:
            raise MdlError(
                f"the recipe's domain '{name}' has no training shards",
                recipe.name,
                f"mdltool shard SOURCE --domain {name} --split train, or --data {name}=PATH",
            )
        artifact, index = train[name]
        if part.classes is not None and part.classes != len(index.classes):
            raise MdlError(
                f"{name} has {len(index.classes)} classes, the recipe says {part.classes}",
                artifact.path,
                f"--set domains.{name}.classes={len(index.classes)}",
            )
        if name in val and val[name][1].classes != index.classes:
            raise MdlError(f"{name}: train and val have different classes", val[name][0].path, "use one class list")
        found[name] = DomainData(
            artifact, val[name][0] if name in val else None, index, val.get(name, (0, None))[1]
        )
    return found


def train_spec(recipe: Recipe, spec: ModelSpec, clips: Mapping[str, int]) -> TrainSpec:
    """The recipe's training part as plain values. clips: training clips of each domain, which make an epoch."""
    rounds = recipe.train.rounds_per_update
    epoch = max(math.ceil(clips[name] / (recipe.batch_of(name) * rounds)) for name in recipe.domains)
    steps = tuple(_step_spec(step, epoch) for step in recipe.train.steps)
    return TrainSpec(
        steps=steps,
        batch={name: recipe.batch_of(name) for name in recipe.domains},
        weights={name: part.weight for name, part in recipe.domains.items()},
        bn=spec.bn,
        seed=recipe.train.seed,
        reduction=recipe.losses.reduction,
        domain_average=recipe.losses.domain_average,
        rounds_per_update=recipe.train.rounds_per_update,
        channels_last=recipe.train.channels_last,
        checkpoint_every=recipe.train.checkpoint_every,
        val_every=recipe.val.every,
        recalibrate_batches=recipe.train.recalibrate_batches,
    )


def _step_spec(step: Step, epoch: int) -> StepSpec:
    """epoch: updates of one epoch."""
    schedule, scale = step.schedule.model_dump(), 1
    if schedule["unit"] == "epoch":
        scale, schedule["unit"] = epoch, "update"
    schedule["milestones"] = tuple(scale * milestone for milestone in schedule["milestones"])
    schedule["warmup"] *= scale
    updates = step.updates or (step.epochs or 0) * epoch
    return StepSpec(step.regime, updates, OptimizerSpec(**step.optimizer.model_dump()), ScheduleSpec(**schedule))


def _for_one(spec: TrainSpec, domain: str) -> TrainSpec:
    """The training of one domain of a finished model: statistics that domains share would move for all of them."""
    own_norms = spec.bn in ("per_domain", "per_domain_stats")
    return replace(spec, only=domain, bn=spec.bn if own_norms else "frozen")


def fit(
    recipe: Recipe,
    model: MultiDomainModel,
    data: Mapping[str, DomainData],
    folder: Path,
    *,
    own_backbone: bool,
    workers: int,
    only: str | None = None,
) -> Progress:
    """Train `model` in `folder`, continuing from the checkpoints there. only: this domain's parts alone."""
    from mdltool.model_store import stored_tensors

    clips = {name: len(data[name].train_index) for name in recipe.domains}
    spec = train_spec(recipe, model.spec, clips)
    spec = _for_one(spec, only) if only is not None else spec
    tasks = {name: TASKS.load(part.task)() for name, part in recipe.domains.items()}
    world = join_world()
    accelerator = make_accelerator(recipe.train.precision, folder)

    def loader(start_update: int) -> Iterable[Batch]:
        return TrainLoader(
            [data[name].train_index for name in recipe.domains],
            InTurn(clips, spec.batch, recipe.train.seed, recipe.train.domain_order, spec.rounds_per_update),
            sampling=sampling(recipe),
            transform=train_transform(recipe),
            seed=recipe.train.seed,
            workers=workers,
            updates=range(start_update, spec.total_updates),
            share=Share(world.rank, world.size),
        )

    def validate(trained: MultiDomainModel) -> dict[str, dict[str, float]]:
        return {
            name: _validate_domain(recipe, trained, name, index, tasks[name], workers)
            for name, index in ((n, d.val_index) for n, d in data.items())
            if index is not None
        }

    parts = RunParts(
        loader=loader,
        validate=validate if any(d.val_index is not None for d in data.values()) else None,
        stored=lambda trained: stored_tensors(trained, own_backbone),
        accelerator=accelerator,
        world=World(world.rank, world.size),
    )
    return Trainer(model, spec, tasks, folder, parts).run()


def _validate_domain(
    recipe: Recipe, model: MultiDomainModel, domain: str, index: ShardIndex, task: Task, workers: int
) -> dict[str, float]:
    loader = ViewLoader(index, val_views(recipe), workers=workers)
    found = score_domain(model, loader, domain, task, device=model.mean.device)
    scores, labels, wrong = tensors_of(found, len(index.classes), count_missing=True)
    metrics = task.metrics(scores, labels, wrong)
    own = scores.gather(1, labels[:, None]).clamp_min(1e-12)
    return metrics | {"loss": float(-own.log().mean())}
