"""MultiTrain's ablations on generated domains: top-1 by domain and the embedding's effective rank, over seeds.

    python scripts/bench/multitrain.py [--dir DIR] [--seeds 3] [--updates 300]

Each row is tiny_multitrain with the losses of the paper's Table 3 rows, trained from random weights on three
domains at once. The effective rank is exp of the entropy of the embeddings' singular values over all validation
clips, each value a part of their sum (Roy and Vetterli 2007); the embedding has 256 dimensions. What DIR has
already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from commands import make_shards, mdltool, options_of, spread

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.data.loader import ViewLoader
from mdltool.model_store import load_model
from mdltool.schema import Recipe
from mdltool.stages.plan import val_views

DOMAINS = ("chalk", "neon", "field")
ROWS: dict[str, tuple[str, ...]] = {
    "vanilla": ("losses.inf=null", "losses.proj=null", "losses.weights=null"),
    "no informative loss": ("losses.inf=null",),
    "no informative loss, branches": ("losses.inf=null", "losses.proj.mode=branch"),
    "no projections": ("losses.proj=null",),
    "whole": (),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where everything is made, and found again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as temporary:
        folder = options.dir or Path(temporary)
        make_shards(folder, DOMAINS, 12)
        print(f"| row | {' | '.join(DOMAINS)} | mean | effective rank |")
        print(f"|---|{'---|' * (len(DOMAINS) + 2)}")
        for row in ROWS:
            runs = [trained(folder, row, seed, options.updates) for seed in range(options.seeds)]
            cells = [spread([run[name] for run in runs]) for name in (*DOMAINS, "mean", "rank")]
            print(f"| {row} | {' | '.join(cells)} |", flush=True)
    return 0


def trained(folder: Path, row: str, seed: int, updates: int) -> dict[str, float]:
    """Top-1 in percent by domain, their mean, and the effective rank, of one run."""
    out = folder / "runs" / f"{row.replace(' ', '-').replace(',', '')}-{seed}-{updates}"
    changes = (*ROWS[row], f"train.seed={seed}", f"train.steps.0.updates={updates}", "val.every=0")
    mdltool("train", "--recipe", "tiny_multitrain", *options_of(changes), "--work", folder, "--out", out)
    mdltool("eval", out, "--work", folder, "--out", f"{out}-eval")
    metrics = json.loads((Path(f"{out}-eval") / "metrics.json").read_text())["domains"]
    top1 = {domain: 100 * metrics[domain]["metrics"]["top1"] for domain in DOMAINS}
    return {**top1, "mean": statistics.mean(top1.values()), "rank": effective_rank(out, folder)}


def effective_rank(model: Path, folder: Path) -> float:
    """Of the embeddings of all domains' validation clips, one centre view each."""
    artifact = open_artifact(model)
    network, recipe = load_model(artifact), Recipe.model_validate(artifact.load_json("model.json")["recipe"])
    rows = []
    for domain in DOMAINS:
        index = ShardIndex.open(open_artifact(folder / "shards" / f"{domain}-val"))
        for clip in ViewLoader(index, val_views(recipe, domain), workers=0):
            assert clip.views is not None
            with torch.no_grad():
                rows.append(network.features(clip.views.frames, domain).mean(dim=1))
    z_MF = torch.cat(rows)
    parts = torch.linalg.svdvals(z_MF - z_MF.mean(dim=0))
    parts = parts / parts.sum()
    return float(torch.special.entr(parts).sum().exp())


if __name__ == "__main__":
    sys.exit(main())
