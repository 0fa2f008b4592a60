"""What an update minimises: a sum over its micro-batches and processes, whatever their number.

Every micro-batch gives its part of the whole batches' objective, so that the SUM of all parts' gradients is the
gradient of the whole (spec omi_mdl 6.1; spec multitrain 6.1). Shape suffixes: B clips, P positions, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mdltool.losses.multitrain import MultitrainLoss, Update
from mdltool.losses.precision import full
from mdltool.losses.targets import mixed_targets
from mdltool.losses.weighting import UncertaintyWeights
from mdltool.model import MultiDomainModel
from mdltool.tasks import Task
from mdltool.types import StreamTokens


@dataclass(frozen=True)
class Clips:
    """A micro-batch on its device, mixed where the recipe mixes.

    frames: uint8 [B, C, T, H, W], or normalised floats. labels, domain, domain_B, whole, streams: as of
    types.Batch.
    partner_B: int64 [B], whom each clip is mixed with, and own_share, what is left of itself; None: not mixed.
    """

    frames: Tensor
    labels: Tensor
    domain: str | None
    domain_B: Tensor
    whole: Mapping[str, int]
    partner_B: Tensor | None = None
    own_share: float = 1.0
    streams: Mapping[str, StreamTokens] = field(default_factory=dict)

    def partners(self) -> Tensor:
        """partner_B; each clip itself where none is mixed."""
        own_B = torch.arange(len(self.labels), device=self.labels.device)
        return own_B if self.partner_B is None else self.partner_B


@dataclass(frozen=True)
class Part:
    """A micro-batch's part. total: for backward. losses: domain -> (sum over its clips of their losses before
    weights, clips), for the log. parts: further numbers for the log, of the whole batch.
    """

    total: Tensor
    losses: dict[str, tuple[Tensor, int]]
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Smoothing:
    """Soft targets: smoothing is spread over the classes (spec multitrain 5.3); classes: one count for every
    domain, the authors' slip. scope: what a partner of another domain does, `masked`, `both` or `same`.
    """

    amount: float = 0.0
    classes: int | None = None
    scope: str = "masked"


class Objective(nn.Module, ABC):
    """Its parameters train beside the model's and are for training only."""

    two_passes = False  # whether `prepare` sees all of an update's micro-batches before `forward` sees each

    @abstractmethod
    def forward(self, model: MultiDomainModel, clips: Clips, number: int = 0) -> Part:
        """Part of the objective of an update's micro-batch of that number."""

    def prepare(
        self,
        model: MultiDomainModel,
        batches: Sequence[Callable[[], Clips]],
        counts: Mapping[str, int],
        backward: Callable[[Tensor], float],
    ) -> dict[str, Tensor]:
        """The first of two passes over an update's micro-batches. Returns terms for the log.

        batches: make a micro-batch and seed what its forward draws. counts: clips of the update by domain.
        backward: back-propagates and returns the factor by which it scaled the loss.
        """
        return {}

    def weightless(self) -> list[nn.Parameter]:
        """Parameters without weight decay that gradient clipping leaves out."""
        return []


