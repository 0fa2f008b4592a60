"""What `train` and `backbone pretrain` share: shards to streams, a recipe to a trainer. No stage itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mdltool import console
from mdltool.artifact import Artifact
from mdltool.data.index import ShardIndex
from mdltool.data.loader import Stream, TrainLoader, ViewLoader
from mdltool.data.order import Order, Share
from mdltool.data.subset import subset_of, warn_short
from mdltool.errors import MdlError
from mdltool.evaluate.scores import DomainScores, score_domain, tensors_of
from mdltool.losses.multitrain import MultitrainLoss
from mdltool.model import MultiDomainModel
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe, Step
from mdltool.stages.plan import (
    check_sides,
    decays_of,
    mix_of,
    modalities,
    multitrain_spec,
    order_of,
    sampling,
    share_of,
    train_transform,
    val_views,
)
from mdltool.tasks import TASKS, Task, task_of
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import World, broadcast_object, gather_objects, gather_rows, join_world
from mdltool.train.log import make_accelerator
from mdltool.train.loop import Trainer
from mdltool.train.objective import MultitrainObjective, Objective, Smoothing, TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.train.plan import Headline, Loader, Progress, RunParts, StepSpec, TrainSpec, Validate
from mdltool.types import LabelSpace

_PAIRS = "shard every split with the annotation files of all splits side by side"


@dataclass(frozen=True)
class DomainData:
    """One domain's shards: train always, val where given; both with the same classes."""

    train: Artifact
    val: Artifact | None
    train_index: ShardIndex
    val_index: ShardIndex | None

    @property
    def clips(self) -> int:
        """Of both splits."""
        return len(self.train_index) + (len(self.val_index) if self.val_index is not None else 0)


def check_domain(artifact: Artifact, index: ShardIndex, domains: Mapping[str, Any]) -> None:
    """Raise MdlError for shards of a domain, labels or a task that model.json does not say of the model."""
    if index.domain not in domains:
        fix = did_you_mean(index.domain, domains)
        raise MdlError(f"the model has no domain '{index.domain}'", artifact.path, fix)
    if list(index.classes) != domains[index.domain]["classes"]:
        what = f"{index.domain}: these shards have other classes than the model"
        raise MdlError(what, artifact.path, "use one class list")
    task = domains[index.domain]["task"]
    if index.task != task:
        what = f"{index.domain}: these shards are of the task {index.task}, the model is of {task}"
        raise MdlError(what, artifact.path, "give shards of the model's task")
    if index.space != LabelSpace.from_json(domains[index.domain]):
        raise MdlError(f"{index.domain}: these shards have other actions than the model", artifact.path, _PAIRS)


def train_indices(shards: Iterable[Artifact], domains: Mapping[str, Any]) -> dict[str, ShardIndex]:
    """The training splits among shards of a finished model's domains, by domain. Raises MdlError where they are not
    what model.json says of the domain, and where there is none.
    """
    found = {}
    for artifact in shards:
        index = ShardIndex.open(artifact)
        check_domain(artifact, index, domains)
        if index.split == "train":
            found[index.domain] = index
    if not found:
        fix = "--data DOMAIN=artifacts/shards/DOMAIN-train"
        raise MdlError(f"there are no training shards of {', '.join(domains)}", "--data", fix)
    return found


def gather_data(recipe: Recipe, shards: Iterable[Artifact]) -> dict[str, DomainData]:
    """The recipe's data: of training splits the part it wants. Raises MdlError as `sort_shards` does."""
    return announced_parts(recipe, sort_shards(recipe, shards))


