"""One model with a verb_noun, a multi_label and a regression domain: scores of a batch of all of them."""

from __future__ import annotations

import pytest
import torch

from mdltool.data.loader import ClipViews
from mdltool.errors import MdlError
from mdltool.evaluate.scores import score_domain, score_mixed
from mdltool.evaluate.views import Views
from mdltool.tasks import task_of
from mdltool.train.objective import Clips, Smoothing, TaskObjective
from mdltool.types import LabelSpace
from tests.models import clips, tiny_model

SPACES = {
    "acts": LabelSpace("verb_noun", ("take", "put", "cup", "pan", "lid"), 2, ((0, 0), (0, 2), (1, 1))),
    "marks": LabelSpace("multi_label", ("one", "two", "four")),
    "traits": LabelSpace("regression", ("height", "depth")),
}
LABELS = {
    "acts": torch.tensor([[0, 2], [1, 1]]),
    "marks": torch.tensor([[1.0, 0, 1], [0, 0, 0]]),
    "traits": torch.tensor([[0.5, -1.0], [2.0, 0.25]]),
}
OUTPUTS = {name: len(space.classes) for name, space in SPACES.items()}


def test_a_batch_of_several_tasks_scores_as_each_alone() -> None:
    model = tiny_model(domains=OUTPUTS, bn="frozen")
    tasks = {name: task_of(space) for name, space in SPACES.items()}
    given = [(name, clips(2, seed=seed)) for seed in (1, 2) for name in SPACES]
    together = score_mixed(model, given, tasks)
    for (name, views), scores in zip(given, together, strict=True):
        logits = model(views, name)
        assert logits.shape == (2, OUTPUTS[name])
        torch.testing.assert_close(scores, tasks[name].probabilities(logits).mean(0).float(), rtol=0, atol=1e-6)
    verbs, nouns = together[0].split([2, 3])
    torch.testing.assert_close(torch.stack([verbs.sum(), nouns.sum()]), torch.ones(2))


def test_scores_that_are_not_finite_stop_the_evaluation() -> None:
    """As NaN compares, no class would stand before the true one."""
    model = tiny_model(domains=OUTPUTS, bn="frozen")
    torch.nn.init.constant_(model.heads["acts"].get_parameter("weight"), torch.nan)
    task, views = task_of(SPACES["acts"]), clips(1, seed=1)
    with pytest.raises(MdlError, match="scores of clip/7 are not finite"):
        score_domain(model, [ClipViews("clip/7", Views(views, 1, "pyav"), None)], "acts", task)
    with pytest.raises(MdlError, match="not finite"):
        score_mixed(model, [("acts", views)], {"acts": task})


def test_every_task_trains_with_smoothing() -> None:
    """The loss of each domain is its task's, and its gradient reaches that domain's head alone."""
    model = tiny_model(domains=OUTPUTS, bn="frozen")
    tasks = {name: task_of(space) for name, space in SPACES.items()}
    objective = TaskObjective(tasks, smoothing=Smoothing(0.1))
    for number, name in enumerate(SPACES):
        model.zero_grad()
        batch = Clips(clips(2), LABELS[name], name, torch.full((2,), number), {name: 2})
        part = objective(model, batch)
        part.total.backward()
        logits, partner = model(batch.frames, name), torch.arange(2)
        soft = tasks[name].soft_labels(LABELS[name], OUTPUTS[name], partner, 1.0, 0.1)
        torch.testing.assert_close(part.total, tasks[name].loss(logits, soft.to(logits.dtype), "mean"))
        reached = {d for d, head in model.heads.items() if any(p.grad is not None for p in head.parameters())}
        assert reached == {name}
