"""The only training loop (design, section 8; spec omi_mdl 5.2 and 6.1).

An update is D batch steps, one per domain, and then one optimizer step. The position is the number of updates done:
it decides the data, the augmentation, dropout and the learning rate; a checkpoint plus that number is everything.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from mdltool import console
from mdltool.errors import MdlError, Stopped
from mdltool.model import MultiDomainModel
from mdltool.tasks import Task
from mdltool.train.checkpoint import load_checkpoint, restore_optimizer, save_checkpoint, save_tensors
from mdltool.train.distributed import World, sum_gradients
from mdltool.train.log import MetricsLog
from mdltool.train.optim import OptimizerSpec, ScheduleSpec, learning_rate, make_optimizer
from mdltool.types import Batch

Loader = Callable[[int], Iterable[Batch]]
"""start update -> batches from there on: for each update, for each round, one of every domain."""

Validate = Callable[[MultiDomainModel], Mapping[str, Mapping[str, float]]]
"""model -> {domain: {"top1": ..., "loss": ...}}, fractions."""


@dataclass(frozen=True)
class StepSpec:
    """One step of a recipe: what trains, for how many updates, and how."""

    regime: str
    updates: int
    optimizer: OptimizerSpec
    schedule: ScheduleSpec


@dataclass(frozen=True)
class TrainSpec:
    """Plain values of a whole run. batch: global clips per domain; weights: of the domains' losses."""

    steps: tuple[StepSpec, ...]
    batch: dict[str, int]
    weights: dict[str, float]
    bn: str
    seed: int = 0
    reduction: str = "mean"
    domain_average: bool = False
    rounds_per_update: int = 1
    channels_last: bool = True
    checkpoint_every: int = 1000
    val_every: int = 0
    recalibrate_batches: int = 200
    headline: str = "top1"
    only: str | None = None  # train this domain's parts alone

    @property
    def total_updates(self) -> int:
        return sum(step.updates for step in self.steps)


@dataclass
class Progress:
    """What a checkpoint carries beside tensors."""

    update: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_update: int | None = None
    best_seconds: float | None = None
    last_scores: dict[str, dict[str, float]] = field(default_factory=dict)