class TaskObjective(Objective):
    """Each domain's own loss, for batches of one domain each (Omi et al., eq. 3 and 3.4).

    weights: of the domains' losses. reduction: `mean` over a whole batch, or `sum`. average: divided by the number
    of domains.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float] | None = None,
        reduction: str = "mean",
        average: bool = False,
        smoothing: Smoothing | None = None,
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.weights = dict(weights or {})
        self.reduction = reduction
        self.average = average
        self.smoothing = smoothing or Smoothing()

    def forward(self, model: MultiDomainModel, clips: Clips, number: int = 0) -> Part:
        domain = clips.domain
        assert domain is not None, "batches of several domains want another objective"
        logits_BN = full(model(clips.frames, domain, clips.streams))
        task = self.tasks[domain]
        total = task.loss(logits_BN, self._targets(clips, task, logits_BN.shape[1]), "sum")
        losses = {domain: (total.detach(), len(clips.labels))}
        if self.reduction == "mean":
            total = total / sum(clips.whole.values())
        total = total * self.weights.get(domain, 1.0)
        return Part(total / len(self.tasks) if self.average else total, losses)

    def _targets(self, clips: Clips, task: Task, outputs: int) -> Tensor:
        if clips.partner_B is None and not self.smoothing.amount:
            return clips.labels
        amount = self.smoothing.amount
        return task.soft_labels(clips.labels, outputs, clips.partners(), clips.own_share, amount)


class MultitrainObjective(Objective):
    """Informative loss, projections and loss weights of Liang et al. 2022 (eq. 6; spec multitrain 2).

    calls: micro-batches of an update over all processes. processes: how many share it. gather: rows of this process
    -> rows of all, with gradient; None: alone. exact: the informative loss of an update is that of all its clips
    together, by two passes (6.3); else of each micro-batch for itself.
    """

    def __init__(
        self,
        criterion: MultitrainLoss,
        calls: int = 1,
        processes: int = 1,
        gather: Callable[[Tensor], Tensor] | None = None,
        exact: bool = True,
        smoothing: Smoothing | None = None,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.calls, self.processes, self.gather = calls, processes, gather
        self.two_passes = exact and criterion.expander is not None and calls > processes
        self.smoothing = smoothing
        self._gradients: tuple[Tensor, ...] = ()
        self._counts: Mapping[str, int] = {}

    def forward(self, model: MultiDomainModel, clips: Clips, number: int = 0) -> Part:
        features_BPF = model.features(clips.frames, clips.domain)
        z_BF = features_BPF.mean(dim=1)
        logits = {domain: model.logits(features_BPF, domain) for domain in self.criterion.domains}
        counts = self._counts if self.two_passes else clips.whole
        whole = Update(sum(counts.values()), counts, self.calls, self.gather)
        total, losses = self.criterion.classification(clips.domain_B, logits, self._targets(clips), whole)
        parts: dict[str, Tensor] = {}
        if self.two_passes:
            total = total + (full(z_BF) * self._gradients[number]).sum()
        else:
            informative, terms = self.criterion.informative(z_BF, whole)
            total = total + informative
            parts = terms if self.criterion.expander is not None else {}
        if isinstance(self.criterion.weights, UncertaintyWeights):
            parts = parts | {f"log_variance_{d}": s for d, s in self.criterion.weights.log_variances.items()}
        own = torch.bincount(clips.domain_B, minlength=len(self.criterion.domains)).tolist()
        clips_of = dict(zip(self.criterion.domains, own, strict=True))
        norm = {d: whole.clips if self.criterion.spec.norm == "batch" else counts[d] for d in losses}
        logged = {d: (loss.detach() * norm[d], clips_of[d]) for d, loss in losses.items()}
        return Part(total, logged, {name: value.detach() for name, value in parts.items()})

    def prepare(
        self,
        model: MultiDomainModel,
        batches: Sequence[Callable[[], Clips]],
        counts: Mapping[str, int],
        backward: Callable[[Tensor], float],
    ) -> dict[str, Tensor]:
        """The gradient of the informative loss with respect to every embedding.

        BatchNorm statistics are put back, since the second pass moves them again.
        """
        self._counts = counts
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
        found = []
        with torch.no_grad():
            for make in batches:
                clips = make()
                found.append(model.features(clips.frames, clips.domain).mean(dim=1))
            for buffer, value in kept:
                buffer.copy_(value)
        leaf_BF = full(torch.cat(found)).requires_grad_()
        whole = Update(sum(counts.values()), counts, self.processes, self.gather)
        total, parts = self.criterion.informative(leaf_BF, whole)
        scale = backward(total)
        assert leaf_BF.grad is not None
        self._gradients = (leaf_BF.grad / scale).split([len(z_BF) for z_BF in found])
        return {name: value.detach() for name, value in parts.items()}

    def weightless(self) -> list[nn.Parameter]:
        weightings = (self.criterion.weights, self.criterion.informative_weights)
        return [p for module in weightings if module is not None for p in module.parameters()]

    def _targets(self, clips: Clips) -> Tensor | dict[str, Tensor]:
        smoothing = self.smoothing
        if smoothing is None or (clips.partner_B is None and not smoothing.amount):
            return clips.labels
        return mixed_targets(
            clips.labels,
            clips.domain_B,
            self.criterion.classes,
            clips.partners(),
            clips.own_share,
            smoothing=smoothing.amount,
            smooth_classes=smoothing.classes,
            both=smoothing.scope == "both",
        )
