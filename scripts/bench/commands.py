"""Commands of mdltool as benchmarks run them, shards of generated domains, and a cell of several runs."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def mdltool(*words: object) -> None:
    """Run a command without showing what it says; ends the benchmark with that where the command fails."""
    command = [sys.executable, "-m", "mdltool", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def options_of(changes: Iterable[str]) -> list[str]:
    """Changes of a recipe, KEY=VALUE, as words of a command."""
    return [word for change in changes for word in ("--set", change)]


def make_shards(folder: Path, domains: Sequence[str], clips: int) -> None:
    """Videos and shards of generated domains, in `folder`. clips: of each class."""
    mdltool("synth", "--out", folder / "videos", "--domains", ",".join(domains), "--clips-per-class", clips)
    for domain in domains:
        for split in ("train", "val"):
            source = folder / "videos" / domain / split
            mdltool("shard", source, "--format", "folder", "--domain", domain, "--split", split, "--work", folder)


def spread(values: list[float]) -> str:
    """Mean, and the lowest and the highest."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
