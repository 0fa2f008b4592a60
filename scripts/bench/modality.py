"""What hearing and reading add, on the generated domain `sound`.

    python scripts/bench/modality.py [--check] [--dir DIR] [--seeds 3]

Its classes are told by eye, by ear, by both or by words. A model is trained on pictures (`tiny_sound`), and gains
audio and then text by `add-modality`; beside it, both at once. Top-1 on the validation clips stands beside the
ceiling that the class table allows to what the model is given. Then a small domain: few clips of other instances,
joined to the model by `add-domain`; audio is added to it from nothing, and from the streams that were trained on
`sound` (--init-from), with the head in both. --check exits with 1 unless pictures alone stay at or under their
ceiling, audio passes that by at least 20 points, text adds more, and --init-from is better than nothing. What DIR
has already is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mdltool.data.synth_sound import ceiling

CLIPS, FEW = 32, 4  # training clips of a class: of the domain, of the small one
STREAMS = {
    "rgb": (),
    "rgb+audio": ("audio",),
    "rgb+audio+text": ("audio", "text"),
    "both at once": ("audio", "text"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dir", type=Path, help="where everything is made, and found again")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as temporary:
        folder = options.dir or Path(temporary)
        make_shards(folder)
        runs = [one_seed(folder, seed) for seed in range(options.seeds)]
    found = {row: statistics.mean(run[row] for run in runs) for row in runs[0]}
    for row in found:
        kinds = {"rgb", *STREAMS.get(row, ())}
        of = f" of {100 * ceiling(kinds):.1f}" if row in STREAMS else ""
        print(f"  {row:28s} {spread([run[row] for run in runs])}{of}")
    floor = found["rgb"] <= 100 * ceiling({"rgb"})
    gains = found["rgb+audio"] >= 100 * ceiling({"rgb"}) + 20 and found["rgb+audio+text"] > found["rgb+audio"]
    started = found["small: audio, --init-from"] > found["small: audio from nothing"]
    return 0 if not options.check or (floor and gains and started) else 1


def mdltool(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mdltool", *map(str, words)], check=True)


def make_shards(folder: Path) -> None:
    """The domain `sound`, and `small`: other instances, few of them to train on and as many to score."""
    for domain, seed, clips in (("sound", 0, CLIPS), ("small", 1, CLIPS)):
        videos = folder / "videos" / domain
        mdltool("synth", "--out", videos, "--domains", "sound", "--clips-per-class", clips, "--seed", seed)
        for split in ("train", "val"):
            where = ("--domain", domain, "--split", split, "--work", folder)
            kinds = ("--modality", "audio", "--modality", "text")
            mdltool("shard", videos / "sound" / split, "--format", "folder", *where, *kinds)


def one_seed(folder: Path, seed: int) -> dict[str, float]:
    """Row -> top-1 in percent."""
    base = folder / "model" / f"sound-{seed}"
    mdltool("train", "--recipe", "tiny_sound", "--set", f"train.seed={seed}", "--work", folder, "--out", base)
    heard, read = (base.with_name(base.name + suffix) for suffix in ("+audio", "+audio+text"))
    both = base.with_name(base.name + "+both")
    add(folder, base, heard, "--modality", "audio")
    add(folder, heard, read, "--modality", "text")
    add(folder, base, both, "--modality", "audio", "--modality", "text")
    found = {
        row: scored(folder, model, "sound") for row, model in zip(STREAMS, (base, heard, read, both), strict=True)
    }
    few = base.with_name(base.name + "+small")
    data = ("--data", f"small={folder / 'shards' / 'small-train'}")
    less = ("--set", f"data.per_class={FEW}", "--set", "train.steps.0.updates=60")
    mdltool("add-domain", base, *data, "--init-from", "sound", *less, "--work", folder, "--out", few)
    found["small: rgb"] = scored(folder, few, "small")
    for row, words in (("from nothing", ()), (", --init-from", ("--init-from", f"{heard}:sound"))):
        out = few.with_name(few.name + "+audio" + ("-begun" if words else ""))
        # The head of the small domain knows nothing of what the other domain's streams say, so that it trains too;
        # at a quarter of the recipe's rate, since few clips are soon learnt by heart.
        how = ("--modality", "audio", "--train-head", "--set", "train.steps.0.optimizer.lr=0.0005")
        add(folder, few, out, *how, *data, *less, *words)
        found[f"small: audio{row}" if words else f"small: audio {row}"] = scored(folder, out, "small")
    return found


def add(folder: Path, model: Path, out: Path, *words: object) -> None:
    data = () if "--data" in words else ("--data", f"sound={folder / 'shards' / 'sound-train'}")
    mdltool("add-modality", model, *words, *data, "--work", folder, "--out", out)


def scored(folder: Path, model: Path, domain: str) -> float:
    """Top-1 in percent on the domain's validation clips."""
    out = folder / "eval" / f"{model.name}-{domain}"
    data = ("--data", f"{domain}={folder / 'shards' / f'{domain}-val'}")
    mdltool("eval", model, *data, "--work", folder, "--out", out)
    return 100 * json.loads((out / "metrics.json").read_text())["domains"][domain]["metrics"]["top1"]


def spread(values: list[float]) -> str:
    """Mean, and the lowest and the highest of several."""
    mean = f"{statistics.mean(values):5.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
