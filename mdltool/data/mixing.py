"""Mixup and CutMix of a batch on its device: one draw per batch (spec multitrain 5.3).

Targets are the task's (tasks.Task.soft_labels), of a batch of several domains in losses/targets.py.
Shape suffixes: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdltool.errors import MdlError

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class MixSpec:
    """Alphas of the two Beta(alpha, alpha); 0 is off. probability: of mixing a batch at all. switch_probability: of
    CutMix, where both are on.

    Raises MdlError for negative alphas and for what is no probability.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    def __post_init__(self) -> None:
        if min(self.mixup_alpha, self.cutmix_alpha) < 0:
            raise MdlError("alpha of mixup or cutmix is negative", None, "0 turns it off")
        if not (0 <= self.probability <= 1 and 0 <= self.switch_probability <= 1):
            raise MdlError("a probability of mixing is outside 0..1", None, "give a number from 0 to 1")


@dataclass(frozen=True)
class Mix:
    """own_share: of a clip in its mixture, 0..1. box: (top, left, bottom, right) taken from the partner, under
    CutMix; None under Mixup. The share is then that of the pixels outside the box.
    """

    own_share: float = 1.0
    box: Box | None = None


def draw(spec: MixSpec, rng: np.random.Generator, height: int, width: int) -> Mix:
    """How a batch of height x width pixels is mixed: Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019), or not.

    A box has the drawn share's sides and a uniform centre; what is beyond the picture's edge is lost, and own_share
    is that of the box that remains.
    """
    mixed, switched = rng.random() < spec.probability, rng.random() < spec.switch_probability
    if not mixed or not (spec.mixup_alpha or spec.cutmix_alpha):
        return Mix()
    if not spec.cutmix_alpha or (spec.mixup_alpha and not switched):
        return Mix(float(rng.beta(spec.mixup_alpha, spec.mixup_alpha)))
    side = math.sqrt(1 - rng.beta(spec.cutmix_alpha, spec.cutmix_alpha))
    rows, columns = int(height * side), int(width * side)
    top = int(rng.integers(height)) - rows // 2
    left = int(rng.integers(width)) - columns // 2
    box = (max(top, 0), max(left, 0), min(top + rows, height), min(left + columns, width))
    pasted = (box[2] - box[0]) * (box[3] - box[1])
    return Mix(1 - pasted / (height * width), box)


def apply(frames_BCTHW: Tensor, partner_B: Tensor, mix: Mix) -> Tensor:
    """uint8 frames of each clip mixed with its partner's, the same in every frame; the given ones are not changed.

    Mixup is rounded to uint8, half a grey level at most, so that the model normalises every batch alike.
    """
    if mix.box is not None:
        top, left, bottom, right = mix.box
        mixed_BCTHW = frames_BCTHW.clone()
        mixed_BCTHW[..., top:bottom, left:right] = frames_BCTHW[..., top:bottom, left:right][partner_B]
        return mixed_BCTHW
    if mix.own_share == 1:
        return frames_BCTHW
    sum_BCTHW = frames_BCTHW.float().mul_(mix.own_share)
    return sum_BCTHW.add_(frames_BCTHW[partner_B], alpha=1 - mix.own_share).round_().to(torch.uint8)
