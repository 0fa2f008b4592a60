"""What the engine adds to plain steps: averaged weights, decay by domain, recomputed activations, several ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from mdltool.errors import MdlError, Stopped
from mdltool.losses.multitrain import MultitrainLoss, MultitrainSpec
from mdltool.model import MultiDomainModel, build_model
from mdltool.sync_norm import batch_norm, synchronise
from mdltool.train.distributed import World as Ranks
from mdltool.train.distributed import sum_gradients
from mdltool.train.objective import MultitrainObjective, Part
from mdltool.train.optim import OptimizerSpec, make_optimizer
from mdltool.train.tally import Tally
from mdltool.types import Batch
from tests.adapters.test_contract import clip, make, randomise
from tests.conftest import World
from tests.models import clips, tiny_model, tiny_spec
from tests.processes import Process, start
from tests.train.test_loop import DOMAINS, SGD, loader, model_of, spec, states_equal, trainer


class TestAverage:
    def test_it_is_the_recursion(self, tmp_path: Path) -> None:
        model, seen = model_of(bn="frozen"), []

        def watching(begin: int) -> Iterator[Batch]:
            for number, one in enumerate(loader(begin)):
                if number % 3 == 0:
                    seen.append(model.heads["a"].weight.detach().clone())
                yield one

        trainer(tmp_path, model, spec(4, bn="frozen", ema=0.3), watching).run()
        weights = [*seen[1:], model.heads["a"].weight.detach()]
        shadow = seen[0]
        for update, weight in enumerate(weights):
            decay = min(0.3, (1 + update) / (10 + update))
            shadow = decay * shadow + (1 - decay) * weight
        stored = load_file(tmp_path / "weights" / "ema.safetensors")
        torch.testing.assert_close(stored["a/head/weight"], shadow, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(stored["a/head/weight"], weights[-1])

    def test_validation_sees_it_and_training_does_not(self, tmp_path: Path) -> None:
        seen = []

        def validate(model: MultiDomainModel) -> dict[str, dict[str, float]]:
            seen.append(model.heads["a"].weight.detach().clone())
            return {d: {"top1": 0.5} for d in DOMAINS}

        model, plain = model_of(bn="frozen"), model_of(bn="frozen")
        trainer(tmp_path / "ema", model, spec(3, bn="frozen", ema=0.3), validate=validate).run()
        trainer(tmp_path / "plain", plain, spec(3, bn="frozen")).run()
        assert states_equal(model, plain)
        stored = load_file(tmp_path / "ema" / "weights" / "ema.safetensors")
        assert torch.equal(seen[-1], stored["a/head/weight"])

    def test_a_stopped_run_averages_on(self, tmp_path: Path) -> None:
        def killing(begin: int) -> Iterator[Batch]:
            for number, one in enumerate(loader(begin)):
                if number == 7:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield one

        trainer(tmp_path / "steady", model_of(), spec(5, ema=0.9)).run()
        with contextlib.suppress(Stopped):
            trainer(tmp_path / "cut", model_of(), spec(5, ema=0.9), killing).run()
        trainer(tmp_path / "cut", model_of(seed=9), spec(5, ema=0.9)).run()
        steady, cut = (load_file(tmp_path / name / "weights" / "ema.safetensors") for name in ("steady", "cut"))
        assert all(torch.equal(value, cut[key]) for key, value in steady.items())


def test_decay_by_domain_moves_its_own_parameters_alone(tmp_path: Path) -> None:
    """A domain without data in the loss would not move; here the decay alone is the difference."""
    plain, heavy = model_of(bn="frozen"), model_of(bn="frozen")
    trainer(tmp_path / "plain", plain, spec(1, bn="frozen")).run()
    trainer(tmp_path / "heavy", heavy, spec(1, bn="frozen", decay={"b": 0.5})).run()
    start_of = model_of(bn="frozen").tensors()
    for key, value in plain.tensors().items():
        expected = value.detach().clone()
        if key.startswith("b/") and isinstance(value, torch.nn.Parameter):
            expected -= SGD.lr * (0.5 - SGD.weight_decay) * start_of[key].detach()
        torch.testing.assert_close(heavy.tensors()[key].detach(), expected, rtol=1e-9, atol=1e-12, msg=key)


def test_loss_weights_have_no_decay() -> None:
    objective = MultitrainObjective(MultitrainLoss(8, {"a": 2, "b": 3}, MultitrainSpec(expander_hidden=4)))
    decays = {id(p): 0.0 for p in objective.weightless()}
    groups = make_optimizer(OptimizerSpec("adamw", 0.1, weight_decay=0.5), objective.parameters(), (), decays)
    found = {id(p): group["weight_decay"] for group in groups.param_groups for p in group["params"]}
    assert [found[id(p)] for p in objective.weightless()] == [0.0, 0.0]
    assert sorted(set(found.values())) == [0.0, 0.5]


RECOMPUTED = [
    ("2plus1d", "x3d_tiny"),
    ("mst", "clip_vit_tiny"),
    ("mhva", "swin3d_tiny"),
    ("st", "mvit_tiny"),
    ("st", "multitrain_mvit_tiny"),
    ("prefix", "vivit_tiny"),
    ("parallel", "resnet26_tiny"),
]


@pytest.mark.parametrize(("adapter", "backbone"), RECOMPUTED)
def test_recomputed_activations_change_nothing_but_memory(adapter: str, backbone: str) -> None:
    found: list[tuple[dict[str, Tensor], int]] = []
    for recomputes in (False, True):
        model = make(adapter, backbone)
        randomise(model)
        model.apply_regime("joint", "shared")
        model.train()
        if recomputes:
            model.checkpoint_activations()
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.manual_seed(0)
            loss = model(clip(model), "a").square().sum()
            other = model(clip(model), "b").square().sum()  # routes elsewhere before the backward pass
        (loss + other).backward()
        state = {key: tensor.detach().clone() for key, tensor in model.tensors().items()}
        gradients = {f"grad {k}": t.grad for k, t in model.tensors().items() if t.grad is not None}
        found.append((state | gradients, kept))
    (plain, memory), (again, less) = found
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert less < 0.7 * memory


def test_batch_norm_over_one_process_is_the_frameworks() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64) * 2 + 3
    made: list[tuple[Tensor, ...]] = []
    for own in (False, True):
        inputs = x.clone().requires_grad_()
        weight, bias = (
            torch.linspace(*ends, 3, dtype=torch.float64).requires_grad_() for ends in ((1, 2), (-1, 1))
        )
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        if own:
            y = batch_norm(inputs, mean, var, weight, bias, 0.1, 1e-5, lambda value: value)
        else:
            y = torch.nn.functional.batch_norm(inputs, mean, var, weight, bias, True, 0.1, 1e-5)
        (y * torch.linspace(0, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        assert inputs.grad is not None
        assert weight.grad is not None
        assert bias.grad is not None
        made.append((y.detach(), mean, var, inputs.grad, weight.grad, bias.grad))
    for theirs, ours in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn", ["shared", "per_domain"])
def test_synchronised_layers_hold_the_same_tensors(bn: str) -> None:
    model, again = (tiny_model(bn=bn) for _ in range(2))
    before = model.tensors()
    layers = {name: type(module) for name, module in model.named_modules()}
    synchronise(model, lambda value: value)
    after = model.tensors()
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    kept = {name: type(module) for name, module in again.named_modules()}
    changed = {name for name, module in model.named_modules() if type(module) is not kept[name]}
    assert changed == {name for name, kind in layers.items() if kind in (nn.BatchNorm2d, nn.BatchNorm3d)}
    for network in (model, again):
        network.apply_regime("joint", bn)
        network.train()(clips(), "a").square().sum().backward()
    for (key, value), other in zip(model.tensors().items(), again.tensors().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=key)
        if value.grad is not None:
            torch.testing.assert_close(value.grad, other.grad, rtol=1e-6, atol=1e-9, msg=key)


def test_a_model_that_is_compiled_trains_as_it_does_otherwise() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(tiny_spec("2d", "early-1"))
        model.apply_regime("joint", "shared")
        model.train()
        if compiled:
            torch._dynamo.reset()
            model.backbone.compile(backend="aot_eager")
        frames = torch.randint(0, 256, (2, 3, 4, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
        sum(model(frames, domain).square().sum() for domain in ("a", "b")).backward()
        found.append({key: t.grad for key, t in model.tensors().items() if t.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4, msg=key)
    torch._dynamo.reset()


def test_summed_gradients_have_their_parameters_memory_format(tmp_path: Path) -> None:
    """Fused optimizers read parameter, gradient and moments by one set of strides."""
    parameter = torch.nn.Parameter(torch.randn(4, 3, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d))
    parameter.grad = torch.randn(4, 3, 3, 3, 3)
    expected = parameter.grad.clone()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sum_gradients([parameter], Ranks(0, 2))
    finally:
        dist.destroy_process_group()
    assert torch.equal(parameter.grad, expected)
    assert parameter.grad.stride() == parameter.stride()


def test_a_term_that_is_not_finite_stops_before_the_step() -> None:
    tally = Tally(("a",), 1)
    part = Part(torch.tensor(1.0), {"a": (torch.tensor(1.0), 2)}, {"covariance": torch.tensor(float("inf"))})
    tally.add(Batch("a", torch.zeros(2), torch.zeros(2), ["a/0", "a/1"]), part)
    with pytest.raises(MdlError, match="'covariance' is inf at update 5") as caught:
        tally.finish(4, False, Ranks())
    assert "a/0, a/1" in str(caught.value)


@pytest.mark.parametrize("name", ["train", "training", "keys"])
def test_names_that_torch_keeps_for_itself(name: str) -> None:
    with pytest.raises(MdlError, match=f"cannot be called '{name}'"):
        build_model(tiny_spec(None, domains=(name,)))


def ended(processes: list[Process], within: float) -> list[tuple[int, str]]:
    """(exit code, stderr) of each process; none may take longer."""
    deadline = time.monotonic() + within
    found = []
    for process in processes:
        _, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        found.append((process.returncode, err))
    return found


def test_what_is_not_finite_in_one_process_ends_all_and_names_the_clips(tmp_path: Path) -> None:
    (first, said), (second, other) = ended(start(2, "tests.train.one_rank_fails", "nan", tmp_path), 60)
    assert (first, second) == (1, 1)
    assert "nan at update 2" in other
    assert "b/7" in other
    assert "Traceback" not in said
    assert "nan" not in said, "one process speaks"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    passed_over = [(line["step"], line["domain"], line["skipped"]) for line in lines if "skipped" in line]
    assert passed_over == [(1, "a", ["a/40"]), (1, "b", ["b/40"])], "of every process, each clip once"
    assert said.count("b/40 of b is passed over: damaged") == 1


def test_a_process_that_dies_ends_the_others(world: World, tmp_path: Path) -> None:
    sets: list[Any] = [w for c in ("train.steps.0.updates=200", "val.every=0") for w in ("--set", c)]
    processes = start(2, "mdltool", *world.train_words(), *sets, "--out", tmp_path / "model")
    metrics, deadline = tmp_path / "model.partial" / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.02)
    processes[1].kill()
    (code, err), _ = ended(processes, 60)
    assert code == 1, err
    assert "Traceback" not in err
    assert "another process has ended" in err


def test_a_reader_that_dies_ends_the_run_with_its_cause(world: World, tmp_path: Path) -> None:
    sets: list[Any] = [w for c in ("train.steps.0.updates=400", "val.every=0") for w in ("--set", c)]
    words = (*world.train_words(), *sets, "--workers", 2, "--out", tmp_path / "model")
    (process,) = start(1, "mdltool", *words)
    metrics, deadline = tmp_path / "model.partial" / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    ((code, err),) = ended([process], 60)
    assert code == 1, err
    assert "a process that reads clips has ended" in err
    assert "Traceback" not in err
