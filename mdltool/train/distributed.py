"""Processes: who I am, and one reduction of gradients that is right for domain-specific parameters.

Gradients are summed over ranks in one flat buffer over all trainable parameters in a fixed order, so every rank
issues the same collective whatever domains it has seen (spec omi_mdl 6.1). Losses are scaled by the global batch
before, hence a sum and no mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process among all: rank from 0, size."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world() -> World:
    """Join the process group that torchrun, srun or accelerate set up; alone where there is none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def leave_world() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: Any, world: World) -> list[Any] | None:
    """Every rank's value in rank order, on rank 0; None on the others."""
    if world.size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, gathered)
    return gathered


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replace each parameter's gradient by its sum over ranks; one that no rank has stays None.

    None matters: momentum and weight decay must not touch a parameter that saw no data.
    """
    if world.size == 1 or not parameters:
        return
    seen = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    offset = 0
    for parameter, anywhere in zip(parameters, seen.tolist(), strict=True):
        size = parameter.numel()
        if anywhere:
            parameter.grad = flat[offset : offset + size].view_as(parameter).clone()
        offset += size
