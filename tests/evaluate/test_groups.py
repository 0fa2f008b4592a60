"""Subsets and participants that shards name, in metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.evaluate.metrics import domain_report
from mdltool.evaluate.scores import DomainScores
from mdltool.tasks import task_of

PAIRED = {"task": "verb_noun", "classes": ["take", "put", "cup", "pan"], "verbs": 2, "actions": [[0, 0], [1, 1]]}


def index_of(labels: Sequence[Any], **content: Any) -> ShardIndex:
    members = [{"key": f"k{i}", "offset": 0, "size": 1, "label": label} for i, label in enumerate(labels)]
    shards = [{"file": "shard-000000.tar", "members": members}]
    return ShardIndex(Path(), "digest", {"domain": "d", "split": "val", "shards": shards, **content})


def found(scores: Sequence[Sequence[float]], missing: Sequence[str] = ()) -> DomainScores:
    rows = [torch.tensor(row) for row in scores]
    return DomainScores([f"k{i}" for i in range(len(rows))], rows, rows, [(key, "broken") for key in missing])


def test_subsets_are_scored_for_themselves() -> None:
    """k3 is missing, and wrong; nobody knows k9."""
    subsets = {"unseen": ["k0", "k3"], "tail_verb": ["k1", "k2", "k9"]}
    index = index_of([[0, 0], [1, 1], [1, 1], [0, 0]], subsets=subsets, **PAIRED)
    rows = [[0.9, 0.1, 0.8, 0.2], [0.8, 0.2, 0.1, 0.9], [0.1, 0.9, 0.3, 0.7]]
    entry, _ = domain_report(found(rows, ["k3"]), task_of(index.space), index, True)
    assert entry["metrics"]["verb_top1"] == 0.5
    unseen, tail = entry["subsets"]["unseen"], entry["subsets"]["tail_verb"]
    assert (unseen["clips"], unseen["verb_top1"], unseen["noun_top1"], unseen["action_top1"]) == (2, 0.5, 0.5, 0.5)
    assert (tail["clips"], tail["verb_top1"], tail["noun_top1"]) == (2, 0.5, 1.0)
    assert tail["action_top1"] == 1.0, "in k1 take is before put, but take cup (0.08) is behind put pan (0.18)"


def test_a_subset_without_clips_has_no_scores() -> None:
    index = index_of([[0, 0]], subsets={"unseen": ["k9"]}, **PAIRED)
    entry, _ = domain_report(found([[0.9, 0.1, 0.8, 0.2]]), task_of(index.space), index, True)
    assert entry["subsets"]["unseen"] == {"clips": 0, **dict.fromkeys(entry["metrics"])}


def test_a_participant_is_the_median_over_windows() -> None:
    rng = np.random.default_rng(0)
    true = np.repeat(rng.normal(size=(3, 5)), (4, 3, 2), axis=0)
    predicted = rng.normal(size=true.shape)
    people = {"a": ["k0", "k1", "k2", "k3"], "b": ["k4", "k5", "k6"], "c": ["k7", "k8"], "nobody": ["k9"]}
    index = index_of(true.tolist(), task="regression", classes=list("OCEAN"), participants=people)
    entry, _ = domain_report(found(predicted[:8].tolist(), ["k8"]), task_of(index.space), index, True)
    groups = [slice(0, 4), slice(4, 7), slice(7, 8)]
    errors = [(np.median(predicted[rows], axis=0) - true[rows][0]) ** 2 for rows in groups]
    each = np.mean(errors, axis=0)
    assert entry["participants"] == 3
    assert entry["metrics"]["mse_participant"] == pytest.approx(each.mean(), rel=1e-5)
    assert [entry["per_class"][t]["mse_participant"] for t in "OCEAN"] == pytest.approx(each, rel=1e-5)
    assert entry["metrics"]["mse"] == pytest.approx(((predicted - true)[:8] ** 2).mean(), rel=1e-5)


def test_shards_without_groups_have_no_further_entries() -> None:
    index = index_of([[1.0]], task="regression", classes=["O"])
    entry, _ = domain_report(found([[0.5]]), task_of(index.space), index, True)
    assert {"subsets", "participants"} & set(entry) == set()
    assert entry["metrics"] == {"mse": 0.25}


@pytest.mark.parametrize("name", ["subsets", "participants"])
def test_groups_that_are_no_lists_are_refused(name: str) -> None:
    with pytest.raises((MdlError, TypeError), match="'unseen' is 'k0', not list"):
        index_of([[1.0]], task="regression", classes=["O"], **{name: {"unseen": "k0"}})
