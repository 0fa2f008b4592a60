"""Training in steps that train named adapters, with streams (spec cm3t 2.8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mdltool.data.loader import ClipViews
from mdltool.evaluate.scores import score_domain, score_mixed
from mdltool.evaluate.views import Views
from mdltool.model import MultiDomainModel, build_model
from mdltool.tasks import SingleLabel
from mdltool.train.loop import Trainer
from mdltool.train.objective import TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec
from mdltool.train.plan import Progress, RunParts, StepSpec, TrainSpec
from mdltool.types import Batch, StreamTokens
from tests.adapters.streams import clips, stream_model, stream_spec, tokens

SPEC = replace(stream_spec("clip_vit_tiny"), domains={"a": 3})


def batches(start: int) -> Iterator[Batch]:
    for update in range(start, 4):
        torch.manual_seed(update)
        frames = clips(SPEC, 2).float() + torch.randn(())
        given = {"audio": tokens(2, 0, seed=update), "flow": tokens(1, 3, seed=update)}
        streams = {name: StreamTokens(s.tokens_BMD.float(), s.mask_BM) for name, s in given.items()}
        yield Batch("a", frames, torch.tensor([0, 1]), ["x", "y"], streams=streams)


def trained(
    folder: Path, updates: tuple[int, int], validate: Any = None, **changes: Any
) -> tuple[MultiDomainModel, Progress]:
    """Two steps of so many updates: vision adapters, then cross-attention."""
    torch.manual_seed(0)
    model = build_model(SPEC)
    sgd = OptimizerSpec("sgd", 0.1)
    last = {"adapters": ("caa",), **changes}
    steps = (
        StepSpec("frozen", updates[0], sgd, ScheduleSpec(), ("mhva", "prefix")),
        StepSpec("frozen", updates[1], sgd, ScheduleSpec(), **last),
    )
    plan = TrainSpec(
        steps[: 1 + bool(updates[1])], ("a",), 1, "frozen", channels_last=False, val_every=int(validate is not None)
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = RunParts(batches, validate, lambda m: m.tensors(), Accelerator(cpu=True), 1)
    return model, Trainer(model, plan, TaskObjective({"a": SingleLabel()}), folder, parts).run()


def test_each_step_moves_its_own_adapters_and_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = build_model(SPEC).tensors()
    (first, _), (both, _) = trained(tmp_path / "1", (2, 0)), trained(tmp_path / "2", (2, 2))
    for key, start in before.items():
        middle, end = first.tensors()[key], both.tensors()[key]
        if not key.startswith("a/"):
            assert torch.equal(start, end), key
        elif "+caa" in key:
            assert torch.equal(start, middle), key
        elif "/head/" not in key:
            assert torch.equal(middle, end), key
    for key in ("a/block1.mlp/up", "a/block1.mlp+caa/out.weight", "a/head/weight"):
        assert not torch.equal(before[key], both.tensors()[key]), key
    trained(tmp_path / "3", (2, 1))
    again, _ = trained(tmp_path / "3", (2, 2))  # goes on from the checkpoint of update 3
    assert all(torch.equal(value, both.tensors()[key]) for key, value in again.tensors().items())
    assert not torch.equal(again.tensors()["a/block1.mlp+caa/out.weight"], before["a/block1.mlp+caa/out.weight"])


def test_the_best_weights_are_of_what_the_stored_model_computes(tmp_path: Path) -> None:
    """Steps that mute differently compute something else."""
    seen: list[set[str]] = []

    def validate(model: MultiDomainModel) -> dict[str, dict[str, float]]:
        seen.append({model.types[site] for site, wrapper in model.sites.items() if wrapper.muted})
        return {"a": {"top1": 1.0 / len(seen), "loss": 0.0}}  # the first would be the best

    _, progress = trained(tmp_path, (2, 2), validate, mute=("mhva", "prefix"))
    assert seen == [set(), set(), {"mhva", "prefix"}, {"mhva", "prefix"}]
    assert (progress.best_update, progress.best_score) == (3, 1 / 3)


def test_scores_are_of_each_clip_with_its_own_streams() -> None:
    model = stream_model(SPEC).float()
    frames = clips(SPEC, 6).float()
    streams = [{"audio": torch.randn(3, 12)}, {"audio": torch.zeros(0, 12), "flow": torch.randn(1, 12)}, {}]
    views = [ClipViews(str(i), Views(frames[2 * i : 2 * i + 2], 2, "test"), None, streams[i]) for i in range(3)]
    found = score_domain(model, views, "a", SingleLabel())
    mixed = score_mixed(
        model, [("a", view.views.frames) for view in views], {"a": SingleLabel()}, batch=3, streams=streams
    )
    for i, given in enumerate(streams):
        with torch.no_grad():
            alone = {n: StreamTokens(t.expand(2, -1, -1), torch.ones(2, len(t)).bool()) for n, t in given.items()}
            alone = {name: tokens for name, tokens in alone.items() if tokens.mask_BM.numel()}
            expected = model(frames[2 * i : 2 * i + 2], "a", alone).softmax(1).mean(0)
        torch.testing.assert_close(found.scores[i], expected)
        torch.testing.assert_close(mixed[i], expected)
