"""Does an adapter see time? A frozen image encoder on the generated domains, with heads only, ST- and MST-Adapters.

    python scripts/bench/time_blind.py [--check] [--dir DIR]

Half of the classes of a generated domain are told by appearance, half come in pairs that are time reversals of each
other. The encoder is trained first, frame by frame, on other clips (seed 1) of six domains with the two classes of
a pair merged into one label, so that it has never seen time; then it is frozen. Prints top-1 on appearance classes
and on reversed pairs. --check exits with 1 unless heads only pass 80% on the first and stay under 60% on the
second, and both adapters pass 85% on both. More than an hour on two cores; what DIR has already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from mdltool.data.synth import DEFAULT_DOMAINS, REVERSED, domain_classes

ROWS = ("heads", "st", "mst")
VIEWS = "3x1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dir", type=Path, help="where everything is made, and found again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as temporary:
        folder = options.dir or Path(temporary)
        encoder = pretrained(folder)
        found = {row: accuracies(trained(folder, row, encoder)) for row in ROWS}
    for row, (appearance, pairs) in found.items():
        print(f"  {row:6s} appearance {appearance:5.1f}, reversed pairs {pairs:5.1f}")
    blind = found["heads"][0] > 80 and found["heads"][1] < 60
    sees = all(value > 85 for row in ("st", "mst") for value in found[row])
    return 0 if not options.check or (blind and sees) else 1


def mdltool(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mdltool", *map(str, words)], check=True)


def pretrained(folder: Path) -> Path:
    """The image encoder's artifact."""
    videos = folder / "mix"
    mdltool("synth", "--out", videos, "--domains", "chalk,neon,field,paper,dusk,mosaic", *_size(20, 1))
    for split in ("train", "val"):
        listing = folder / f"mix-{split}.csv"
        with listing.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for path in sorted(videos.glob(f"*/{split}/*/*.mp4")):
                domain, _, cls, _ = path.relative_to(videos).parts
                merged = min(cls, REVERSED.get(cls, cls))
                writer.writerow([path.relative_to(videos), f"{domain}_{merged}"])
        source = (videos, "--format", "csv", "--annotations", listing)
        mdltool("shard", *source, "--domain", "mix", "--split", split, "--work", folder)
    data = [word for split in ("train", "val") for word in ("--data", f"mix={folder}/shards/mix-{split}")]
    mdltool("backbone", "pretrain", "--recipe", "tiny_clip_pretrain", *data, "--work", folder)
    return folder / "backbone" / "clip_vit_small-mix"


def trained(folder: Path, row: str, encoder: Path) -> Path:
    """The eval artifact of one recipe."""
    videos = folder / "videos"
    mdltool("synth", "--out", videos, "--domains", ",".join(DEFAULT_DOMAINS), *_size(24, 0))
    for domain in DEFAULT_DOMAINS:
        for split in ("train", "val"):
            source = (videos / domain / split, "--format", "folder")
            mdltool("shard", *source, "--domain", domain, "--split", split, "--work", folder)
    where = ("--work", folder, "--out")
    model, scores = folder / "model" / row, folder / "eval" / row
    mdltool("train", "--recipe", f"tiny_clip_{row}", "--backbone", encoder, *where, model)
    mdltool("eval", model, "--views", VIEWS, *where, scores)
    return scores


def _size(clips_per_class: int, seed: int) -> tuple[object, ...]:
    return ("--clips-per-class", clips_per_class, "--seed", seed)


def accuracies(scores: Path) -> tuple[float, float]:
    """Top-1 in percent on appearance classes and on reversed pairs, over all domains."""
    right: dict[bool, list[bool]] = {False: [], True: []}
    for row in pq.read_table(scores / "scores.parquet").to_pylist():
        classes = sorted(domain_classes(row["domain"]))
        best = max(range(len(classes)), key=lambda i: row[f"score_{i}"])
        right[classes[row["label"]] in REVERSED].append(best == row["label"])
    return tuple(100 * sum(hits) / len(hits) for hits in (right[False], right[True]))  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
