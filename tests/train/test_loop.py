"""The training loop: one update after D backward passes, its schedule, checkpoints and what stops it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mdltool.errors import MdlError, Stopped
from mdltool.model import MultiDomainModel
from mdltool.tasks import SingleLabel
from mdltool.train.checkpoint import load_checkpoint
from mdltool.train.loop import Trainer
from mdltool.train.objective import Objective, TaskObjective
from mdltool.train.optim import OptimizerSpec, ScheduleSpec, learning_rate, make_optimizer
from mdltool.train.plan import RunParts, StepSpec, TrainSpec
from mdltool.types import Batch
from tests.models import clips, tiny_model

DOMAINS = ("a", "b", "c")
SGD = OptimizerSpec("sgd", 0.1, momentum=0.9, weight_decay=5e-5)


def batch(domain: str, position: int, size: int = 2) -> Batch:
    seed = 100 * position + DOMAINS.index(domain)
    labels = torch.arange(size) % 3
    return Batch(domain, clips(size, seed=seed), labels, [f"{domain}{position}-{i}" for i in range(size)])


def loader(start: int, updates: int = 100, rounds: int = 1) -> Iterator[Batch]:
    for update in range(start, updates):
        for round_ in range(rounds):
            for domain in DOMAINS:
                yield batch(domain, update * rounds + round_)


def spec(updates: int = 4, **changes: Any) -> TrainSpec:
    step = StepSpec(changes.pop("regime", "joint"), updates, changes.pop("optimizer", SGD), ScheduleSpec())
    fields: dict[str, Any] = {
        "steps": (step,),
        "domains": DOMAINS,
        "batches": len(DOMAINS),
        "bn": "shared",
        "channels_last": False,
    }
    return TrainSpec(**(fields | changes))


def objective(**options: Any) -> TaskObjective:
    return TaskObjective(dict.fromkeys(DOMAINS, SingleLabel()), **options)


def trainer(
    folder: Path,
    model: MultiDomainModel,
    plan: TrainSpec,
    batches=loader,
    validate=None,
    minimised: Objective | None = None,
) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    parts = RunParts(batches, validate, lambda m: m.tensors(), Accelerator(cpu=True), plan.batches)
    return Trainer(model, plan, minimised or objective(), folder, parts)


def model_of(seed: int = 0, bn: str = "shared") -> MultiDomainModel:
    return tiny_model("2d", "early-1", DOMAINS, seed=seed, bn=bn)


def states_equal(a: MultiDomainModel, b: MultiDomainModel) -> bool:
    other = b.tensors()
    return all(torch.equal(value, other[key]) for key, value in a.tensors().items())


@pytest.mark.parametrize("average", [False, True])
def test_an_update_is_the_step_of_the_sum_of_separate_gradients(tmp_path: Path, average: bool) -> None:
    """Spec property 4, in double precision, with frozen BatchNorm so that the passes do not touch each other."""
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    model, reference = model_of(bn="frozen"), model_of(bn="frozen")
    for norm in [*model.backbone_norms(), *reference.backbone_norms()]:
        torch.nn.init.ones_(norm.weight)  # X3D begins with zero gains, which would hide the branches behind them
    plan = spec(1, bn="frozen")
    trainer(tmp_path, model, plan, minimised=objective(weights=weights, average=average)).run()
    reference.apply_regime("joint", "frozen")
    summed: dict[str, torch.Tensor] = {}
    for domain in DOMAINS:
        reference.zero_grad(set_to_none=True)
        reference.train()
        one = batch(domain, 0)
        loss = torch.nn.functional.cross_entropy(reference(one.frames, domain), one.labels)
        (weights[domain] * loss / (3 if average else 1)).backward()
        for key, tensor in reference.tensors().items():
            if tensor.grad is not None:
                summed[key] = summed.get(key, 0) + tensor.grad
    expected = {key: tensor.detach().clone() for key, tensor in reference.tensors().items()}
    for key, gradient in summed.items():
        expected[key] -= SGD.lr * (gradient + SGD.weight_decay * expected[key])
    found = model.tensors()
    for key, gradient in summed.items():
        torch.testing.assert_close(found[key].detach(), expected[key], rtol=1e-6, atol=1e-12, msg=key)
        assert gradient.any(), key


def test_parameters_move_once_an_update_and_not_between(tmp_path: Path) -> None:
    """Spec property 5: constant during the first D - 1 batch steps; the counter counts updates."""
    model, seen = model_of(), []

    def watching(start: int) -> Iterator[Batch]:
        for one in loader(start):
            seen.append((one.domain, model.heads["a"].weight.detach().clone()))
            yield one

    progress = trainer(tmp_path, model, spec(2), watching).run()
    assert progress.update == 2
    assert [domain for domain, _ in seen] == list(DOMAINS) * 2
    first, second = [w for _, w in seen[:3]], [w for _, w in seen[3:]]
    assert all(torch.equal(w, first[0]) for w in first)
    assert all(torch.equal(w, second[0]) for w in second)
    assert not torch.equal(first[0], second[0])


def test_learning_rates_of_the_paper() -> None:
    schedule = ScheduleSpec("step", milestones=(8000, 12000), gamma=0.1)
    rate = learning_rate(schedule, 1e-3, 14000, 3)
    assert [rate(u) for u in (0, 7999)] == [1e-3, 1e-3]
    assert [rate(u) for u in (8000, 11999)] == pytest.approx([1e-4, 1e-4])
    assert rate(12000) == pytest.approx(1e-5)
    by_batch = learning_rate(ScheduleSpec("step", (8000, 12000), 0.1, unit="batch"), 1e-3, 14000, 3)
    assert [by_batch(u) for u in (2666, 2667, 4000)] == pytest.approx([1e-3, 1e-4, 1e-5])


def test_cosine_and_warmup() -> None:
    rate = learning_rate(ScheduleSpec("cosine", warmup=4, final_lr=0.01), 1.0, 104, 3)
    assert [rate(u) for u in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rate(4) == pytest.approx(1.0)
    assert rate(54) == pytest.approx((1 + 0.01) / 2)
    assert rate(104) == pytest.approx(0.01)


def test_optimizers_take_their_values() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = make_optimizer(OptimizerSpec("sgd", 0.1, 0.8, True, weight_decay=0.2), [parameter]).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.8, True, 0.2)
    adamw = make_optimizer(OptimizerSpec("adamw", 0.1, betas=(0.5, 0.6)), [parameter])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.5, 0.6)


def test_every_batch_step_is_logged(tmp_path: Path) -> None:
    trainer(tmp_path, model_of(), spec(2)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["domain"]) for line in lines] == [(u, d) for u in (1, 2) for d in DOMAINS]
    assert all({"loss", "lr", "clips_per_second", "data_wait"} <= set(line) for line in lines)


@pytest.mark.parametrize("optimizer", [SGD, OptimizerSpec("adamw", 0.01)])
def test_a_stopped_run_continues_to_the_same_bits(tmp_path: Path, optimizer: OptimizerSpec) -> None:
    steady = model_of()
    trainer(tmp_path / "steady", steady, spec(4, optimizer=optimizer)).run()

    def killing(start: int) -> Iterator[Batch]:
        for number, one in enumerate(loader(start)):
            if number == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    with pytest.raises(Stopped, match="after update 3"):
        trainer(tmp_path / "cut", model_of(), spec(4, optimizer=optimizer), killing).run()
    resumed = model_of(seed=5)
    progress = trainer(tmp_path / "cut", resumed, spec(4, optimizer=optimizer)).run()
    assert progress.update == 4
    assert states_equal(resumed, steady)
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted([1, 2, 3, 4] * 3)


def test_a_recipe_of_several_steps_resumes_in_each_of_them(tmp_path: Path) -> None:
    steps = (
        StepSpec("heads", 2, SGD, ScheduleSpec()),
        StepSpec("joint", 2, OptimizerSpec("adamw", 0.01), ScheduleSpec("cosine")),
    )
    steady = model_of()
    trainer(tmp_path / "steady", steady, spec(steps=steps, bn="frozen")).run()
    for cut in (1, 2, 3):
        folder = tmp_path / f"cut{cut}"

        def killing(start: int, cut: int = cut) -> Iterator[Batch]:
            for number, one in enumerate(loader(start)):
                if number == 3 * cut - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                yield one

        with pytest.raises(Stopped):
            trainer(folder, model_of(), spec(steps=steps, bn="frozen"), killing).run()
        resumed = model_of(seed=7)
        trainer(folder, resumed, spec(steps=steps, bn="frozen")).run()
        assert states_equal(resumed, steady), cut


def test_damaged_and_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    trainer(tmp_path, model_of(), spec(4, checkpoint_every=1)).run()
    folder = tmp_path / "checkpoints"
    assert [p.name for p in sorted(folder.iterdir())] == [
        "update-000000003.safetensors",
        "update-000000004.safetensors",
    ]
    (folder / "update-000000005.safetensors.tmp").write_bytes(b"torn")
    newest = folder / "update-000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    found = load_checkpoint(folder)
    assert found is not None
    assert found[1]["update"] == 3
    again = model_of(seed=3)
    steady = model_of()
    trainer(tmp_path / "steady", steady, spec(4)).run()
    trainer(tmp_path, again, spec(4)).run()
    assert states_equal(again, steady)


def test_a_loss_that_is_not_finite_stops_with_the_clips(tmp_path: Path) -> None:
    def broken(start: int) -> Iterable[Batch]:
        one = batch("a", 0)
        one.frames[0] = float("nan")
        return iter([one, batch("b", 0), batch("c", 0)])

    with pytest.raises(MdlError, match="nan at update 1") as caught:
        trainer(tmp_path, model_of(), spec(1), broken).run()
    assert "a0-0, a0-1" in str(caught.value)


def test_validation_keeps_the_best_and_says_when_it_came(tmp_path: Path) -> None:
    scores = iter([0.3, 0.9, 0.5])

    def validate(_: MultiDomainModel) -> dict[str, dict[str, float]]:
        value = next(scores)
        return {domain: {"top1": value, "loss": 1.0} for domain in DOMAINS}

    plan = spec(5, val_every=2)
    progress = trainer(tmp_path, model_of(), plan, validate=validate).run()
    assert (progress.best_update, progress.best_score) == (4, pytest.approx(0.9))
    assert progress.best_seconds is not None
    assert progress.best_seconds <= progress.seconds
    assert progress.last_scores["a"]["top1"] == 0.5, "the end is validated too"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_top1" in line] == [2] * 3 + [4] * 3 + [5] * 3
    assert (tmp_path / "weights" / "best.safetensors").exists()


class _DiedError(Exception):
    """What ends a validation."""


def test_what_ends_a_validation_costs_no_update(tmp_path: Path) -> None:
    """The checkpoint comes first; the resumed run validates that update once and is the undisturbed run."""
    steps = (StepSpec("heads", 2, SGD, ScheduleSpec()), StepSpec("joint", 3, SGD, ScheduleSpec()))
    plan = spec(steps=steps, val_every=2, ema=0.5)

    def running(folder: Path, seed: int, dies_at: int) -> MultiDomainModel:
        model, calls = model_of(seed=seed), []

        def validate(model: MultiDomainModel) -> dict[str, dict[str, float]]:
            calls.append(float(model.heads["a"].weight.detach().abs().sum()))
            if len(calls) == dies_at:
                raise _DiedError
            return {domain: {"top1": calls[-1]} for domain in DOMAINS}

        trainer(folder, model, plan, validate=validate).run()
        return model

    steady = running(tmp_path / "steady", 0, 0)
    for dies_at, seed in ((1, 0), (2, 5), (2, 6)):  # at updates 2 (the end of a step), 4 and 5 (the end)
        with pytest.raises(_DiedError):
            running(tmp_path / "cut", seed, dies_at)
    assert states_equal(running(tmp_path / "cut", 7, 0), steady)
    files = ("weights/best.safetensors", "weights/ema.safetensors")
    assert all((tmp_path / "cut" / f).read_bytes() == (tmp_path / "steady" / f).read_bytes() for f in files)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("steady", "cut")
    ]
    names = ("step", "domain", "loss", "val_top1")
    assert [[line.get(n) for n in names] for line in logs[1]] == [[line.get(n) for n in names] for line in logs[0]]


def test_a_signal_stops_before_a_validation_and_the_resumed_run_makes_it(tmp_path: Path) -> None:
    validated: list[int] = []

    def validate(_: MultiDomainModel) -> dict[str, dict[str, float]]:
        validated.append(1)
        return {domain: {"top1": 0.5} for domain in DOMAINS}

    def killing(start: int) -> Iterator[Batch]:
        for number, one in enumerate(loader(start)):
            if number == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    with pytest.raises(Stopped, match="after update 2"):
        trainer(tmp_path, model_of(), spec(4, val_every=2), killing, validate).run()
    assert not validated
    trainer(tmp_path, model_of(), spec(4, val_every=2), validate=validate).run()
    assert len(validated) == 2


def test_recalibration_measures_each_domain_after_shared_training(tmp_path: Path) -> None:
    model = model_of(bn="recalibrate")
    shift = {"a": 0.0, "b": 3.0, "c": -2.0}

    def shifted(start: int) -> Iterator[Batch]:
        for one in loader(start, updates=3):
            one.frames += shift[one.domain]
            yield one

    trainer(tmp_path, model, spec(3, bn="recalibrate", recalibrate_batches=3), shifted).run()
    stem = model.norms["blocks.0.norm"].statistics
    convolved = [one for one in shifted(0) if one.domain == "b"]
    with torch.no_grad():
        stem_input = [model.backbone.net.get_submodule("blocks.0").inner.conv(one.frames) for one in convolved]
    expected = torch.stack([x.mean((0, 2, 3, 4)) for x in stem_input]).mean(0)
    torch.testing.assert_close(stem["b"].running_mean, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(stem["a"].running_mean, stem["b"].running_mean)
    assert all(int(stem[d].num_batches_tracked) == 3 for d in DOMAINS)


def test_groups_decay_matrices_alone_and_give_the_backbone_its_own_rate() -> None:
    matrix, vector, own = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2, 2)))
    spec = OptimizerSpec("adamw", 0.1, weight_decay=0.5, decay="matrices", backbone_lr=0.01)
    groups = make_optimizer(spec, [matrix, vector, own], [own]).param_groups
    by_parameter = {id(p): (g["weight_decay"], round(g["scale"], 9)) for g in groups for p in g["params"]}
    assert [by_parameter[id(p)] for p in (matrix, vector, own)] == [(0.5, 1.0), (0.0, 1.0), (0.5, 0.1)]
    assert len(make_optimizer(OptimizerSpec("sgd", 0.1), [matrix, vector, own], [own]).param_groups) == 1
