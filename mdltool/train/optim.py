"""Optimisers and learning-rate schedules, from plain values."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerSpec:
    """weight_decay applies to every parameter, norms and biases included, as in Omi et al.'s runs (spec 3.4), or
    with `decay: matrices` to those of two and more dimensions. backbone_lr: the backbone's own rate (None: lr).
    clip_norm: the most L2 norm of all gradients together (None: no clipping).
    """

    name: str
    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay: str = "all"
    backbone_lr: float | None = None
    clip_norm: float | None = None


@dataclass(frozen=True)
class ScheduleSpec:
    """milestones and warmup count `unit`s: updates, or batch steps (one domain's forward and backward)."""

    name: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    warmup_from: float | None = None
    final_lr: float = 0.0
    unit: str = "update"


def make_optimizer(
    spec: OptimizerSpec,
    parameters: Iterable[nn.Parameter],
    backbone: Iterable[nn.Parameter] = (),
    decays: Mapping[int, float] | None = None,
) -> torch.optim.Optimizer:
    """SGD or AdamW, fused on GPUs. `backbone` says which of the parameters take backbone_lr; decays: id of a
    parameter -> its own weight decay, which what `decay: matrices` exempts does not take.

    A group's `scale` is what the schedule's rate is multiplied with. Without options there is one group.
    """
    parameters, decays = list(parameters), decays or {}
    own = {id(parameter) for parameter in backbone} if spec.backbone_lr is not None else set()
    grouped: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        takes_any = spec.decay == "all" or parameter.ndim > 1
        decay = decays.get(id(parameter), spec.weight_decay) if takes_any else 0.0
        grouped.setdefault((id(parameter) in own, decay), []).append(parameter)
    groups = [
        {
            "params": members,
            "weight_decay": decay,
            "scale": (spec.backbone_lr or spec.lr) / spec.lr if in_backbone else 1.0,
        }
        for (in_backbone, decay), members in grouped.items()
    ]
    fused = all(parameter.device.type == "cuda" for parameter in parameters)
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=fused)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, fused=fused)


def learning_rate(spec: ScheduleSpec, base: float, updates: int, batches_per_update: int) -> Callable[[int], float]:
    """update (from 0, within its step of the recipe) -> learning rate.

    step: base * gamma^(milestones passed). cosine: from base to final_lr over the step. Both after a linear warm-up
    from base / warmup, or from warmup_from to reach base at `warmup`.
    """
    scale = batches_per_update if spec.unit == "batch" else 1
    total = updates * scale

    def rate(update: int) -> float:
        position = update * scale
        if position < spec.warmup and spec.warmup_from is not None:
            return spec.warmup_from + (base - spec.warmup_from) * position / spec.warmup
        if position < spec.warmup:
            return base * (position + 1) / spec.warmup
        if spec.name == "step":
            return base * spec.gamma ** bisect.bisect_right(sorted(spec.milestones), position)
        if spec.name == "cosine":
            progress = (position - spec.warmup) / max(1, total - spec.warmup)
            return spec.final_lr + (base - spec.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return base

    return rate
