"""From scores to the numbers and files of an eval artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mdltool.data.index import ShardIndex
from mdltool.evaluate.groups import of_participants, of_subsets
from mdltool.evaluate.scores import DomainScores, labels_of, tensors_of
from mdltool.tasks import Task

METRICS = {
    "action_top1": "action top-1 %",
    "action_top5": "action top-5 %",
    "verb_top1": "verb top-1 %",
    "verb_top5": "verb top-5 %",
    "noun_top1": "noun top-1 %",
    "noun_top5": "noun top-5 %",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "mean_class": "mean class %",
    "map": "mAP %",
    "map_micro": "micro mAP %",
    "mse": "MSE",
    "mse_participant": "MSE of participants",
}
"""The tasks' metrics in the order of tables, and their headings; one in % is a fraction."""


def shown(metric: str, value: float | None) -> str:
    """A value as tables show it under the metric's heading."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if METRICS[metric].endswith("%") else f"{value:.4f}"


def domain_report(
    found: DomainScores, task: Task, index: ShardIndex, count_missing: bool
) -> tuple[dict[str, Any], list[list[int]] | None]:
    """(the domain's entry of metrics.json, the confusion matrix with true classes in rows of a task that has one).

    A metric of no clips at all is None.
    """
    scores, labels, wrong = tensors_of(found, index, count_missing)
    per_class, names = task.per_class(scores, labels, wrong), index.space.row_names
    confusion = per_class.pop("confusion", None)
    metrics = task.metrics(scores, labels, wrong)
    keys = [*found.keys, *(key for key, _ in found.missing)][: len(scores)]
    people = of_participants(task, index.participants, keys, scores, labels, wrong)
    if people is not None:
        per_class["mse_participant"] = people[1]
        metrics["mse_participant"] = sum(people[1]) / len(people[1])
    entry = {
        "task": task.name,
        "metrics": _nulls(metrics),
        "per_class": {name: {key: values[i] for key, values in per_class.items()} for i, name in enumerate(names)},
        "clips": {
            "listed": len(index),
            "evaluated": len(found.keys),
            "missing": [key for key, _ in found.missing],
            "reasons": dict(found.missing),
        },
        "distinct_views": found.distinct_views,
        "decoder": "+".join(sorted(found.backends)) or None,
    }
    if people is not None:
        entry["participants"] = people[0]
    if index.subsets:
        subsets = of_subsets(task, index.subsets, keys, scores, labels, wrong)
        entry["subsets"] = {name: _nulls(values) for name, values in subsets.items()}
    return entry, confusion


def _nulls(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def mean_over_domains(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over domains of every metric that all of them have."""
    metrics = [entry["metrics"] for entry in domains.values()]
    shared = [name for name in metrics[0] if all(m.get(name) is not None for m in metrics)]
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in shared}


def write_scores(path: Path, found: Mapping[str, DomainScores], indices: Mapping[str, ShardIndex]) -> None:
    """scores.parquet: domain, key, label, score_0 ..., and label_0 ... where a domain has several labels a clip.

    label: the class's number of single_label, else null. label_i: 0 or 1 for class i, or the value of target i;
    null of the other tasks. verb, noun: the numbers of verb_noun, where a domain is of it. Domains with fewer
    classes leave the rest of score_i and label_i null.
    """
    columns = _of_clips(found, indices)
    columns |= _columns("score", [scores.tolist() for d in found.values() for scores in d.scores])
    pq.write_table(pa.table(columns), path)


def _of_clips(found: Mapping[str, DomainScores], indices: Mapping[str, ShardIndex]) -> dict[str, pa.Array]:
    """The columns of scores.parquet that name the clips and their labels."""
    labels = [label for domain, d in found.items() for label in labels_of(indices[domain], d.keys).tolist()]
    paired = [indices[domain].task == "verb_noun" for domain, d in found.items() for _ in d.keys]
    columns: dict[str, pa.Array] = {
        "domain": pa.array([domain for domain, d in found.items() for _ in d.keys], pa.string()),
        "key": pa.array([key for d in found.values() for key in d.keys], pa.string()),
        "label": pa.array([label if isinstance(label, int) else None for label in labels], pa.int64()),
    }
    if any(paired):
        for i, name in enumerate(("verb", "noun")):
            numbers = [label[i] if pair else None for label, pair in zip(labels, paired, strict=True)]
            columns[name] = pa.array(numbers, pa.int64())
    several = [[] if pair or isinstance(label, int) else label for label, pair in zip(labels, paired, strict=True)]
    return columns | _columns("label", several)


def _columns(name: str, rows: Sequence[Sequence[float]]) -> dict[str, pa.Array]:
    """{name}_0 ... of float32, as many as the longest row has; the others are null there."""
    width = max(map(len, rows), default=0)
    return {
        f"{name}_{i}": pa.array([row[i] if i < len(row) else None for row in rows], pa.float32())
        for i in range(width)
    }
