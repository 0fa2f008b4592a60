"""Memory and speed of a training step with adapters, beside full fine-tuning of the same backbone in the same run.

    python scripts/bench/memory.py [--check] [--backbone swin3d_t] [--frames 8] [--crop 112] [--batch 2] [--steps 4]

Every variant runs in a process of its own: its peak memory is the most that the process ever held, less what it
held before the first step. `bare forward` is the frozen network alone. The activations that autograd keeps are
counted by `mdltool describe` as well; here the memory is measured. --check exits with 1 unless an adapter step
takes at most 0.8 of the memory of full fine-tuning, and adapters in the last two blocks alone at most 0.4 of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from mdltool.backbones import BACKBONES
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec

# Name -> (regime, adapters, the most memory as a part of full fine-tuning's).
VARIANTS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]], float | None]] = {
    "full fine-tuning": ("full", [], None),
    "mst": ("frozen", [("mst", {"r": 64})], 0.8),
    "mhva": ("frozen", [("mhva", {})], 0.8),
    "lora": ("frozen", [("lora", {})], 0.8),
    "mst, last two blocks": ("frozen", [("mst", {"r": 64, "layers": "{last}"})], 0.4),
    "heads": ("heads", [], 0.4),
    "bare forward": ("none", [], None),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--backbone", default="swin3d_t")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(measure(options.variant, options)))
        return 0
    words = [word for word in sys.argv[1:] if word != "--check"]
    print(
        f"{options.backbone}, {options.batch} clips of {options.frames}x{options.crop}x{options.crop}, CPU, float32"
    )
    found: dict[str, dict[str, float]] = {}
    for name in VARIANTS:
        done = subprocess.run([sys.executable, __file__, *words, "--variant", name], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[name] = json.loads(done.stdout)
    missed = []
    full = found["full fine-tuning"]
    for name, (_, _, reach) in VARIANTS.items():
        own = found[name]
        part, speed = own["mib"] / full["mib"], own["seconds"] / found["bare forward"]["seconds"]
        limit = f", the reach is {reach}" if reach is not None else ""
        print(f"  {name:21s} {own['mib']:7.0f} MiB ({part:.2f} of full{limit}), {speed:.2f} times a bare forward")
        if reach is not None and part > reach:
            missed.append(name)
    return 1 if options.check and missed else 0


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB and the median seconds of a step."""
    step = _step(variant, options)
    before = _peak_mib()
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"mib": _peak_mib() - before, "seconds": statistics.median(seconds[1:] or seconds)}


def _step(variant: str, options: argparse.Namespace) -> Callable[[], None]:
    regime, adapters, _ = VARIANTS[variant]
    model = _model(adapters, options)
    clip = torch.randint(0, 255, (options.batch, 3, options.frames, options.crop, options.crop), dtype=torch.uint8)
    labels = torch.zeros(options.batch, dtype=torch.long)
    if regime == "none":
        model.eval()

        def forward() -> None:
            with torch.no_grad():
                model(clip, "a")

        return forward
    model.apply_regime(regime)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(clip, "a"), labels).backward()
        optimizer.step()

    return step


def _model(adapters: list[tuple[str, dict[str, Any]]], options: argparse.Namespace) -> MultiDomainModel:
    factory = BACKBONES.load(options.backbone)
    with torch.device("meta"):
        places = factory(factory.Options(), options.frames, options.crop).places().values()
    last = max(place.layer for place in places)
    filled = [
        AdapterSpec(
            kind, "all", {k: v.format(last=f"{last - 1}-{last}") if k == "layers" else v for k, v in o.items()}
        )
        for kind, o in adapters
    ]
    spec = ModelSpec(options.backbone, {}, options.frames, options.crop, {"a": 100}, filled, bn="frozen")
    return build_model(spec)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
