"""Subsets of a training split: even over the classes, nested, seeded, independent of the shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdltool.data.index import ShardIndex
from mdltool.data.subset import subset_of

SIZES = (1, 7, 20, 40)


def index(task: str = "single_label", shards: int = 3, shuffled: int | None = None) -> ShardIndex:
    """Clips of four classes of different sizes; shuffled: another order and division of the same ones."""
    labels = [label for label, size in enumerate(SIZES) for _ in range(size)]
    given: dict[str, Callable[[int], Any]] = {
        "single_label": lambda label: label,
        "verb_noun": lambda label: [label % 2, label // 2],
    }
    members = [
        {"key": f"c{i:03d}", "offset": i, "size": 1, "label": given.get(task, lambda label: [label])(label)}
        for i, label in enumerate(labels)
    ]
    if shuffled is not None:
        np.random.default_rng(shuffled).shuffle(members)  # type: ignore[arg-type]
    content: dict[str, Any] = {"domain": "d", "split": "train", "task": task, "classes": list("abcd")}
    content |= {"verbs": 2, "actions": [[0, 0]]} if task == "verb_noun" else {}
    content["shards"] = [{"file": f"{n}.tar", "members": members[n::shards]} for n in range(shards)]
    return ShardIndex(Path("none"), "", content)


def keys(found: ShardIndex) -> set[str]:
    return set(found.keys)


@pytest.mark.parametrize("seed", [0, 5])
def test_smaller_fractions_lie_within_larger_ones(seed: int) -> None:
    chosen = [keys(subset_of(index(), fraction, None, seed)) for fraction in (0.01, 0.1, 0.25, 0.5, 0.9, 1.0)]
    assert all(a <= b for a, b in itertools.pairwise(chosen))
    assert len(chosen[-1]) == sum(SIZES)


def test_every_class_keeps_its_share_and_at_least_one() -> None:
    part = subset_of(index(), 0.1, None, 0)
    assert np.bincount(part.labels).tolist() == [1, 1, 2, 4]
    assert np.bincount(subset_of(index(), 0.5, None, 0).labels).tolist() == [1, 4, 10, 20]


def test_verbs_keep_their_share() -> None:
    part = subset_of(index("verb_noun"), 0.1, None, 0)
    assert np.bincount(part.labels[:, 0]).tolist() == [2, 5], "of 21 and 47"


def test_so_many_of_each_class_and_no_more_than_there_are() -> None:
    few, more = (subset_of(index(), 1.0, count, 0) for count in (3, 10))
    assert np.bincount(few.labels).tolist() == [1, 3, 3, 3]
    assert np.bincount(more.labels).tolist() == [1, 7, 10, 10]
    assert keys(few) < keys(more)


def test_the_shards_do_not_matter_and_the_seed_does() -> None:
    chosen = keys(subset_of(index(), 0.3, None, 0))
    assert keys(subset_of(index(shards=5, shuffled=1), 0.3, None, 0)) == chosen
    assert keys(subset_of(index(), 0.3, None, 1)) != chosen


def test_clips_keep_their_places_and_labels() -> None:
    whole = index()
    part = subset_of(whole, 0.3, None, 0)
    rows = [whole.keys.index(key) for key in part.keys]
    assert rows == sorted(rows)
    for name in ("labels", "shard_of", "offsets", "sizes"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[rows])
    assert len(whole) == sum(SIZES)


def test_other_tasks_have_no_classes_to_be_even_over() -> None:
    assert len(subset_of(index("multi_label"), 0.25, None, 0)) == 17
