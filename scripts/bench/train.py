"""What training costs beside its forward and backward passes.

    python scripts/bench/train.py [--check] [--turns 7]

Three comparisons, in turns within one run: the trainer beside a bare loop of the same model, batches and optimiser
(tiny_demo's, synthetic tensors); MultiTrain's objective beside heads and cross-entropy alone (its MViTv2-B at 8 x
112 x 112, four data sets of 1,079 classes); and how long the trainer waits for the loader, in `mdltool train` of
tiny_demo on generated videos. --check exits with 1 where the trainer takes 3% more than the bare loop, the
objective 3% more than vanilla's, or waiting 5% of an update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from commands import mdltool, options_of
from torch.nn import functional

from mdltool.losses.multitrain import MultitrainLoss, MultitrainSpec
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.tasks import SingleLabel
from mdltool.train.loop import Trainer
from mdltool.train.objective import MultitrainObjective, Objective, TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec, make_optimizer
from mdltool.train.plan import RunParts, StepSpec, TrainSpec
from mdltool.types import Batch

REACHES = {"trainer / bare loop": 1.03, "MultiTrain / vanilla": 1.03, "data wait / update": 0.05}
ADAMW = OptimizerSpec("adamw", 1e-4, weight_decay=0.01)
CLASSES = {"k400": 400, "mit": 305, "ssv2": 174, "actnet": 200}
DOMAINS = ("chalk", "neon", "field")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    found = {
        "trainer / bare loop": in_turns(bare_loop(6), trained_in_turn(6), options.turns),
        "MultiTrain / vanilla": in_turns(mixed(vanilla=True), mixed(vanilla=False), options.turns),
        "data wait / update": data_wait(),
    }
    for name, value in found.items():
        print(f"  {name:22s} {value:.3f}, the reach is {REACHES[name]:g}")
    return 1 if options.check and any(value > REACHES[name] for name, value in found.items()) else 0


def in_turns(limit: Callable[[], float], ours: Callable[[], float], turns: int) -> float:
    """The ratio of the medians of what two runs take, which follow each other; the first turn warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for run, kept in zip((limit, ours), times, strict=True):
            took = run()
            if turn:
                kept.append(took)
    return statistics.median(times[1]) / statistics.median(times[0])


def demo_model() -> MultiDomainModel:
    adapters = [AdapterSpec("2plus1d", "all", {"ln": "channel", "init": "kaiming"})]
    outputs = dict.fromkeys(DOMAINS, 8)
    return build_model(ModelSpec("x3d_tiny", {}, 8, 56, outputs, adapters, "per_domain_stats", 0.2))


def clips(batch: int, frames: int, crop: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, frames, crop, crop), dtype=torch.uint8)


def bare_loop(updates: int) -> Callable[[], float]:
    """Seconds of the updates alone, with nothing but what they compute."""
    model, frames, labels = demo_model().channels_last(), clips(12, 8, 56), torch.arange(12) % 8
    model.apply_regime("joint", "per_domain_stats")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(ADAMW, parameters)

    def run() -> float:
        started = time.monotonic()
        for _ in range(updates):
            model.train()
            optimizer.zero_grad(set_to_none=True)
            for domain in DOMAINS:
                inputs = frames.contiguous(memory_format=torch.channels_last_3d)
                functional.cross_entropy(model(inputs, domain), labels).backward()
            optimizer.step()
        return time.monotonic() - started

    return run


def trained_in_turn(updates: int) -> Callable[[], float]:
    """The same by the trainer."""
    model, frames, labels = demo_model(), clips(12, 8, 56), torch.arange(12) % 8

    def batches(_: int) -> Iterator[Batch]:
        while True:
            for number, domain in enumerate(DOMAINS):
                yield Batch(domain, frames, labels, [str(k) for k in range(12)], whole={domain: 12}, number=number)

    objective = TaskObjective(dict.fromkeys(DOMAINS, SingleLabel()))
    return lambda: seconds(model, objective, DOMAINS, 3, updates, batches, "per_domain_stats")


def mixed(vanilla: bool) -> Callable[[], float]:
    """Seconds of two updates of mixed batches."""
    spec = MultitrainSpec(0.0, 0.0, proj_mode="none", weights="fixed") if vanilla else MultitrainSpec()
    model = build_model(ModelSpec("multitrain_mvit_b", {}, 8, 112, CLASSES, [], dropout=0.5, head="mlp"))
    objective = MultitrainObjective(MultitrainLoss(model.backbone.feature_dim, CLASSES, spec))
    batch = Batch(None, clips(4, 8, 112), torch.arange(4), list("abcd"), domain_B=torch.arange(4))
    batch.whole = dict.fromkeys(CLASSES, 1)

    def batches(_: int) -> Iterator[Batch]:
        while True:
            yield batch

    return lambda: seconds(model, objective, tuple(CLASSES), 1, 2, batches, "frozen")


def seconds(
    model: MultiDomainModel,
    objective: Objective,
    domains: tuple[str, ...],
    batches: int,
    updates: int,
    loader: Callable[[int], Iterator[Batch]],
    bn: str,
) -> float:
    """Of a run's updates, by the trainer's own count, which leaves the last checkpoint out."""
    step = StepSpec("joint", updates, ADAMW, ScheduleSpec())
    spec = TrainSpec((step,), domains, batches, bn, checkpoint_every=10**6)
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as folder:
        parts = RunParts(loader, None, MultiDomainModel.tensors, Accelerator(cpu=True), batches)
        return Trainer(model, spec, objective, Path(folder), parts).run().seconds


def data_wait() -> float:
    """The mean part of an update that `mdltool train` waits for clips, after the first ten updates."""
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as temporary:
        folder = Path(temporary)
        mdltool("synth", "--out", folder / "videos", "--domains", ",".join(DOMAINS), "--clips-per-class", 12)
        for domain in DOMAINS:
            source = folder / "videos" / domain / "train"
            split = ("--format", "folder", "--domain", domain, "--split", "train")
            mdltool("shard", source, *split, "--work", folder)
        changes = ("backbone.weights=scratch", "train.steps.0.updates=60", "val.every=0")
        data = [w for d in DOMAINS for w in ("--data", f"{d}={folder / 'shards' / f'{d}-train'}")]
        mdltool("train", "--recipe", "tiny_demo", *options_of(changes), *data, "--work", folder)
        lines = (folder / "model" / "tiny_demo" / "metrics.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "data_wait" in entry and entry["step"] > 10]
    return statistics.mean(entry["data_wait"] for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
