"""The only training loop (design, section 8; spec omi_mdl 5.2 and 6.1).

An update is a number of micro-batches, each a forward and a backward pass, and then one optimizer step. The
position is the number of updates done: it decides the data, the augmentation, dropout and the learning rate; a
checkpoint plus that number is everything.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdltool import console
from mdltool.data import mixing
from mdltool.data.order import rng_for
from mdltool.errors import MdlError, Stopped
from mdltool.model import MultiDomainModel
from mdltool.sync_norm import synchronise
from mdltool.train.average import Average
from mdltool.train.checkpoint import load_checkpoint, restore_optimizer, save_checkpoint, save_tensors
from mdltool.train.distributed import broadcast_object, share_buffers, sum_gradients, sum_over_ranks
from mdltool.train.log import MetricsLog
from mdltool.train.objective import Clips, Objective
from mdltool.train.optim import learning_rate, make_optimizer
from mdltool.train.plan import Headline, Progress, RunParts, StepSpec, TrainSpec
from mdltool.train.recalibrate import recalibrate
from mdltool.train.signals import stop_signals
from mdltool.train.tally import Line, Tally, domains_of, update_counts
from mdltool.types import Batch, StreamTokens

_MIX = 99  # purpose of the random number that decides how a batch is mixed


class Trainer:
    """Runs a TrainSpec on a model; `folder` receives metrics.jsonl, checkpoints/ and weights/."""

    def __init__(
        self, model: MultiDomainModel, spec: TrainSpec, objective: Objective, folder: Path, run: RunParts
    ) -> None:
        self.model = model
        self.spec = spec
        self.objective = objective
        self.folder = folder
        self.run_parts = run
        self.world = run.world
        self.progress = Progress()
        self.device = run.accelerator.device
        self._average: Average | None = None
        self._clip_norm: float | None = None
        self._restored: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._seen: dict[str, int] = {}
        self._stop = False
        self._final = True  # whether the model computes what it will when it is stored

    def run(self) -> Progress:
        """Train to the end, from the newest checkpoint where there is one.

        Raises MdlError for a loss that is not finite and Stopped after a signal, on every process.
        """
        self._restored = load_checkpoint(self.folder / "checkpoints")
        self.model.to(self.device)
        self.objective.to(self.device)
        if self.spec.channels_last:
            self.model.channels_last()
        if self.spec.sync_bn and self.world.size > 1:
            synchronise(self.model, sum_over_ranks)
        if self._restored is not None:
            self._restore(*self._restored)
        self._start_together()
        log = MetricsLog(self.folder, self.progress.update, self.run_parts.accelerator, self.world)
        bar = console.progress("train", self.spec.total_updates, "updates", before=self.progress.update)
        try:
            with stop_signals() as stopped, bar as advance:
                self._run_steps(log, stopped, advance)
            if self.spec.bn == "recalibrate":
                self._recalibrate()
            if self.progress.update not in self._validated:
                self._validate(log)
        finally:
            log.close()
        if self._average is not None and self.world.is_main:
            with self._average.in_place():
                save_tensors(self.folder / "weights" / "ema.safetensors", self.run_parts.stored(self.model))
        return self.progress

    def _restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self.progress = Progress(**header["progress"])
        self.model.load_tensors(_under("model/", tensors), self.folder)
        self.objective.load_state_dict(_under("objective/", tensors))
        scaler = self.run_parts.accelerator.scaler
        if scaler is not None and self.progress.scaler is not None:
            scaler.load_state_dict(self.progress.scaler)
        console.say(f"resuming after update {self.progress.update}")

    def _start_together(self) -> None:
        """Raise MdlError where this process would begin elsewhere than the first one."""
        if broadcast_object(self.progress.update, self.world) != self.progress.update:
            raise MdlError(
                "this process does not see the checkpoint that the first one does",
                self.folder,
                "put --out on a file system that all of them share",
            )

    @property
    def _validated(self) -> range:
        """The updates after which the run is validated; each has a checkpoint, written before."""
        every = 0 if self.spec.bn == "recalibrate" else self.spec.val_every
        return range(every, self.spec.total_updates + 1, every) if every else range(0)

    def _run_steps(self, log: MetricsLog, stopped: Callable[[], bool], advance: Callable[..., None]) -> None:
        batches = iter(self.run_parts.loader(self.progress.update))
        if self.spec.ema:
            self._average = Average(self.model, self.spec.ema)
            if self._restored is not None:
                self._average.load(_under("ema/", self._restored[0]))
        begin = 0
        for step in self.spec.steps:
            end = begin + step.updates
            self.model.apply_regime(
                step.regime, self.spec.bn, self.spec.only, self.spec.shared_factors, step.adapters
            )
            self.model.mute(step.mute)
            self._final = step.mute == self.spec.steps[-1].mute
            if begin < self.progress.update <= end and self.progress.update in self._validated:
                self._validate(log)  # resumed: the checkpoint is of the moment before
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
        parameters = [p for p in (*self.model.parameters(), *self.objective.parameters()) if p.requires_grad]
        optimizer = make_optimizer(step.optimizer, parameters, self.model.backbone_parameters(), self._decays())
        if self._restored is not None and self.progress.update > begin:
            restore_optimizer(optimizer, *self._restored)
        self._restored = None
        self._clip_norm = step.optimizer.clip_norm
        self.run_parts.accelerator.free_memory()  # of the step before, whose optimizer it would unscale again
        optimizer = self.run_parts.accelerator.prepare(optimizer)
        rate = learning_rate(step.schedule, step.optimizer.lr, step.updates, self.spec.batches)
        for update in range(self.progress.update, begin + step.updates):
            started = time.monotonic()
            lr = rate(update - begin)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            lines = self._update(update, batches, parameters, optimizer, log, stopped)
            self.progress.update = update + 1
            self.progress.seconds += time.monotonic() - started
            advance(1, f"loss {sum(line.loss for line in lines) / len(lines):.3f}")
            self._after_update(optimizer, log)

    def _decays(self) -> dict[int, float]:
        """id of a parameter -> its weight decay, where it is not the optimizer's."""
        decays = {id(p): 0.0 for p in self.objective.weightless()}
        for key, tensor in self.model.tensors().items():
            owner = key.split("/", 1)[0]
            if owner in self.spec.decay:
                decays[id(tensor)] = self.spec.decay[owner]
        return decays

    def _update(
        self,
        update: int,
        batches: Iterator[Batch],
        parameters: Sequence[torch.nn.Parameter],
        optimizer: Any,
        log: MetricsLog,
        stopped: Callable[[], bool],
    ) -> list[Line]:
        """Forward and backward of every micro-batch, one optimizer step."""
        self.model.train()
        optimizer.zero_grad(set_to_none=True)
        started = time.monotonic()
        tally = Tally(self.spec.domains, self.spec.batches)
        taken: Iterable[Batch] = tally.timed(itertools.islice(batches, self.run_parts.per_update))
        if self.objective.two_passes:
            taken = list(taken)
            tally.terms |= self._first_pass(update, taken)
        for index, batch in enumerate(taken):
            clips = self._clips(update, index, batch)
            with self.run_parts.accelerator.autocast():
                part = self.objective(self.model, clips, index)
            self.run_parts.accelerator.backward(part.total)
            tally.add(batch, part)
            self._seen |= dict.fromkeys(domains_of(batch, self.spec.domains), update)
            if self.spec.log_clips:
                log.clips(update + 1, batch)
        lines, self._stop = tally.finish(update, stopped(), self.world)
        sum_gradients(parameters, self.world)
        if self._clip_norm is not None:
            left_out = {id(p) for p in self.objective.weightless()}
            clipped = [p for p in parameters if id(p) not in left_out]
            self.run_parts.accelerator.unscale_gradients(optimizer)
            torch.nn.utils.clip_grad_norm_(clipped, self._clip_norm)
        optimizer.step()
        self.model.constrain()
        if self._average is not None:
            self._average.update(update)
        log.update(update + 1, lines, tally, optimizer.param_groups[0]["lr"], time.monotonic() - started)
        return lines

    def _first_pass(self, update: int, batches: Sequence[Batch]) -> dict[str, Tensor]:
        accelerator = self.run_parts.accelerator

        def backward(loss: Tensor) -> float:
            accelerator.backward(loss)
            return float(accelerator.scaler.get_scale()) if accelerator.scaler is not None else 1.0

        def maker(index: int, batch: Batch) -> Callable[[], Clips]:
            return lambda: self._clips(update, index, batch)

        makers = [maker(index, batch) for index, batch in enumerate(batches)]
        with accelerator.autocast():
            return self.objective.prepare(self.model, makers, update_counts(batches), backward)

    def _clips(self, update: int, index: int, batch: Batch) -> Clips:
        """A micro-batch on the device, mixed; seeds what its forward draws."""
        spec = self.spec
        seed = np.random.SeedSequence([spec.seed, update, index, self.world.rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        frames = batch.frames.to(self.device, non_blocking=True)
        partner_B, own_share = batch.partner_B, 1.0
        if spec.mix is not None and partner_B is not None:
            partner_B = partner_B.to(self.device)
            rng = rng_for(spec.seed, "", _MIX, update, batch.number)
            mix = mixing.draw(spec.mix, rng, frames.shape[-2], frames.shape[-1])
            frames, own_share = mixing.apply(frames, partner_B, mix), mix.own_share
        if spec.channels_last:
            frames = frames.contiguous(memory_format=torch.channels_last_3d)
        domain_B = batch.domain_B
        if domain_B is None:
            assert batch.domain is not None
            domain_B = torch.full((len(frames),), spec.domains.index(batch.domain))
        whole = batch.whole or {d: len(frames) for d in (batch.domain,) if d is not None}
        labels = batch.labels.to(self.device, non_blocking=True)
        streams = {
            name: StreamTokens(s.tokens_BMD.to(self.device), s.mask_BM.to(self.device))
            for name, s in batch.streams.items()
        }
        return Clips(frames, labels, batch.domain, domain_B.to(self.device), whole, partner_B, own_share, streams)

    def _after_update(self, optimizer: Any, log: MetricsLog) -> None:
        """Write the checkpoint, then validate: what ends the run meanwhile costs no update."""
        update, spec = self.progress.update, self.spec
        stop, validated = self._stop and update < spec.total_updates, update in self._validated
        if stop or validated or update % spec.checkpoint_every == 0 or update == spec.total_updates:
            self._share_buffers()
            if self.world.is_main:
                self._save(getattr(optimizer, "optimizer", optimizer))
        if stop:
            raise Stopped(f"stopped by a signal after update {update}; its checkpoint is written")
        if validated:
            self._validate(log)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"model/{key}": value for key, value in self.model.tensors().items()}
        tensors |= {f"objective/{key}": value for key, value in self.objective.state_dict().items()}
        if self._average is not None:
            tensors |= {f"ema/{key}": value for key, value in self._average.shadow.items()}
        scaler = self.run_parts.accelerator.scaler
        self.progress.scaler = scaler.state_dict() if scaler is not None else None
        progress = dict(vars(self.progress))
        save_checkpoint(
            self.folder / "checkpoints", self.progress.update, tensors, optimizer, progress, self.spec.keep
        )

    def _share_buffers(self) -> None:
        """Each domain's buffers from a process that has seen it; what all share from the first."""
        owned: dict[str, dict[str, Tensor]] = {domain: {} for domain in ("", *self.spec.domains)}
        for key, tensor in self.model.tensors().items():
            if not isinstance(tensor, torch.nn.Parameter):
                owner = key.split("/", 1)[0]
                owned[owner if owner in owned else ""][key] = tensor
        share_buffers(owned, self._seen, self.world)

    def _recalibrate(self) -> None:
        updates = self.spec.recalibrate_batches
        batches = self.run_parts.loader(max(0, self.spec.total_updates - updates))
        reduce = sum_over_ranks if self.world.size > 1 else None
        recalibrate(self.model, itertools.islice(batches, updates * self.run_parts.per_update), self.device, reduce)

    def _validate(self, log: MetricsLog) -> None:
        """Score the validation split; keep the best weights, by the mean of the headlines (errors count less)."""
        if self.run_parts.validate is None:
            return
        self._share_buffers()
        self.model.eval()
        averaged = self._average.in_place() if self._average is not None else contextlib.nullcontext()
        with averaged:
            scores = {domain: dict(values) for domain, values in self.run_parts.validate(self.model).items()}
            update = self.progress.update
            log.validation(update, scores, self.progress.seconds)
            shown, total = [], 0.0
            for domain, values in scores.items():
                headline = self.spec.headlines.get(domain, Headline())
                value = values[headline.metric]
                shown.append(f"{domain} {headline.metric} {value:.3f}")
                total += value if headline.higher_is_better else -value
            console.say(f"update {update}: val {', '.join(shown)}")
            self.progress.last_scores = scores
            mean = total / len(scores)  # NaN, of a split in which no clip decodes, is greater than nothing
            best = -math.inf if self.progress.best_score is None else self.progress.best_score
            if self._final and mean > best:
                self.progress.best_score = mean
                self.progress.best_update = update
                self.progress.best_seconds = self.progress.seconds
                if self.world.is_main:
                    save_tensors(self.folder / "weights" / "best.safetensors", self.run_parts.stored(self.model))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
