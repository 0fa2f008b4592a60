"""Scores of groups of clips that shards name: published subsets, and what is known of each participant.

Shape suffixes: M clips, P participants, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mdltool.tasks import Regression, Task


def of_subsets(
    task: Task,
    subsets: Mapping[str, frozenset[str]],
    keys: Sequence[str],
    scores_MN: Tensor,
    labels_M: Tensor,
    wrong_M: Tensor,
) -> dict[str, dict[str, float]]:
    """Subset -> the task's metrics over its clips, NaN without any, and how many those are. keys: of M clips."""
    found = {}
    for name, members in subsets.items():
        rows = torch.tensor([row for row, key in enumerate(keys) if key in members], dtype=torch.long)
        metrics = task.metrics(scores_MN[rows], labels_M[rows], wrong_M[rows])
        found[name] = {"clips": len(rows), **(metrics if len(rows) else dict.fromkeys(metrics, math.nan))}
    return found


def of_participants(
    task: Task,
    participants: Mapping[str, frozenset[str]],
    keys: Sequence[str],
    scores_MN: Tensor,
    labels_MN: Tensor,
    wrong_M: Tensor,
) -> tuple[int, list[float]] | None:
    """(participants, each target's mean squared error over them) of a regression; None of other tasks and nobody.

    A participant's prediction is the median over the windows in which they are seen, and so is their label (spec
    cm3t 5.2). One without a window that decodes is left out.
    """
    if not isinstance(task, Regression):
        return None
    row_of = {key: row for row, key in enumerate(keys) if not wrong_M[row]}
    groups = [[row_of[key] for key in sorted(members) if key in row_of] for members in participants.values()]
    groups = [rows for rows in groups if rows]
    if not groups:
        return None
    errors = [np.square(_median(scores_MN[rows]) - _median(labels_MN[rows])) for rows in groups]
    return len(groups), np.stack(errors).mean(axis=0).tolist()


def _median(values_MN: Tensor) -> np.ndarray:
    """float64 [N], over the rows; of an even number the mean of the middle two."""
    found: np.ndarray = np.median(values_MN.double().numpy(), axis=0)
    return found
