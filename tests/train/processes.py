"""Small training runs in float64 that any number of processes can share: `python -m tests.train.processes OUT`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mdltool.data.mixing import MixSpec
from mdltool.data.order import InTurn, Mixed, Order, Share, rows_of
from mdltool.losses.multitrain import MultitrainLoss, MultitrainSpec
from mdltool.model import MultiDomainModel
from mdltool.tasks import SingleLabel
from mdltool.train.checkpoint import save_tensors
from mdltool.train.distributed import World, gather_rows, join_world, leave_world
from mdltool.train.loop import Trainer
from mdltool.train.objective import MultitrainObjective, Objective, Smoothing, TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.train.plan import RunParts, StepSpec, TrainSpec
from mdltool.types import Batch
from tests.models import clips, tiny_model

CLIPS = {"a": 20, "b": 6}
_SGD = OptimizerSpec("sgd", 0.05, momentum=0.9, weight_decay=1e-3)


@dataclass(frozen=True)
class Case:
    """What is trained and how. share: by whom, beside rank and world. updates: more than an epoch of either domain,
    alone or mixed.
    """

    model: dict[str, Any]
    regime: str = "joint"
    bn: str = "shared"
    mixed: bool = False
    multitrain: MultitrainSpec | None = None
    exact: bool = True
    mix: MixSpec | None = None
    smoothing: Smoothing = field(default_factory=Smoothing)
    optimizer: OptimizerSpec = _SGD
    share: Share = field(default_factory=Share)
    sync_bn: bool = True
    updates: int = 6


_MULTITRAIN = MultitrainSpec(expander_hidden=32)
_MLP = {"adapter": None, "head": "mlp", "head_hidden": 24}
_ADAMW = OptimizerSpec("adamw", 1e-3, weight_decay=0.05, decay="matrices", clip_norm=1.0)
CASES = {
    "frozen and adapters": Case({"adapter": "2plus1d"}, regime="frozen", bn="frozen", updates=10),
    "joint": Case({"adapter": "2plus1d"}, updates=10),
    "frozen, adapters without norms": Case({"adapter": "parallel"}, regime="frozen", bn="frozen"),
    "adapters with norms": Case({"adapter": "series", "bn": "per_domain"}, bn="per_domain"),
    "statistics per domain": Case({"adapter": None, "bn": "per_domain_stats"}, bn="per_domain_stats"),
    "multitrain": Case(_MLP, mixed=True, multitrain=_MULTITRAIN, optimizer=_ADAMW, updates=10),
    "multitrain, branches, fixed": Case(
        _MLP, mixed=True, multitrain=replace(_MULTITRAIN, proj_mode="branch", weights="fixed", norm="dataset")
    ),
    "multitrain, mixed clips": Case(
        _MLP,
        mixed=True,
        multitrain=_MULTITRAIN,
        mix=MixSpec(0.8, 1.0),
        smoothing=Smoothing(0.1),
        share=Share(pairing="mirrored"),
    ),
    "multitrain, adapters": Case({"adapter": "parallel"}, multitrain=_MULTITRAIN, regime="frozen", bn="frozen"),
    "clips mixed within": Case(
        {"adapter": None}, mix=MixSpec(0.8), smoothing=Smoothing(0.1), share=Share(pairing="within")
    ),
    "ranks on different domains": Case(
        {"adapter": "2plus1d", "bn": "per_domain_stats"},
        bn="per_domain_stats",
        share=Share(by="batches"),
        sync_bn=False,
        updates=10,
    ),
}


def run(case: Case, world: World, parts: int = 1) -> dict[str, Tensor]:
    """A few updates; everything that a checkpoint holds of model and objective. Dropout is off."""
    model = model_of(case)
    order: Order = Mixed(CLIPS, 6, 0) if case.mixed else InTurn(CLIPS, dict.fromkeys(CLIPS, 4), 0)
    share = replace(case.share, rank=world.rank, world=world.size, parts=parts)
    spec = TrainSpec(
        steps=(StepSpec(case.regime, case.updates, case.optimizer, ScheduleSpec("cosine")),),
        domains=tuple(CLIPS),
        batches=order.batches,
        bn=case.bn,
        mix=case.mix,
        sync_bn=case.sync_bn,
    )
    objective = _objective(case, model, world, order, parts)

    def loader(start: int) -> Iterator[Batch]:
        return _batches(order, share, range(start, case.updates))

    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=True)
        run_parts = RunParts(
            loader, None, MultiDomainModel.tensors, accelerator, share.batches(order.batches), world
        )
        Trainer(model, spec, objective, Path(folder), run_parts).run()
    tensors = {f"model/{key}": tensor.detach().clone() for key, tensor in model.tensors().items()}
    return tensors | {f"objective/{key}": tensor for key, tensor in objective.state_dict().items()}


def model_of(case: Case) -> MultiDomainModel:
    """As it is before training."""
    return tiny_model(domains=tuple(CLIPS), **case.model)


def _objective(case: Case, model: MultiDomainModel, world: World, order: Order, parts: int) -> Objective:
    if case.multitrain is None:
        return TaskObjective(dict.fromkeys(CLIPS, SingleLabel()), smoothing=case.smoothing)
    torch.manual_seed(7)
    classes = {"a": 3, "b": 3}
    criterion = MultitrainLoss(model.backbone.feature_dim, classes, case.multitrain).double()
    gather = gather_rows if world.size > 1 else None
    calls = world.size * parts * (order.batches if case.exact else 1)
    return MultitrainObjective(criterion, calls, world.size, gather, case.exact, case.smoothing)


def _batches(order: Order, share: Share, updates: range) -> Iterator[Batch]:
    """Clips that their domain and position decide."""
    names = list(CLIPS)
    for batches in order.updates(updates.start, updates.stop):
        for number, batch in enumerate(batches):
            for part in range(share.parts) if share.takes(number) else ():
                rows, partners = share.rows(batch, part)
                slots = [batch[row] for row in rows]
                frames = [clips(1, seed=1000 * slot.stream + slot.position)[0] for slot in slots]
                bytes_ = [(40 * frame + 120).clamp(0, 255).to(torch.uint8) for frame in frames]
                whole = rows_of(batch, names)
                yield Batch(
                    domain=next(iter(whole)) if len(whole) == 1 else None,
                    frames=torch.stack(bytes_),
                    labels=torch.tensor([(slot.position + slot.stream) % 3 for slot in slots]),
                    keys=[f"{names[slot.stream]}/{slot.position}" for slot in slots],
                    domain_B=torch.tensor([slot.stream for slot in slots]),
                    whole=whole,
                    number=number,
                    partner_B=None if partners is None else torch.tensor(partners),
                )


def everything(world: World) -> Mapping[str, dict[str, Tensor]]:
    """Every case, by name."""
    return {name: run(case, world) for name, case in CASES.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = join_world()
    for case_name, tensors in everything(here).items():
        if here.is_main:
            save_tensors(Path(sys.argv[1]) / f"{case_name}.safetensors", tensors)
    leave_world()
