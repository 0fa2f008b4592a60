"""Tasks: what a domain's labels are. A task owns the loss, the size of the head and the metrics.

Shape suffixes: B batch, M clips, N outputs, V verbs, A actions (valid pairs of verb and noun).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from mdltool.errors import MdlError
from mdltool.losses.targets import mixed_targets
from mdltool.registry import Table
from mdltool.types import LabelSpace

TASKS = Table(
    "task",
    {
        "single_label": "mdltool.tasks:SingleLabel",
        "multi_label": "mdltool.tasks:MultiLabel",
        "regression": "mdltool.tasks:Regression",
        "verb_noun": "mdltool.tasks:VerbNoun",
    },
)

_NEVER = 5  # ranks further than the last that is behind any k
_AT_ONCE = 1024  # clips whose scores of all actions are in memory together


def task_of(space: LabelSpace) -> Task:
    """The task of a domain's labels. Raises MdlError for a name that is no task's."""
    task: Task = TASKS.load(space.task).of(space)
    return task


class Task(ABC):
    """Loss, head size, scores and metrics of one kind of label.

    Labels of M clips are int64 [M] of single_label, int64 [M, 2] of verb_noun, and [M, N] of the others: 0 or 1 for
    each class, or the value of each target. headline: the metric by which weights are compared; higher_is_better:
    in which direction.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    @classmethod
    def of(cls, space: LabelSpace) -> Self:
        """The task of these labels."""
        return cls()

    @abstractmethod
    def outputs(self, num_classes: int) -> int:
        """How many outputs the head has."""

    @abstractmethod
    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The batch's loss, a scalar; reduction: mean or sum over the batch. labels: hard, or as soft_labels."""

    @abstractmethod
    def soft_labels(
        self, labels: Tensor, outputs: int, partner_B: Tensor, own_share: float, smoothing: float
    ) -> Tensor:
        """float32 [B, N] targets of a batch: own_share of a clip's own, the rest its partner's, smoothed.

        outputs is N. Raises MdlError for labels of another shape.
        """

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
        verb_noun: as single_label, of verbs and nouns side by side: no verb is taken for a noun.
        """


class SingleLabel(Task):
    """One class per clip: cross-entropy, softmax, top-1, top-5 and mean class accuracy."""

    name = "single_label"
    headline = "top1"

    def outputs(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return functional.cross_entropy(logits_BN, labels, reduction=reduction)

    def soft_labels(
        self, labels: Tensor, outputs: int, partner_B: Tensor, own_share: float, smoothing: float
    ) -> Tensor:
        """Rows sum to 1, with smoothing / N on every class."""
        domain_B = torch.zeros_like(labels)
        return mixed_targets(labels, domain_B, {"": outputs}, partner_B, own_share, smoothing=smoothing)[""]

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
        usable_M = scores_MN.isfinite().all(dim=1) & (True if wrong_M is None else ~wrong_M)
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
        targets_BN = _of_shape(labels, logits_BN.shape, self.name).to(logits_BN.dtype)
        loss_BN = functional.binary_cross_entropy_with_logits(logits_BN, targets_BN, reduction="none")
        return _reduced(loss_BN, reduction)

    def soft_labels(
        self, labels: Tensor, outputs: int, partner_B: Tensor, own_share: float, smoothing: float
    ) -> Tensor:
        """Smoothed towards 1/2, which is the two-class rule for each class."""
        targets_BN = _of_shape(labels, (len(partner_B), outputs), self.name).float()
        targets_BN = targets_BN * (1 - smoothing) + smoothing / 2
        return own_share * targets_BN + (1 - own_share) * targets_BN[partner_B]

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
        targets_BN = _of_shape(labels, logits_BN.shape, self.name).to(logits_BN.dtype)
        return _reduced((logits_BN - targets_BN).square(), reduction)

    def soft_labels(
        self, labels: Tensor, outputs: int, partner_B: Tensor, own_share: float, smoothing: float
    ) -> Tensor:
        """There are no classes to smooth."""
        targets_BN = _of_shape(labels, (len(partner_B), outputs), self.name).float()
        return own_share * targets_BN + (1 - own_share) * targets_BN[partner_B]

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


class VerbNoun(Task):
    """A verb and a noun per clip: the sum of two cross-entropies (spec cm3t 2.7, 5.2).

    The head's outputs are the verbs and then the nouns, and so are the scores, a softmax of each. An action is a
    valid pair; its score is p(verb) p(noun), and it is right where both are. actions: the pairs (verb, noun).
    """

    name = "verb_noun"
    headline = "action_top1"

    def __init__(self, verbs: int, nouns: int, actions: Sequence[tuple[int, int]]) -> None:
        self.sizes = (verbs, nouns)
        self.pairs_A2 = torch.tensor(actions, dtype=torch.long).reshape(-1, 2)
        self._action_VN = torch.full(self.sizes, -1)
        self._action_VN[tuple(self.pairs_A2.T)] = torch.arange(len(self.pairs_A2))

    @classmethod
    def of(cls, space: LabelSpace) -> Self:
        return cls(space.verbs, len(space.classes) - space.verbs, space.actions)

    def outputs(self, num_classes: int) -> int:
        return num_classes

    def loss(self, logits_BN: Tensor, labels: Tensor, reduction: str) -> Tensor:
        of_verb, of_noun = logits_BN.split(self.sizes, dim=1)
        soft = labels.is_floating_point()
        verbs, nouns = labels.split(self.sizes, dim=1) if soft else self._two(labels).unbind(1)
        total = functional.cross_entropy(of_verb, verbs, reduction=reduction)
        return total + functional.cross_entropy(of_noun, nouns, reduction=reduction)

    def soft_labels(
        self, labels: Tensor, outputs: int, partner_B: Tensor, own_share: float, smoothing: float
    ) -> Tensor:
        """The soft targets of the verbs and those of the nouns, each as single_label's."""
        single, columns = SingleLabel(), self._two(labels).unbind(1)
        parts = zip(columns, self.sizes, strict=True)
        return torch.cat([single.soft_labels(c, n, partner_B, own_share, smoothing) for c, n in parts], dim=1)

    def probabilities(self, logits_BN: Tensor) -> Tensor:
        return torch.cat([part.softmax(dim=-1) for part in logits_BN.split(self.sizes, dim=-1)], dim=-1)

    def action_scores(self, scores_MN: Tensor) -> Tensor:
        """float64 [M, A]: p(verb) p(noun) of the valid pairs; they need not sum to 1."""
        of_verb, of_noun = scores_MN.double().split(self.sizes, dim=-1)
        return of_verb[..., self.pairs_A2[:, 0]] * of_noun[..., self.pairs_A2[:, 1]]

    def metrics(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, float]:
        """Top-1 and top-5 of verbs, nouns and actions. Where a clip's pair is not valid, no action is right."""
        usable_M = torch.ones(len(labels_M), dtype=torch.bool) if wrong_M is None else ~wrong_M
        found = {}
        for name, ranks_M in self._ranks(scores_MN, self._two(labels_M)).items():
            for k in (1, 5):
                hits_M = (ranks_M < k) & usable_M
                found[f"{name}_top{k}"] = float(hits_M.double().mean()) if len(hits_M) else 0.0
        return found

    def _ranks(self, scores_MN: Tensor, labels_M2: Tensor) -> dict[str, Tensor]:
        """verb, noun, action -> how many stand before the true one in each row."""
        of_verb, of_noun = scores_MN.split(self.sizes, dim=1)
        action_M = self._action_VN[tuple(labels_M2.T)]
        parts = zip(scores_MN.split(_AT_ONCE), action_M.clamp(min=0).split(_AT_ONCE), strict=True)
        of_action = [_ranks(self.action_scores(scores), actions) for scores, actions in parts]
        return {
            "verb": _ranks(of_verb, labels_M2[:, 0]),
            "noun": _ranks(of_noun, labels_M2[:, 1]),
            "action": torch.cat(of_action).where(action_M >= 0, len(self.pairs_A2) + _NEVER),
        }

    def per_class(self, scores_MN: Tensor, labels_M: Tensor, wrong_M: Tensor | None = None) -> dict[str, Any]:
        columns = zip(scores_MN.split(self.sizes, dim=1), self._two(labels_M).unbind(1), strict=True)
        verb, noun = (SingleLabel().per_class(scores, labels, wrong_M) for scores, labels in columns)
        squares = (torch.tensor(part["confusion"]) for part in (verb, noun))
        both = {name: verb[name] + noun[name] for name in ("accuracy", "clips")}
        return {**both, "confusion": torch.block_diag(*squares).tolist()}

    def _two(self, labels: Tensor) -> Tensor:
        return _of_shape(labels, (len(labels), 2), self.name)


