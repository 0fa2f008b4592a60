"""From scores to the numbers and files of an eval artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mdltool.data.index import ShardIndex
from mdltool.evaluate.scores import DomainScores, labels_of, tensors_of
from mdltool.tasks import Task

METRICS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "mean_class": "mean class %",
    "map": "mAP %",
    "map_micro": "micro mAP %",
    "mse": "MSE",
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
    per_class = task.per_class(scores, labels, wrong)
    confusion = per_class.pop("confusion", None)
    metrics = task.metrics(scores, labels, wrong)
    entry = {
        "task": task.name,
        "metrics": {name: None if math.isnan(value) else value for name, value in metrics.items()},
        "per_class": {
            name: {key: values[i] for key, values in per_class.items()} for i, name in enumerate(index.classes)
        },
        "clips": {
            "listed": len(index),
            "evaluated": len(found.keys),
            "missing": [key for key, _ in found.missing],
            "reasons": dict(found.missing),
        },
        "distinct_views": found.distinct_views,
        "decoder": "+".join(sorted(found.backends)) or None,
    }
    return entry, confusion


def mean_over_domains(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over domains of every metric that all of them have."""
    metrics = [entry["metrics"] for entry in domains.values()]
    shared = [name for name in metrics[0] if all(m.get(name) is not None for m in metrics)]
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in shared}


def write_scores(path: Path, found: Mapping[str, DomainScores], indices: Mapping[str, ShardIndex]) -> None:
    """scores.parquet: domain, key, label, score_0 ..., and label_0 ... where a domain has several labels a clip.

    label: the class's number of single_label, else null. label_i: 0 or 1 for class i, or the value of target i;
    null of single_label. Domains with fewer classes leave the rest of score_i and label_i null.
    """
    labels = [label for domain, d in found.items() for label in labels_of(indices[domain], d.keys).tolist()]
    columns: dict[str, pa.Array] = {
        "domain": pa.array([domain for domain, d in found.items() for _ in d.keys], pa.string()),
        "key": pa.array([key for d in found.values() for key in d.keys], pa.string()),
        "label": pa.array([label if isinstance(label, int) else None for label in labels], pa.int64()),
    }
    columns |= _columns("label", [[] if isinstance(label, int) else label for label in labels])
    columns |= _columns("score", [scores.tolist() for d in found.values() for scores in d.scores])
    pq.write_table(pa.table(columns), path)


def _columns(name: str, rows: Sequence[Sequence[float]]) -> dict[str, pa.Array]:
    """{name}_0 ... of float32, as many as the longest row has; the others are null there."""
    width = max(map(len, rows), default=0)
    return {
        f"{name}_{i}": pa.array([row[i] if i < len(row) else None for row in rows], pa.float32())
        for i in range(width)
    }
