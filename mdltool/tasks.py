"""Tasks: what a domain's labels are. A task owns the loss, the size of the head and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mdltool.registry import Table

TASKS = Table("task", {"single_label": "mdltool.tasks:SingleLabel"})


class Task(ABC):
    """Loss, head size, scores and metrics of one kind of label."""

    name: ClassVar[str]
    headline: ClassVar[str]

    @abstractmethod
    def outputs(self, num_classes: int) -> int:
        """How many outputs the head has."""

    @abstractmethod
    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The batch's loss, a scalar; reduction: mean or sum over the batch."""

    @abstractmethod
    def probabilities(self, logits_BN: Tensor) -> Tensor:
        """Logits to scores in 0..1 of the same shape."""

    @abstractmethod
    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        """Metrics as fractions over M clips. wrong_M: clips that count as wrong whatever their scores (missing)."""

    @abstractmethod
    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        """{"accuracy": [N], "clips": [N], "confusion": [N][N]}, rows true; accuracy None without clips."""


class SingleLabel(Task):
    """One class per clip: cross-entropy, softmax, top-1, top-5 and mean class accuracy."""

    name = "single_label"
    headline = "top1"

    def outputs(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return functional.cross_entropy(logits_BN, labels, reduction=reduction)

    def probabilities(self, logits_BN: Tensor) -> Tensor:
        return logits_BN.softmax(dim=-1)

    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        if len(labels_M) == 0:
            return {"top1": 0.0, "top5": 0.0, "mean_class": 0.0}
        ranks_M = _ranks(scores_MN, labels_M)
        usable_M = torch.ones_like(labels_M, dtype=torch.bool) if wrong_M is None else ~wrong_M
        accuracies = [a for a in self.per_class(scores_MN, labels_M, wrong_M)["accuracy"] if a is not None]
        return {
            "top1": float(((ranks_M < 1) & usable_M).double().mean()),
            "top5": float(((ranks_M < 5) & usable_M).double().mean()),
            "mean_class": sum(accuracies) / len(accuracies),
        }

    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        num_classes = scores_MN.shape[1]
        usable_M = torch.ones_like(labels_M, dtype=torch.bool) if wrong_M is None else ~wrong_M
        # argmax takes the first of equal scores, and so does _ranks
        predicted_M = scores_MN.argmax(dim=1)
        if num_classes == 1:
            confusion = torch.tensor([[int(usable_M.sum())]])
        else:
            confusion = multiclass_confusion_matrix(predicted_M[usable_M], labels_M[usable_M], num_classes)
        clips_N = torch.bincount(labels_M, minlength=num_classes)
        correct_N = confusion.diagonal()
        accuracy = [float(c / n) if n else None for c, n in zip(correct_N, clips_N, strict=True)]
        return {"accuracy": accuracy, "clips": clips_N.tolist(), "confusion": confusion.tolist()}


def _ranks(scores_MN: Tensor, labels_M: Tensor) -> Tensor:
    """How many classes stand before the true one in each row; of equal scores the lower index stands before."""
    own_M1 = scores_MN.gather(1, labels_M[:, None])
    index_N = torch.arange(scores_MN.shape[1])
    before = (scores_MN > own_M1) | ((scores_MN == own_M1) & (index_N < labels_M[:, None]))
    return before.sum(dim=1)