class Trainer:
    """Runs a TrainSpec on a model; `folder` receives metrics.jsonl, checkpoints/ and weights/."""

    def __init__(
        self, model: MultiDomainModel, spec: TrainSpec, tasks: Mapping[str, Task], folder: Path, run: RunParts
    ) -> None:
        self.model = model
        self.spec = spec
        self.tasks = tasks
        self.folder = folder
        self.run_parts = run
        self.progress = Progress()
        self._clip_norm: float | None = None
        self.device = run.accelerator.device
        self._restored: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def run(self) -> Progress:
        """Train to the end, from the newest checkpoint where there is one.

        Raises MdlError for a loss that is not finite and Stopped after a signal.
        """
        self._restored = load_checkpoint(self.folder / "checkpoints")
        self.model.to(self.device)
        if self.spec.channels_last:
            self.model.channels_last()
        if self._restored is not None:
            tensors, header = self._restored
            self.progress = Progress(**header["progress"])
            state = {key[len("model/") :]: t for key, t in tensors.items() if key.startswith("model/")}
            self.model.load_tensors(state, self.folder)
            console.say(f"resuming after update {self.progress.update}")
        log = MetricsLog(self.folder / "metrics.jsonl", self.progress.update, self.run_parts.accelerator)
        try:
            with _stop_signals() as stopped, self._bar() as advance:
                self._run_steps(log, stopped, advance)
            self._recalibrate()
            if self.spec.bn == "recalibrate" or self.progress.update not in self._validated:
                self._validate(log)
        finally:
            log.close()
        return self.progress

    @property
    def _validated(self) -> range:
        every = self.spec.val_every
        return range(every, self.spec.total_updates + 1, every) if every else range(0)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[..., None]]:
        with console.progress("train", self.spec.total_updates, "updates") as advance:
            advance(self.progress.update)
            yield advance

    def _run_steps(self, log: MetricsLog, stopped: Callable[[], bool], advance: Callable[..., None]) -> None:
        batches = iter(self.run_parts.loader(self.progress.update))
        begin = 0
        for step in self.spec.steps:
            end = begin + step.updates
            self.model.apply_regime(step.regime, self.spec.bn, self.spec.only)
            if self.progress.update < end:
                self._run_step(step, begin, batches, log, stopped, advance)
            begin = end

    def _run_step(
        self,
        step: StepSpec,
        begin: int,
        batches: Iterator[Batch],
        log: MetricsLog,
        stopped: Callable[[], bool],
        advance: Callable[..., None],
    ) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = make_optimizer(step.optimizer, parameters, self.model.backbone_parameters())
        if self._restored is not None and self.progress.update > begin:
            restore_optimizer(optimizer, *self._restored)
        self._restored = None
        self._clip_norm = step.optimizer.clip_norm
        optimizer = self.run_parts.accelerator.prepare(optimizer)
        batches_per_update = len(self.spec.batch) * self.spec.rounds_per_update
        rate = learning_rate(step.schedule, step.optimizer.lr, step.updates, batches_per_update)
        for update in range(self.progress.update, begin + step.updates):
            started = time.monotonic()
            lr = rate(update - begin)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            loss = self._update(update, batches, parameters, optimizer, log, lr)
            self.progress.update = update + 1
            self.progress.seconds += time.monotonic() - started
            advance(1, f"loss {loss:.3f}")
            self._after_update(optimizer, log, stopped)

    def _update(
        self,
        update: int,
        batches: Iterator[Batch],
        parameters: Sequence[torch.nn.Parameter],
        optimizer: Any,
        log: MetricsLog,
        lr: float,
    ) -> float:
        """D batch steps (times rounds), one optimizer step. Returns the mean loss."""
        self.model.train()
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for index in range(len(self.spec.batch) * self.spec.rounds_per_update):
            started = time.monotonic()
            batch = next(batches)
            waited = time.monotonic() - started
            loss = self._batch_step(update, index, batch)
            seconds = time.monotonic() - started
            losses.append(loss)
            speed = round(len(batch.keys) / seconds, 2)
            log.write(
                update + 1,
                batch.domain,
                loss=loss,
                lr=lr,
                clips_per_second=speed,
                data_wait=round(waited / seconds, 4),
            )
            if batch.skipped:
                log.write(update + 1, batch.domain, skipped=[key for key, _ in batch.skipped])
        sum_gradients(parameters, self.run_parts.world)
        if self._clip_norm is not None:
            self.run_parts.accelerator.clip_grad_norm_(parameters, self._clip_norm)
        optimizer.step()
        return sum(losses) / len(losses)

    def _batch_step(self, update: int, index: int, batch: Batch) -> float:
        """Forward and backward of one domain's batch; returns its mean loss before weights."""
        spec, task, domain = self.spec, self.tasks[batch.domain], batch.domain
        seed = np.random.SeedSequence([spec.seed, update, index, self.run_parts.world.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        frames = batch.frames.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        if spec.channels_last:
            frames = frames.contiguous(memory_format=torch.channels_last_3d)
        with self.run_parts.accelerator.autocast():
            logits = self.model(frames, domain)
        total = task.loss(logits.float() if logits.dtype != torch.float64 else logits, labels, "sum")
        mean = total / len(labels)
        value = float(mean.detach())
        if not math.isfinite(value):
            raise MdlError(
                f"the loss of {domain} is {value} at update {update + 1}",
                f"clips {', '.join(batch.keys)}",
                "lower the learning rate, or look at these clips; the last checkpoint is kept",
            )
        # The global batch scales the sum, so that a SUM over ranks gives the mean over the whole batch.
        loss = total / spec.batch[domain] if spec.reduction == "mean" else total
        loss = loss * spec.weights[domain]
        if spec.domain_average:
            loss = loss / len(spec.batch)
        self.run_parts.accelerator.backward(loss)
        return value

    def _after_update(self, optimizer: Any, log: MetricsLog, stopped: Callable[[], bool]) -> None:
        update, spec = self.progress.update, self.spec
        if update in self._validated and spec.bn != "recalibrate":
            self._validate(log)
        stop = stopped()
        if stop or update % spec.checkpoint_every == 0 or update == spec.total_updates:
            if self.run_parts.world.is_main:
                inner = getattr(optimizer, "optimizer", optimizer)
                progress = dict(vars(self.progress))
                save_checkpoint(self.folder / "checkpoints", update, self.model.tensors(), inner, progress)
            if stop and update < spec.total_updates:
                raise Stopped(f"stopped by a signal after update {update}; its checkpoint is written")

    def _validate(self, log: MetricsLog) -> None:
        """Score the validation split; keep the best weights by the mean over domains."""
        if self.run_parts.validate is None:
            return
        self.model.eval()
        scores = {domain: dict(values) for domain, values in self.run_parts.validate(self.model).items()}
        update, headline = self.progress.update, self.spec.headline
        for domain, values in scores.items():
            named = {f"val_{key}": value for key, value in values.items()}
            log.write(update, domain, **named, seconds=round(self.progress.seconds, 3))
        mean = sum(values[headline] for values in scores.values()) / len(scores)
        shown = ", ".join(f"{domain} {values[headline]:.3f}" for domain, values in scores.items())
        console.say(f"update {update}: val {headline} {shown}")
        self.progress.last_scores = scores
        if self.progress.best_score is None or mean > self.progress.best_score:
            self.progress.best_score = mean
            self.progress.best_update = update
            self.progress.best_seconds = self.progress.seconds
            if self.run_parts.world.is_main:
                save_tensors(self.folder / "weights" / "best.safetensors", self.run_parts.stored(self.model))

    def _recalibrate(self) -> None:
        """`bn: recalibrate`: estimate each domain's BatchNorm statistics by forward passes (spec omi_mdl 6.4)."""
        if self.spec.bn != "recalibrate":
            return
        norms = list(self.model.norms.values())
        for norm in norms:
            norm.use_shared = False
            norm.recalibrating = True
            norm.reset_statistics()
        self.model.eval()
        for norm in norms:
            norm.train()
        rounds = self.spec.recalibrate_batches
        batches = iter(self.run_parts.loader(max(0, self.spec.total_updates - rounds)))
        with torch.no_grad():
            for _ in range(rounds * len(self.spec.batch)):
                batch = next(batches, None)
                if batch is None:
                    break
                self.model(batch.frames.to(self.device), batch.domain)
        for norm in norms:
            norm.recalibrating = False
        self.model.eval()


@dataclass
class RunParts:
    """What a run needs from its stage: data, validation, what to store, and the machine."""

    loader: Loader
    validate: Validate | None
    stored: Callable[[MultiDomainModel], Mapping[str, Tensor]]
    accelerator: Accelerator
    world: World = field(default_factory=World)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 ask for a checkpoint after the current update. Yields "was there one?"."""
    caught: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, lambda received, _: caught.append(received))
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
