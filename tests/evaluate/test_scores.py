"""From scores to metrics.json and scores.parquet, for every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mdltool.data.index import ShardIndex
from mdltool.evaluate.metrics import domain_report, mean_over_domains, shown, write_scores
from mdltool.evaluate.scores import DomainScores, tensors_of
from mdltool.tasks import TASKS, task_of

LABELS: dict[str, list[Any]] = {
    "single_label": [1, 0, 1],
    "multi_label": [[0, 1], [], [1]],
    "regression": [[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]],
    "verb_noun": [[0, 0], [0, 0], [0, 0]],
}
PAIRED = {"verbs": 1, "actions": [[0, 0]]}


def index_of(task: str, labels: Sequence[Any], domain: str = "d") -> ShardIndex:
    members = [{"key": f"k{i}", "offset": 0, "size": 1, "label": label} for i, label in enumerate(labels)]
    shards = [{"file": "shard-000000.tar", "members": members}]
    content = {"domain": domain, "split": "val", "task": task, "classes": ["x", "y"], "shards": shards}
    content |= PAIRED if task == "verb_noun" else {}
    return ShardIndex(Path(), "digest", content)


def found(keys: Sequence[str], missing: Sequence[str] = ()) -> DomainScores:
    """Scores 0.1, 0.2 of the first of these clips, 0.2, 0.4 of the second, ..."""
    scores = [(i + 1) * torch.tensor([0.1, 0.2]) for i in range(len(keys))]
    return DomainScores(list(keys), scores, [10 * s for s in scores], [(key, "broken") for key in missing])


@pytest.mark.parametrize("task", TASKS)
def test_labels_follow_the_clips_keys(task: str) -> None:
    index = index_of(task, LABELS[task])
    scores, labels, wrong = tensors_of(found(["k2", "k0"], ["k1"]), index, count_missing=True)
    np.testing.assert_allclose(scores, [[0.1, 0.2], [0.2, 0.4], [0, 0]], atol=1e-6)
    assert labels.tolist() == index.labels[[2, 0, 1]].tolist()
    assert wrong.tolist() == [False, False, True]
    assert labels.dtype == (torch.int64 if task in ("single_label", "verb_noun") else torch.float32)
    scores, labels, wrong = tensors_of(found(["k2", "k0"], ["k1"]), index, count_missing=False)
    assert (len(scores), len(labels), wrong.tolist()) == (2, 2, [False, False])


def test_the_scores_of_processes_are_merged_by_key() -> None:
    merged = found(["k2"], ["k3"]).merge([found(["k0", "k1"]), found([], ["k4"])])
    assert merged.keys == ["k0", "k1", "k2"]
    assert [score[0].item() for score in merged.scores] == pytest.approx([0.1, 0.2, 0.1])
    assert [logit[0].item() for logit in merged.logits] == pytest.approx([1, 2, 1])
    assert merged.missing == [("k3", "broken"), ("k4", "broken")]


def test_a_missing_clip_counts_as_the_task_defines() -> None:
    """k1 is missing. single_label, verb_noun: wrong. multi_label: never retrieved. regression: left out."""
    entries = {}
    for task, labels in LABELS.items():
        index = index_of(task, labels)
        entries[task], confusion = domain_report(found(["k0", "k2"], ["k1"]), task_of(index.space), index, True)
        assert (confusion is not None) == (task in ("single_label", "verb_noun"))
        assert entries[task]["clips"]["missing"] == ["k1"]
        assert entries[task]["clips"]["reasons"] == {"k1": "broken"}
        assert (entries[task]["clips"]["listed"], entries[task]["clips"]["evaluated"]) == (3, 2)
    assert entries["single_label"]["metrics"]["top1"] == pytest.approx(2 / 3)
    assert entries["single_label"]["per_class"] == {
        "x": {"accuracy": 0.0, "clips": 1},
        "y": {"accuracy": 1.0, "clips": 2},
    }
    # x: k0 alone has it, and k2 stands before it. y: both found have it.
    assert entries["multi_label"]["metrics"]["map"] == pytest.approx((1 / 2 + 1) / 2)
    assert entries["multi_label"]["per_class"]["x"] == {"average_precision": pytest.approx(0.5), "clips": 1}
    errors = [((0.1 - 0.5) ** 2 + (0.2 - 1) ** 2) / 2, ((0.2 + 1) ** 2 + (0.4 - 1) ** 2) / 2]
    assert entries["regression"]["metrics"] == {"mse": pytest.approx(sum(errors) / 2)}
    assert entries["verb_noun"]["metrics"]["action_top1"] == pytest.approx(2 / 3)
    assert entries["verb_noun"]["per_class"]["noun y"] == {"accuracy": pytest.approx(2 / 3), "clips": 3}
    assert entries["regression"]["per_class"]["y"] == {"mse": pytest.approx(errors[1]), "clips": 2}


@pytest.mark.parametrize("task", TASKS)
def test_no_clip_at_all(task: str) -> None:
    """A metric of nothing is null in JSON, not NaN."""
    index = index_of(task, [])
    entry, _ = domain_report(found([]), task_of(index.space), index, True)
    assert list(entry["per_class"]) == index.space.row_names
    assert list(entry["metrics"].values()) == ([None] if task == "regression" else [0.0] * len(entry["metrics"]))
    assert shown("mse", None) == ""


def test_the_mean_is_over_what_all_domains_have() -> None:
    entries = {"a": {"metrics": {"top1": 0.5, "top5": 1.0}}, "b": {"metrics": {"top1": 1.0}}}
    assert mean_over_domains(entries) == {"top1": 0.75}
    assert mean_over_domains({"a": {"metrics": {"mse": 1.0}}, "b": {"metrics": {"mse": None}}}) == {}
    assert mean_over_domains({"a": {"metrics": {"mse": 1.0}}, "b": {"metrics": {"map": 1.0}}}) == {}


def test_the_file_of_scores_has_each_tasks_labels(tmp_path: Path) -> None:
    indices = {task: index_of(task, labels, task) for task, labels in LABELS.items()}
    write_scores(tmp_path / "s.parquet", {task: found(["k2", "k0"]) for task in LABELS}, indices)
    table = pq.read_table(tmp_path / "s.parquet")
    columns = ["label", "verb", "noun", "label_0", "label_1"]
    assert table.column_names == ["domain", "key", *columns, "score_0", "score_1"]
    rows = {(row["domain"], row["key"]): row for row in table.to_pylist()}
    assert len(rows) == 8
    for (task, key), row in rows.items():
        own = {"single_label": ["label"], "verb_noun": ["verb", "noun"]}.get(task, ["label_0", "label_1"])
        given = indices[task].labels[int(key[1])]
        assert [row[name] for name in own] == np.atleast_1d(given).tolist()
        assert [name for name in columns if row[name] is not None] == own
        assert row["score_1"] == pytest.approx(0.2 if key == "k2" else 0.4)


def test_single_labels_alone_have_no_further_columns(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.parquet", {"d": found(["k0"])}, {"d": index_of("single_label", [1])})
    assert pq.read_table(tmp_path / "s.parquet").column_names == ["domain", "key", "label", "score_0", "score_1"]
