"""What a training run is, as plain values, and what it needs from its stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import Tensor

from mdltool.data.mixing import MixSpec
from mdltool.model import MultiDomainModel
from mdltool.train.distributed import World
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.types import Batch

Loader = Callable[[int], Iterable[Batch]]
"""start update -> this process's micro-batches from there on."""

Validate = Callable[[MultiDomainModel], Mapping[str, Mapping[str, float]]]
"""model -> {domain: {metric: value}}; called by every process, and the same on all of them."""


@dataclass(frozen=True)
class StepSpec:
    """One step of a recipe: what trains, for how many updates, and how. adapters: the types that train; None: as
    the regime says. mute: types that stay out of the output.
    """

    regime: str
    updates: int
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    adapters: tuple[str, ...] | None = None
    mute: tuple[str, ...] = ()


@dataclass(frozen=True)
class Headline:
    """The metric of a domain by which weights are compared, and its direction."""

    metric: str = "top1"
    higher_is_better: bool = True


@dataclass(frozen=True)
class TrainSpec:
    """Plain values of a whole run.

    domains: in the recipe's order. batches: whole batches of an update. decay: domain -> weight decay of its own
    parameters, where it is not the optimizer's. ema: decay of the averaged weights, 0: none. keep: how many
    checkpoints. headlines: by domain. log_clips: write the keys of every update's clips.
    """

    steps: tuple[StepSpec, ...]
    domains: tuple[str, ...]
    batches: int
    bn: str
    seed: int = 0
    decay: Mapping[str, float] = field(default_factory=dict)
    mix: MixSpec | None = None
    ema: float = 0.0
    sync_bn: bool = False
    channels_last: bool = True
    checkpoint_every: int = 1000
    keep: int = 2
    val_every: int = 0
    recalibrate_batches: int = 200
    headlines: Mapping[str, Headline] = field(default_factory=dict)
    log_clips: bool = False
    only: tuple[str, ...] | None = None  # train the tensors whose names begin so alone
    shared_factors: bool = False  # train the factors that domains of a compressed model share

    @property
    def total_updates(self) -> int:
        return sum(step.updates for step in self.steps)


@dataclass
class RunParts:
    """What a run needs from its stage: data, validation, what to store, and the machine.

    per_update: micro-batches of an update that this process reads; of each whole batch it reads `parts`.
    """

    loader: Loader
    validate: Validate | None
    stored: Callable[[MultiDomainModel], Mapping[str, Tensor]]
    accelerator: Accelerator
    per_update: int
    world: World = field(default_factory=World)


@dataclass
class Progress:
    """What a checkpoint carries beside tensors."""

    update: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_update: int | None = None
    best_seconds: float | None = None
    last_scores: dict[str, dict[str, float]] = field(default_factory=dict)
    scaler: dict[str, float] | None = None  # of fp16's losses
