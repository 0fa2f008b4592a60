"""Metrics against independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mdltool.errors import MdlError
from mdltool.tasks import TASKS, MultiLabel, Regression, SingleLabel, VerbNoun, task_of
from mdltool.types import LabelSpace

PAIRS = ((0, 0), (0, 1), (1, 1))


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_wrong(value: float) -> None:
    scores, labels = torch.tensor([[value] * 4, [0.0, 1.0, 0.0, 0.0]]), torch.tensor([[0, 0], [1, 1]])
    assert SingleLabel().metrics(scores, labels[:, 0]) == {"top1": 0.5, "top5": 0.5, "mean_class": 0.5}
    found = VerbNoun(2, 2, PAIRS).metrics(scores, labels)
    assert found["verb_top1"] == found["noun_top5"] == found["action_top5"] == 0.5
    assert MultiLabel().metrics(scores[:1], torch.eye(4)[:1]) == {"map": 0.0, "map_micro": 0.0}


def test_a_single_class_works() -> None:
    found = SingleLabel().metrics(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    assert found == {"top1": 1.0, "top5": 1.0, "mean_class": 1.0}
    assert float(SingleLabel().loss(torch.randn(2, 1), torch.zeros(2, dtype=torch.long), "mean")) == 0.0


def test_the_loss_is_cross_entropy_by_hand() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    by_hand = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(5), labels]
    assert float(SingleLabel().loss(logits, labels, "mean")) == pytest.approx(float(by_hand.mean()))
    assert float(SingleLabel().loss(logits, labels, "sum")) == pytest.approx(float(by_hand.sum()))


def average_precision(scores: np.ndarray, positive: np.ndarray, retrieved: np.ndarray) -> float:
    """Sum over distinct thresholds of precision times the recall gained, by the definition."""
    value, last = 0.0, 0.0
    for threshold in np.unique(scores[retrieved])[::-1]:
        chosen = retrieved & (scores >= threshold)
        recall = (positive & chosen).sum() / positive.sum()
        value += (recall - last) * (positive & chosen).sum() / chosen.sum()
        last = recall
    return value


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("decimals", [1, 6])
def test_mean_average_precision_against_numpy(missing: float, decimals: int) -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.random((80, 7)).round(decimals), rng.random((80, 7)) < 0.2  # one decimal: many ties
    positive[:, 5] = False
    wrong = rng.random(80) < missing
    given = torch.from_numpy(scores), torch.from_numpy(positive.astype(np.int64)), torch.from_numpy(wrong)
    expected = [average_precision(scores[:, c], positive[:, c], ~wrong) for c in range(7) if c != 5]
    found, per_class = MultiLabel().metrics(*given), MultiLabel().per_class(*given)
    assert per_class["average_precision"][5] is None
    assert [ap for ap in per_class["average_precision"] if ap is not None] == pytest.approx(expected, abs=1e-5)
    assert per_class["clips"] == positive.sum(0).tolist()
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-5)
    retrieved = np.repeat(~wrong, 7)
    micro = average_precision(scores.ravel(), positive.ravel(), retrieved)
    assert found["map_micro"] == pytest.approx(micro, abs=1e-5)


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1, 0], [0, 0], [1, 0]])
    assert MultiLabel().metrics(scores, labels) == pytest.approx({"map": (1 + 2 / 3) / 2, "map_micro": 5 / 6})
    gone = torch.tensor([False, False, True])
    assert MultiLabel().metrics(scores, labels, gone)["map"] == pytest.approx(0.5)
    assert MultiLabel().metrics(scores, labels, torch.ones(3, dtype=torch.bool))["map"] == 0.0


def test_no_clips_have_no_precision() -> None:
    for scores, labels in ((torch.zeros(0, 3), torch.zeros(0, 3)), (torch.rand(2, 3), torch.zeros(2, 3))):
        assert MultiLabel().metrics(scores, labels.long()) == {"map": 0.0, "map_micro": 0.0}


def test_binary_cross_entropy_by_hand() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([[0, 1, 1]] * 4 + [[0, 0, 0]])
    p = 1 / (1 + np.exp(-logits.numpy()))
    np.testing.assert_allclose(MultiLabel().probabilities(logits).numpy(), p)
    each = -(labels.numpy() * np.log(p) + (1 - labels.numpy()) * np.log(1 - p)).mean(1)
    assert float(MultiLabel().loss(logits, labels, "mean")) == pytest.approx(each.mean())
    assert float(MultiLabel().loss(logits, labels, "sum")) == pytest.approx(each.sum())


def test_regression_against_numpy() -> None:
    rng = np.random.default_rng(0)
    predicted, true, wrong = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)), rng.random(40) < 0.2
    given, labels = torch.from_numpy(predicted), torch.from_numpy(true)
    error = (predicted - true) ** 2
    assert float(Regression().loss(given, labels, "mean")) == pytest.approx(error.mean())
    assert float(Regression().loss(given, labels, "sum")) == pytest.approx(error.mean(1).sum())
    assert torch.equal(Regression().probabilities(given), given)
    assert Regression().metrics(given, labels) == pytest.approx({"mse": error.mean()})
    per_target = Regression().per_class(given, labels, torch.from_numpy(wrong))
    assert per_target["mse"] == pytest.approx(error[~wrong].mean(0))
    assert per_target["clips"] == [int((~wrong).sum())] * 5


def test_regression_without_clips_knows_nothing() -> None:
    found = Regression().metrics(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([True, True]))
    assert np.isnan(found["mse"])


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name: str) -> None:
    own = {"verbs": 2, "actions": PAIRS} if name == "verb_noun" else {}
    task = task_of(LabelSpace(name, ("a", "b", "c", "d"), **own))
    assert task.name == name
    assert task.outputs(4) == 4
    labels = torch.tensor([0, 3]) if name == "single_label" else torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1]])
    labels = labels[:, :2] if name == "verb_noun" else labels
    logits = torch.randn(2, 4, requires_grad=True)
    mean, total = task.loss(logits, labels, "mean"), task.loss(logits, labels, "sum")
    torch.testing.assert_close(total, 2 * mean)
    mean.backward()
    assert logits.grad is not None
    metrics = task.metrics(task.probabilities(logits.detach()), labels)
    assert task.headline in metrics


@pytest.mark.parametrize("task", [MultiLabel(), Regression()])
def test_labels_of_another_shape_are_named(task: MultiLabel | Regression) -> None:
    with pytest.raises(MdlError, match=r"labels of shape \[2\] where \[2, 4\] are wanted"):
        task.loss(torch.randn(2, 4), torch.tensor([0, 3]), "mean")


def test_verb_noun_and_action_by_hand() -> None:
    """Verbs take, put; nouns cup, pan. Valid: take cup, take pan, put pan."""
    task = VerbNoun(2, 2, PAIRS)
    scores = torch.tensor(
        [
            [0.6, 0.4, 0.6, 0.4],  # 0.36, 0.24, 0.16: take cup, which is right
            [0.4, 0.6, 0.7, 0.3],  # 0.28, 0.12, 0.18: take cup; put cup, the best of both, is not valid
            [0.1, 0.9, 0.2, 0.8],  # put pan, which is right
            [0.9, 0.1, 0.9, 0.1],  # put pan is the last of the three
        ],
        dtype=torch.float64,
    )
    labels = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 1]])
    np.testing.assert_allclose(task.action_scores(scores[:2]), [[0.36, 0.24, 0.16], [0.28, 0.12, 0.18]])
    found = task.metrics(scores, labels)
    assert (found["verb_top1"], found["noun_top1"], found["action_top1"]) == (0.5, 0.75, 0.75)
    assert found["verb_top5"] == found["noun_top5"] == found["action_top5"] == 1.0
    gone = torch.tensor([False, False, True, False])
    missing = task.metrics(scores, labels, gone)
    assert (missing["verb_top1"], missing["noun_top1"], missing["action_top1"]) == (0.25, 0.5, 0.5)
    assert missing["action_top5"] == 0.75
    unheard = task.metrics(scores, torch.tensor([[1, 0]] * 4))
    assert (unheard["action_top5"], unheard["verb_top5"]) == (0.0, 1.0), "no valid pair, no right action"
    per_class = task.per_class(scores, labels, gone)
    assert per_class["accuracy"] == [0.5, 0.0, 1.0, 0.0]
    assert per_class["clips"] == [2, 2, 2, 2]
    assert per_class["confusion"] == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0]]


def test_verb_noun_metrics_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdltool.tasks._AT_ONCE", 7)
    rng = np.random.default_rng(0)
    verbs, nouns, clips = 9, 11, 120
    pairs = sorted(
        {(int(v), int(n)) for v, n in zip(rng.integers(0, verbs, 40), rng.integers(0, nouns, 40), strict=True)}
    )
    task = VerbNoun(verbs, nouns, pairs)
    scores = task.probabilities(torch.from_numpy(rng.normal(size=(clips, verbs + nouns)))).numpy()
    np.testing.assert_allclose([scores[:, :verbs].sum(1), scores[:, verbs:].sum(1)], np.ones((2, clips)))
    actions = rng.integers(0, len(pairs), clips)
    labels = np.array(pairs)[actions]
    of_actions = np.stack([scores[:, v] * scores[:, verbs + n] for v, n in pairs], axis=1)
    found = task.metrics(torch.from_numpy(scores), torch.from_numpy(labels))
    parts = {"verb": (scores[:, :verbs], labels[:, 0]), "noun": (scores[:, verbs:], labels[:, 1])}
    for name, (own, true) in {**parts, "action": (of_actions, actions)}.items():
        order = np.argsort(-own, axis=1)
        for k in (1, 5):
            assert found[f"{name}_top{k}"] == pytest.approx((order[:, :k] == true[:, None]).any(1).mean())


def test_the_loss_of_verb_and_noun_is_their_sum() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([[0, 3], [2, 0], [1, 1], [2, 2], [0, 0]])
    by_hand = -(
        logits[:, :3].log_softmax(1)[range(5), labels[:, 0]] + logits[:, 3:].log_softmax(1)[range(5), labels[:, 1]]
    )
    task = VerbNoun(3, 4, [(0, 0)])
    assert float(task.loss(logits, labels, "mean")) == pytest.approx(float(by_hand.mean()))
    assert float(task.loss(logits, labels, "sum")) == pytest.approx(float(by_hand.sum()))
    with pytest.raises(MdlError, match=r"labels of shape \[5\] where \[5, 2\] are wanted"):
        task.loss(logits, labels[:, 0], "mean")


def test_labels_are_the_same_after_json() -> None:
    for space in (
        LabelSpace("multi_label", ("x", "y")),
        LabelSpace("verb_noun", ("roll", "cut", "roll"), 2, ((0, 0),)),
    ):
        assert LabelSpace.from_json(space.as_json()) == space
        assert len(set(space.row_names)) == len(space.classes)
    assert LabelSpace("regression", ("o",)).as_json() == {"task": "regression", "classes": ["o"]}
