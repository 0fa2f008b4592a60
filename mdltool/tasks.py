"""Tasks: what a domain's labels are. A task owns the loss, the size of the head and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mdltool.errors import MdlError
from mdltool.registry import Table

TASKS = Table(
    "task",
    {
        "single_label": "mdltool.tasks:SingleLabel",
        "multi_label": "mdltool.tasks:MultiLabel",
        "regression": "mdltool.tasks:Regression",
    },
)


class Task(ABC):
    """Loss, head size, scores and metrics of one kind of label.

    Labels of M clips are int64 [M] of single_label, and [M, N] of the others: 0 or 1 for each class, or the value
    of each target. headline: the metric by which weights are compared; higher_is_better: in which direction.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @abstractmethod
    def outputs(self, num_classes: int) -> int:
        """How many outputs the head has."""

    @abstractmethod
    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The batch's loss, a scalar; reduction: mean or sum over the batch."""

    @abstractmethod
    def probabilities(self, logits_BN: Tensor) -> Tensor:
        """Logits to scores of the same shape: in 0..1, or the predicted values of a regression."""

    @abstractmethod
    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        """Metrics as fractions over M clips. wrong_M: clips that count as wrong whatever their scores (missing)."""

    @abstractmethod
    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        """What is known by class or target; None where a class has no clips.

        single_label: {"accuracy": [N], "clips": [N], "confusion": [N][N]}, rows true. multi_label:
        {"average_precision": [N], "clips": [N]}, clips with the class. regression: {"mse": [N], "clips": [N]}.
        """


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
        cells_M = (labels_M * num_classes + predicted_M)[usable_M]
        confusion = torch.bincount(cells_M, minlength=num_classes**2).view(num_classes, num_classes)
        clips_N = torch.bincount(labels_M, minlength=num_classes)
        correct_N = confusion.diagonal()
        accuracy = [float(c / n) if n else None for c, n in zip(correct_N, clips_N, strict=True)]
        return {"accuracy": accuracy, "clips": clips_N.tolist(), "confusion": confusion.tolist()}


class MultiLabel(Task):
    """Any number of classes per clip: binary cross-entropy, sigmoid and mean average precision (spec cm3t 5.2)."""

    name = "multi_label"
    headline = "map"

    def outputs(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """A clip's loss is the mean over classes; labels may be soft."""
        targets_BN = _each_output(logits_BN, labels, self.name)
        loss_BN = functional.binary_cross_entropy_with_logits(logits_BN, targets_BN, reduction="none")
        return _reduced(loss_BN, reduction)

    def probabilities(self, logits_BN: Tensor) -> Tensor:
        return logits_BN.sigmoid()

    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        """map: mean over the classes with a positive clip. map_micro: over all (clip, class) pairs as one class."""
        per_class = self.per_class(scores_MN, labels_M, wrong_M)["average_precision"]
        found = [value for value in per_class if value is not None]
        wrong = None if wrong_M is None else wrong_M[:, None].expand_as(labels_M).flatten()
        micro = _average_precision(scores_MN.flatten(), labels_M.flatten(), wrong)
        return {"map": sum(found) / len(found) if found else 0.0, "map_micro": micro or 0.0}

    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        columns = zip(scores_MN.T, labels_M.T, strict=True)
        return {
            "average_precision": [_average_precision(scores, labels, wrong_M) for scores, labels in columns],
            "clips": (labels_M > 0).sum(dim=0).tolist(),
        }


class Regression(Task):
    """One number per target: mean squared error, by target and their mean (spec cm3t 5.2)."""

    name = "regression"
    headline = "mse"
    higher_is_better = False

    def outputs(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """A clip's loss is the mean over targets."""
        targets_BN = _each_output(logits_BN, labels, self.name)
        return _reduced((logits_BN - targets_BN).square(), reduction)

    def probabilities(self, logits_BN: Tensor) -> Tensor:
        return logits_BN

    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        """mse: the mean over targets, NaN without clips. No error is wrong enough for a clip without a prediction:
        it is left out.
        """
        per_target = self.per_class(scores_MN, labels_M, wrong_M)["mse"]
        known = [value for value in per_target if value is not None]
        return {"mse": sum(known) / len(known) if known else float("nan")}

    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        error_MN = (scores_MN.double() - labels_M.double()).square()
        if wrong_M is not None:
            error_MN = error_MN[~wrong_M]
        clips, targets = error_MN.shape
        mse = error_MN.mean(dim=0).tolist() if clips else [None] * targets
        return {"mse": mse, "clips": [clips] * targets}


def _each_output(logits_BN: Tensor, labels: Tensor, task: str) -> Tensor:
    """Labels [B, N] in the logits' dtype. Raises MdlError for labels of another shape."""
    if labels.shape != logits_BN.shape:
        raise MdlError(
            f"labels of shape {list(labels.shape)} for outputs of shape {list(logits_BN.shape)}",
            f"task {task}",
            "this task needs a value for every output; use shards made for it, or task: single_label",
        )
    return labels.to(logits_BN.dtype)


def _reduced(loss_BN: Tensor, reduction: str) -> Tensor:
    """The mean over outputs of each clip, and then its mean or sum over clips."""
    loss_B = loss_BN.mean(dim=1)
    return loss_B.sum() if reduction == "sum" else loss_B.mean()


def _average_precision(scores_M: Tensor, labels_M: Tensor, wrong_M: Tensor | None) -> float | None:
    """Sum over thresholds of precision times the recall gained; None without a positive.

    A wrong clip is never retrieved: it adds no precision, and a positive one stays among those to be found.
    """
    # Here, since it costs every command that imports torch another 1.5 s.
    from torchmetrics.functional.classification import binary_average_precision

    usable_M = torch.ones_like(labels_M, dtype=torch.bool) if wrong_M is None else ~wrong_M
    positives, reachable = int((labels_M > 0).sum()), int((labels_M[usable_M] > 0).sum())
    if positives == 0:
        return None
    if reachable == 0:
        return 0.0
    found = binary_average_precision(scores_M[usable_M], (labels_M[usable_M] > 0).long())
    return float(found) * reachable / positives


def _ranks(scores_MN: Tensor, labels_M: Tensor) -> Tensor:
    """How many classes stand before the true one in each row; of equal scores the lower index stands before."""
    own_M1 = scores_MN.gather(1, labels_M[:, None])
    index_N = torch.arange(scores_MN.shape[1])
    before = (scores_MN > own_M1) | ((scores_MN == own_M1) & (index_N < labels_M[:, None]))
    return before.sum(dim=1)
