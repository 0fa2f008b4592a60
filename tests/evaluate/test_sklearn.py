"""Average precision and mean squared error are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, mean_squared_error

from mdltool.tasks import MultiLabel, Regression


@pytest.mark.parametrize("decimals", [8, 1, 0], ids=["distinct", "ties", "nearly-all-tied"])
@pytest.mark.parametrize("share", [0.3, 0.02], ids=["common", "rare"])
def test_mean_average_precision(decimals: int, share: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((150, 15)) < share
    labels[0] = True  # sklearn knows no average precision without a positive clip
    scores = rng.random((150, 15)).round(decimals)
    task, given = MultiLabel(), (torch.from_numpy(scores), torch.from_numpy(labels).float())
    found = task.metrics(*given)
    assert found["map"] == pytest.approx(average_precision_score(labels, scores, average="macro"), abs=1e-6)
    assert found["map_micro"] == pytest.approx(average_precision_score(labels, scores, average="micro"), abs=1e-6)
    each = average_precision_score(labels, scores, average=None)
    assert task.per_class(*given)["average_precision"] == pytest.approx(each, abs=1e-6)


def test_classes_without_a_clip_are_in_no_mean() -> None:
    """As sklearn has it of the other classes; micro over all of them."""
    rng = np.random.default_rng(1)
    labels, scores = rng.random((60, 6)) < 0.4, rng.random((60, 6)).round(1)
    labels[:, 2] = False
    found = MultiLabel().metrics(torch.from_numpy(scores), torch.from_numpy(labels).float())
    known = [0, 1, 3, 4, 5]
    assert found["map"] == pytest.approx(average_precision_score(labels[:, known], scores[:, known]), abs=1e-6)
    assert found["map_micro"] == pytest.approx(average_precision_score(labels, scores, average="micro"), abs=1e-6)


def test_mean_squared_error() -> None:
    rng = np.random.default_rng(2)
    scores, labels = (rng.normal(3, 2, (80, 5)).astype(np.float32) for _ in range(2))
    task, given = Regression(), (torch.from_numpy(scores), torch.from_numpy(labels))
    assert task.metrics(*given)["mse"] == pytest.approx(mean_squared_error(labels, scores), rel=1e-6)
    each = mean_squared_error(labels, scores, multioutput="raw_values")
    assert task.per_class(*given)["mse"] == pytest.approx(each, rel=1e-6)
    assert float(task.loss(*given, "mean")) == pytest.approx(mean_squared_error(labels, scores), rel=1e-5)
