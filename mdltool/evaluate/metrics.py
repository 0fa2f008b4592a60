"""From scores to the numbers and files of an eval artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mdltool.evaluate.scores import DomainScores, tensors_of
from mdltool.tasks import Task


def domain_report(
    found: DomainScores, task: Task, classes: Sequence[str], listed: int, count_missing: bool
) -> tuple[dict[str, Any], list[list[int]]]:
    """(the domain's entry of metrics.json, its confusion matrix with true classes in rows)."""
    scores, labels, wrong = tensors_of(found, len(classes), count_missing)
    per_class = task.per_class(scores, labels, wrong)
    entry = {
        "task": task.name,
        "metrics": task.metrics(scores, labels, wrong),
        "per_class": {
            name: {"accuracy": accuracy, "clips": clips}
            for name, accuracy, clips in zip(classes, per_class["accuracy"], per_class["clips"], strict=True)
        },
        "clips": {
            "listed": listed,
            "evaluated": len(found.keys),
            "missing": [key for key, _, _ in found.missing],
            "reasons": {key: reason for key, _, reason in found.missing},
        },
        "distinct_views": found.distinct_views,
        "decoder": "+".join(sorted(found.backends)) or None,
    }
    return entry, per_class["confusion"]


def mean_over_domains(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Unweighted mean over domains of every metric that all of them have."""
    metrics = [entry["metrics"] for entry in domains.values()]
    shared = [name for name in metrics[0] if all(name in m for m in metrics)]
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in shared}


def write_scores(path: Path, found: Mapping[str, DomainScores]) -> None:
    """scores.parquet: domain, key, label, score_0 ...; domains with fewer classes leave the rest null."""
    width = max((len(scores) for d in found.values() for scores in d.scores), default=0)
    rows = [
        (domain, key, label, scores.tolist())
        for domain, entry in found.items()
        for key, label, scores in zip(entry.keys, entry.labels, entry.scores, strict=True)
    ]
    columns: dict[str, pa.Array] = {
        "domain": pa.array([row[0] for row in rows], pa.string()),
        "key": pa.array([row[1] for row in rows], pa.string()),
        "label": pa.array([row[2] for row in rows], pa.int64()),
    }
    for i in range(width):
        values = [row[3][i] if i < len(row[3]) else None for row in rows]
        columns[f"score_{i}"] = pa.array(values, pa.float32())
    pq.write_table(pa.table(columns), path)
