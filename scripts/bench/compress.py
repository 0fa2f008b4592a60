"""Compression: its time on random adapters, and with --accuracy what rank 0.5 costs on three generated domains.

    python scripts/bench/compress.py [--check]
    python scripts/bench/compress.py --accuracy [--dir DIR] [--seeds 3] [--updates 260] [--finetune 200] [--check]

Time: 10 domains of ResNet-26 with parallel adapters, 4 domains of swin3d_b with mhva; decompositions, ranks and
factored tensors, files apart. Accuracy: tiny_demo's adapters with the backbone frozen after its pretraining, top-1
over 1x1 views. Joint and independent have the same budget: what rank 0.5 stores.
What DIR has already is not made again. --check exits with 1 below the reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from commands import make_shards, mdltool, options_of, spread

from mdltool.compress import ranks
from mdltool.compress.factoring import decompositions, factored, site_weights
from mdltool.model import build_model
from mdltool.model_spec import AdapterSpec, ModelSpec

DOMAINS = ("chalk", "neon", "field")
# name -> (backbone, frames, crop, adapter, its options, domains, seconds within reach)
TIMED = {
    "10 domains x ResNet-26, parallel": ("resnet26", 1, 64, "parallel", {}, 10, 5.0),
    "4 domains x swin3d_b, mhva": ("swin3d_b", 16, 224, "mhva", {}, 4, 30.0),
}
LOSS = 1.0  # points of mean accuracy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 below the reach")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--dir", type=Path, help="where everything is made, and found again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=260)
    parser.add_argument("--finetune", type=int, default=200)
    options = parser.parse_args()
    if not options.accuracy:
        good = [timed(name) for name in TIMED]
        return int(options.check and not all(good))
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as temporary:
        good = [accuracy(options.dir or Path(temporary), options.seeds, options.updates, options.finetune)]
    return int(options.check and not all(good))


def timed(name: str) -> bool:
    """Print the seconds of one compression at rank 0.5; whether they are within reach."""
    backbone, frames, crop, adapter, options, domains, reach = TIMED[name]
    names = {f"d{i}": 2 for i in range(domains)}
    spec = ModelSpec(backbone, {}, frames, crop, names, [AdapterSpec(adapter, "all", dict(options))], bn="frozen")
    with torch.device("meta"):
        weights = site_weights(build_model(spec))
    generator = torch.Generator().manual_seed(0)
    tensors = {w.key(d): torch.randn(w.shape, generator=generator) for w in weights for d in names}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    started = time.monotonic()
    found = decompositions(weights, tensors, list(names))
    choices = ranks.by_rank([entry.for_ranks() for entry in found.values()], 0.5)
    factored(tensors, found, choices, "left")
    seconds = time.monotonic() - started
    print(f"{name}: {len(weights)} weights, {numbers:,} numbers, {seconds:.1f} s (reach {reach:g} s)", flush=True)
    return seconds <= reach


def accuracy(folder: Path, seeds: int, updates: int, finetune: int) -> bool:
    """Print a row for each way to compress, over seeds; whether rank 0.5 with fine-tuning is within reach."""
    make_shards(folder, DOMAINS, 24)
    mdltool("backbone", "pretrain", "--data", f"chalk={folder / 'shards' / 'chalk-train'}", "--work", folder)
    runs = [one_seed(folder, seed, updates, finetune) for seed in range(seeds)]
    print(f"| model | adapters | {' | '.join(DOMAINS)} | mean |")
    print(f"|---|{'---|' * (len(DOMAINS) + 2)}")
    for row in runs[0]:
        cells = [spread([100 * run[row]["top1"][d] for run in runs]) for d in DOMAINS]
        means = spread([run[row]["mean"] for run in runs])
        print(f"| {row} | {runs[0][row]['adapters']:,} | {' | '.join(cells)} | {means} |", flush=True)
    lost = statistics.mean(run["dense"]["mean"] - run["rank 0.5, fine-tuned"]["mean"] for run in runs)
    print(f"rank 0.5 with fine-tuning loses {lost:.2f} points of the mean (reach {LOSS:g})")
    print((folder / "runs" / f"0-{updates}-swept" / "sweep.csv").read_text())
    return lost <= LOSS


def one_seed(folder: Path, seed: int, updates: int, finetune: int) -> dict[str, dict]:
    """Row -> adapters, top1 by domain, and their mean in percent."""
    base = folder / "runs" / f"{seed}-{updates}"
    sets = [f"train.seed={seed}", "train.steps.0.regime=frozen", f"train.steps.0.updates={updates}", "val.every=0"]
    mdltool("train", "--recipe", "tiny_demo", *options_of(sets), "--work", folder, "--out", base)
    found = {"dense": scored(folder, base)}
    tune = ("--finetune", finetune, "--set", "val.every=0", "--set", f"train.seed={seed}")
    half = Path(f"{base}-half")
    mdltool("compress", base, "--rank", 0.5, "--work", folder, "--out", half)
    found["rank 0.5"] = scored(folder, half)
    budget = json.loads((half / "artifact.json").read_text())["summary"]["compressed"]["stored"]
    ways = {
        "rank 0.5, fine-tuned": ("--rank", 0.5, *tune),
        "joint": ("--budget", budget),
        "independent": ("--budget", budget, "--independent"),
        "joint, fine-tuned": ("--budget", budget, *tune),
        "independent, fine-tuned": ("--budget", budget, "--independent", *tune),
    }
    for row, words in ways.items():
        out = Path(f"{base}-{row.replace(', ', '-').replace(' ', '-')}{f'-{finetune}' if 'tuned' in row else ''}")
        mdltool("compress", base, *words, "--work", folder, "--out", out)
        found[row] = scored(folder, out)
    if seed == 0:
        mdltool("compress", base, "--sweep", "--rank", 0.5, "--work", folder, "--out", f"{base}-swept")
    return found


def scored(folder: Path, model: Path) -> dict:
    """A model's row; one centre view."""
    mdltool("eval", model, "--views", "1x1", "--work", folder, "--out", f"{model}-eval")
    domains = json.loads((Path(f"{model}-eval") / "metrics.json").read_text())["domains"]
    top1 = {domain: domains[domain]["metrics"]["top1"] for domain in DOMAINS}
    adapters = json.loads((model / "model.json").read_text())["parameters"]["adapters"]
    return {"adapters": adapters, "top1": top1, "mean": 100 * statistics.mean(top1.values())}


if __name__ == "__main__":
    sys.exit(main())