def _of_shape(labels: Tensor, shape: Sequence[int], task: str) -> Tensor:
    """The labels. Raises MdlError for labels of another shape."""
    if tuple(labels.shape) != tuple(shape):
        raise MdlError(
            f"labels of shape {list(labels.shape)} where {list(shape)} are wanted",
            f"task {task}",
            "use shards made for this task, or task: single_label",
        )
    return labels


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

    usable_M = scores_M.isfinite() & (True if wrong_M is None else ~wrong_M)
    positives, reachable = int((labels_M > 0).sum()), int((labels_M[usable_M] > 0).sum())
    if positives == 0:
        return None
    if reachable == 0:
        return 0.0
    found = binary_average_precision(scores_M[usable_M], (labels_M[usable_M] > 0).long())
    return float(found) * reachable / positives


def _ranks(scores_MN: Tensor, labels_M: Tensor) -> Tensor:
    """How many classes stand before the true one in each row; of equal scores the lower index stands before.

    A row with a score that is not finite has no order: the true class is behind any k there.
    """
    own_M1 = scores_MN.gather(1, labels_M[:, None])
    index_N = torch.arange(scores_MN.shape[1])
    before = (scores_MN > own_M1) | ((scores_MN == own_M1) & (index_N < labels_M[:, None]))
    return before.sum(dim=1).where(scores_MN.isfinite().all(dim=1), scores_MN.shape[1] + _NEVER)
