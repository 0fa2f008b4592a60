"""Metrics against independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdltool.tasks import SingleLabel


def test_metrics_against_numpy() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((200, 12)), rng.integers(0, 11, 200)  # class 11 has no clip
    found = SingleLabel().metrics(torch.from_numpy(scores), torch.from_numpy(labels))
    order = np.argsort(-scores, axis=1)
    top1 = order[:, 0] == labels
    assert found["top1"] == pytest.approx(top1.mean())
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert found["mean_class"] == pytest.approx(np.mean([top1[labels == c].mean() for c in range(11)]))


def test_per_class_and_confusion() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    found = SingleLabel().per_class(scores, labels)
    assert found == {
        "accuracy": [0.5, 0.5, None],
        "clips": [2, 2, 0],
        "confusion": [[1, 1, 0], [1, 1, 0], [0, 0, 0]],
    }


def test_missing_clips_count_as_wrong() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    labels, wrong = torch.tensor([0, 0]), torch.tensor([False, True])
    assert SingleLabel().metrics(scores, labels, wrong) == {"top1": 0.5, "top5": 0.5, "mean_class": 0.5}


def test_equal_scores_do_not_help() -> None:
    scores = torch.full((3, 4), 0.25)
    assert SingleLabel().metrics(scores, torch.tensor([0, 1, 2]))["top1"] == pytest.approx(1 / 3)


def test_a_single_class_works() -> None:
    found = SingleLabel().metrics(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    assert found == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0}
    assert float(SingleLabel().loss(torch.randn(2, 1), torch.zeros(2, dtype=torch.long), "mean")) == 0.0


def test_the_loss_is_cross_entropy_by_hand() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    by_hand = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(5), labels]
    assert float(SingleLabel().loss(logits, labels, "mean")) == pytest.approx(float(by_hand.mean()))
    assert float(SingleLabel().loss(logits, labels, "sum")) == pytest.approx(float(by_hand.sum()))