def sort_shards(recipe: Recipe, shards: Iterable[Artifact]) -> dict[str, DomainData]:
    """Sort shards into the recipe's domains by what they say of themselves, whole.

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
        _check_task(recipe.domains[index.domain].task, index)
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
        if name in val:
            _check_alike(index, *val[name])
        found[name] = DomainData(
            artifact, val[name][0] if name in val else None, index, val.get(name, (0, None))[1]
        )
    return found


def _check_alike(train: ShardIndex, artifact: Artifact, val: ShardIndex) -> None:
    """Raise MdlError unless both splits have the same labels."""
    if val.classes != train.classes or val.space.verbs != train.space.verbs:
        raise MdlError(f"{val.domain}: train and val have different classes", artifact.path, "use one class list")
    if val.space.actions != train.space.actions:
        raise MdlError(f"{val.domain}: train and val have different actions", artifact.path, _PAIRS)


def wanted(recipe: Recipe, index: ShardIndex) -> ShardIndex:
    """What the recipe wants of a training split."""
    data = recipe.data
    return subset_of(index, data.fraction, data.per_class, data.subset_seed)


def announced_parts(recipe: Recipe, whole: Mapping[str, DomainData]) -> dict[str, DomainData]:
    """Of training splits the part that the recipe wants; says how much of them that is."""
    data, found = recipe.data, {}
    for name, entry in whole.items():
        index = entry.train_index
        check_sides(recipe, index)
        part = wanted(recipe, index)
        if part is not index:
            share = f"{100 * data.fraction:g}%" if data.per_class is None else f"{data.per_class} of a class"
            console.say(f"{name}: {len(part)} of {len(index)} training clips ({share}, seed {data.subset_seed})")
        if data.per_class is not None:
            warn_short(part, data.per_class)
        found[name] = replace(entry, train_index=part)
    return found


def train_spec(recipe: Recipe, bn: str, order: Order, clips: Mapping[str, int]) -> TrainSpec:
    """The recipe's training part as plain values. bn: how the model's BatchNorms treat domains.

    clips: of each domain, both splits.
    """
    train = recipe.train
    decay = decays_of(recipe, clips)
    # With one domain all that trains is its own, a backbone too.
    common = next(iter(decay.values())) if train.decay_by_size and len(recipe.domains) == 1 else None
    return TrainSpec(
        steps=tuple(_step_spec(step, order.epoch, common) for step in train.steps),
        domains=tuple(recipe.domains),
        batches=order.batches,
        bn=bn,
        seed=train.seed,
        decay=decay,
        mix=mix_of(recipe),
        ema=train.ema,
        sync_bn=train.sync_bn,
        channels_last=train.channels_last,
        checkpoint_every=train.checkpoint_every,
        keep=train.keep_checkpoints,
        val_every=recipe.val.every,
        recalibrate_batches=train.recalibrate_batches,
        headlines={name: _headline(part.task) for name, part in recipe.domains.items()},
        log_clips=train.log_clips,
    )


def objective_of(
    recipe: Recipe, features: int, spaces: Mapping[str, LabelSpace], world: World, order: Order
) -> Objective:
    """What the recipe minimises. features: the embedding's width; spaces: labels by domain."""
    part, augment = multitrain_spec(recipe), recipe.data.augment
    smoothing = Smoothing(augment.smoothing, augment.smooth_classes, augment.mix_scope)
    if part is None:
        tasks = {name: task_of(spaces[name]) for name in recipe.domains}
        weights = {name: domain.weight for name, domain in recipe.domains.items()}
        return TaskObjective(tasks, weights, recipe.losses.reduction, recipe.losses.domain_average, smoothing)
    classes = {name: space.classes for name, space in spaces.items()}
    outputs = {name: len(names) for name, names in classes.items()}
    criterion = MultitrainLoss(features, outputs, part, classes)
    exact = recipe.losses.inf is None or recipe.losses.inf.accum == "exact"
    parts = world.size * recipe.train.accumulate
    # Batches in turn are whole batches of their own, unless the informative loss takes them together.
    together = order.batches if criterion.expander is not None and exact else 1
    gather = gather_rows if world.size > 1 else None
    return MultitrainObjective(criterion, parts * together, world.size, gather, exact, smoothing)


def _headline(task: str) -> Headline:
    chosen = TASKS.load(task)
    return Headline(chosen.headline, chosen.higher_is_better)


def _step_spec(step: Step, epoch: int, decay: float | None) -> StepSpec:
    """epoch: updates of one epoch. decay: weight decay in the place of the optimizer's, if any."""
    schedule, scale = step.schedule.model_dump(), 1
    if schedule["unit"] == "epoch":
        scale, schedule["unit"] = epoch, "update"
    schedule["milestones"] = tuple(scale * milestone for milestone in schedule["milestones"])
    schedule["warmup"] *= scale
    updates = step.updates or (step.epochs or 0) * epoch
    optimizer = OptimizerSpec(**step.optimizer.model_dump())
    optimizer = optimizer if decay is None else replace(optimizer, weight_decay=decay)
    adapters = None if step.adapters is None else tuple(step.adapters)
    return StepSpec(step.regime, updates, optimizer, ScheduleSpec(**schedule), adapters, tuple(step.mute))


@dataclass(frozen=True)
class Scope:
    """What trains of a finished model, whose backbone and shared statistics stay as they are.

    only: the tensors of these names alone, and those below names that end in /. shared_factors: of a compressed
    model, the factors that domains share too.
    """

    only: tuple[str, ...] | None = None
    shared_factors: bool = False


def _within(spec: TrainSpec, scope: Scope) -> TrainSpec:
    """The training of a finished model: statistics that domains share would move for all of them."""
    bn = spec.bn if spec.bn in ("per_domain", "per_domain_stats") else "frozen"
    return replace(spec, only=scope.only, shared_factors=scope.shared_factors, bn=bn)


