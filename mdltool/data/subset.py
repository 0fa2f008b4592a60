"""A part of a training split: seeded, nested and even over the classes (spec residual_adapters 5, transfer)."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from mdltool import console
from mdltool.data.index import ShardIndex


def subset_of(index: ShardIndex, fraction: float, per_class: int | None, seed: int) -> ShardIndex:
    """The index with a share of each class's clips, at least one, or with `per_class` clips of each where given.

    Clips of multi_label and regression are one class, those of verb_noun are of their verb's. The clips of a class
    have one order, by the sha256 of seed and key, and a subset is its beginning: so a smaller subset lies within
    every larger one, whatever the shards.
    """
    if fraction == 1 and per_class is None:
        return index
    ranks = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in index.keys]
    groups: dict[int, list[int]] = {}
    by_verb = index.task == "verb_noun"
    for row in sorted(range(len(index)), key=ranks.__getitem__):
        label = index.labels[row, 0] if by_verb else index.labels[row] if index.labels.ndim == 1 else 0
        groups.setdefault(int(label), []).append(row)
    chosen = [row for rows in groups.values() for row in rows[: _count(len(rows), fraction, per_class)]]
    return index.take(np.array(sorted(chosen), dtype=np.int64))


def _count(clips: int, fraction: float, per_class: int | None) -> int:
    return max(1, math.floor(fraction * clips + 0.5)) if per_class is None else min(per_class, clips)


def warn_short(part: ShardIndex, per_class: int) -> None:
    """Say which classes have fewer clips than were asked for, the smallest first."""
    counts = np.bincount(part.labels, minlength=len(part.classes))
    order = sorted(np.flatnonzero(counts < per_class).tolist(), key=lambda label: (counts[label], label))
    if order:
        named = ", ".join(f"{part.classes[label]} {counts[label]}" for label in order[:5])
        more = f" and {len(order) - 5} more" if len(order) > 5 else ""
        console.warn(f"{part.domain}: {len(order)} classes have fewer than {per_class} clips: {named}{more}")
