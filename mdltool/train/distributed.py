"""Processes: who I am, and one reduction of gradients that is right for domain-specific parameters.

Gradients are summed over ranks in one flat buffer over all trainable parameters in a fixed order, so every rank
issues the same collective whatever domains it has seen (spec omi_mdl 6.1). Losses are scaled by the global batch
before, hence a sum and no mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        if torch.cuda.is_available():  # srun says it otherwise than torchrun, and Accelerate reads torchrun's
            local = os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
            torch.cuda.set_device(int(local) % torch.cuda.device_count())
        # Objects and flags travel by gloo, also where gradients travel by NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def leave_world() -> bool:
    """Leave the process group; whether there was one."""
    if not dist.is_initialized():
        return False
    dist.destroy_process_group()
    return True


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


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, with gradient: what every rank's loss says of the sum reaches every rank's own x."""
    summed: Tensor = _SumOverRanks.apply(x)
    return summed


def gather_rows(rows_BF: Tensor) -> Tensor:
    """All ranks' rows, in rank order, with gradient; ranks may hold different numbers of them."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows_BF.device)
    counts[dist.get_rank()] = len(rows_BF)
    dist.all_reduce(counts)
    before, total = int(counts[: dist.get_rank()].sum()), int(counts.sum())
    padded = torch.nn.functional.pad(rows_BF, (0, 0, before, total - before - len(rows_BF)))
    return sum_over_ranks(padded)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


def share_buffers(owned: Mapping[str, Mapping[str, Tensor]], seen: Mapping[str, int], world: World) -> None:
    """Give every rank the buffers of the rank that has seen their owner last (the lowest of several).

    owned: owner (a domain, or what all share) -> its buffers, the same on every rank. seen: owner -> the update in
    which this rank saw it last, -1 for never. Without it a checkpoint would hold statistics of domains that its
    writer never saw.
    """
    if world.size == 1:
        return
    last = torch.tensor([seen.get(owner, -1) for owner in owned], dtype=torch.int64)
    everyone = [torch.empty_like(last) for _ in range(world.size)]
    dist.all_gather(everyone, last)
    for number, buffers in enumerate(owned.values()):
        source = max(range(world.size), key=lambda rank: (int(everyone[rank][number]), -rank))
        for buffer in buffers.values():
            dist.broadcast(buffer, source)


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
            # In the parameter's own memory format, which fused optimizers count on.
            parameter.grad = torch.empty_like(parameter).copy_(flat[offset : offset + size].view_as(parameter))
        offset += size