def fit(
    recipe: Recipe,
    model: MultiDomainModel,
    data: Mapping[str, DomainData],
    folder: Path,
    *,
    own_backbone: bool,
    workers: int,
    scope: Scope | None = None,
) -> Progress:
    """Train `model` in `folder`, continuing from the checkpoints there. scope: of a finished model's training."""
    from mdltool.model_store import stored_tensors

    world = join_world()
    order = order_of(recipe, {name: len(data[name].train_index) for name in recipe.domains})
    spec = train_spec(recipe, model.spec.bn, order, {name: part.clips for name, part in data.items()})
    spec = _within(spec, scope) if scope is not None else spec
    spaces = {name: data[name].train_index.space for name in recipe.domains}
    objective = objective_of(recipe, model.backbone.feature_dim, spaces, world, order)
    share = share_of(recipe, world.rank, world.size)
    accelerator = make_accelerator(recipe.train.precision, folder, world)
    parts = RunParts(
        loader=_loader(recipe, data, order, share, spec.total_updates, workers),
        validate=_validator(recipe, data, workers, world, accelerator.autocast),
        stored=lambda trained: stored_tensors(trained, own_backbone),
        accelerator=accelerator,
        per_update=share.batches(order.batches),
        world=world,
    )
    _say_epoch(data, order, spec)
    if recipe.train.decay_by_size:
        _say_decay(data, spec)
    if recipe.train.checkpoint_activations:
        model.checkpoint_activations()
    if recipe.train.compile:
        # Each domain is a way through the wrappers of its own, in both modes.
        torch._dynamo.config.recompile_limit = max(8, 4 * len(recipe.domains))
        model.backbone.compile()
    progress = Trainer(model, spec, objective, folder, parts).run()
    if world.is_main and any(True for _ in objective.parameters()):
        save_tensors(folder / "weights" / "training.safetensors", objective.state_dict())
    return progress


def _loader(
    recipe: Recipe, data: Mapping[str, DomainData], order: Order, share: Share, updates: int, workers: int
) -> Loader:
    streams = [
        Stream(
            data[name].train_index,
            sampling(recipe, name),
            train_transform(recipe, name),
            modalities(recipe, name),
            recipe.domains[name].swap_sides,
        )
        for name in recipe.domains
    ]

    def loader(start: int) -> TrainLoader:
        return TrainLoader(
            streams, order, seed=recipe.train.seed, workers=workers, updates=range(start, updates), share=share
        )

    return loader


def _say_epoch(data: Mapping[str, DomainData], order: Order, spec: TrainSpec) -> None:
    clips = ", ".join(f"{name} {len(part.train_index)}" for name, part in data.items())
    console.say(f"an epoch is {order.epoch} updates of {spec.total_updates} (clips: {clips})")


def _say_decay(data: Mapping[str, DomainData], spec: TrainSpec) -> None:
    named = ", ".join(f"{name} {decay:g} ({data[name].clips} clips)" for name, decay in spec.decay.items())
    console.say(f"weight decay by size: {named}")


def _validator(
    recipe: Recipe,
    data: Mapping[str, DomainData],
    workers: int,
    world: World,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Validate | None:
    """Scores the validation splits that are there."""
    indices = {name: part.val_index for name, part in data.items() if part.val_index is not None}

    def validate(model: MultiDomainModel) -> dict[str, dict[str, float]]:
        with autocast():
            return {n: score_split(recipe, model, n, index, workers, world) for n, index in indices.items()}

    return validate if indices else None


def score_split(
    recipe: Recipe, model: MultiDomainModel, domain: str, index: ShardIndex, workers: int, world: World
) -> dict[str, float]:
    """The task's metrics and its loss, which is over the clips that decode; NaN where none does."""
    task = task_of(index.space)
    loader = ViewLoader(
        index,
        val_views(recipe, domain),
        workers=workers,
        rank=world.rank,
        world=world.size,
        modalities=modalities(recipe, domain),
    )
    own = score_domain(model, loader, domain, task, device=model.mean.device)
    shares = gather_objects(own, world)
    metrics = _metrics(task, shares[0].merge(shares[1:]), index) if shares is not None else None
    found: dict[str, float] = broadcast_object(metrics, world)
    return found


def _metrics(task: Task, found: DomainScores, index: ShardIndex) -> dict[str, float]:
    scores, labels, wrong = tensors_of(found, index, count_missing=True)
    logits = torch.stack(found.logits) if found.logits else scores[~wrong]
    return task.metrics(scores, labels, wrong) | {"loss": float(task.loss(logits, labels[~wrong], "mean"))}


def _check_task(task: str, index: ShardIndex) -> None:
    if task != index.task:
        raise MdlError(
            f"{index.domain}: these shards are of the task {index.task}, the recipe says {task}",
            index.folder,
            f"--set domains.{index.domain}.task={index.task}",
        )
