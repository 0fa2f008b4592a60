"""compress --whiten and svd.fold_bn: what of a weight counts is what leaves it (spec residual_adapters 2.5)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdltool.artifact import open_artifact
from mdltool.compress.factoring import folded_norms, site_weights
from mdltool.compress.moments import Watched, moments_of, watch
from mdltool.data.index import ShardIndex
from mdltool.data.loader import ViewLoader
from mdltool.model import MultiDomainModel
from mdltool.model_store import load_model
from mdltool.recipe import validate
from mdltool.stages import compress
from mdltool.stages.plan import val_views
from tests.adapters.test_contract import clip
from tests.adapters.test_factored import fresh
from tests.conftest import Ran, World
from tests.stages.test_compress import stored

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.Conv2d(4, 3, 1, stride=2, bias=False), (3, 4, 7, 6)),
    (nn.Conv2d(4, 3, 3, padding=1), (3, 4, 7, 6)),
    (nn.Conv3d(2, 3, (3, 3, 1), stride=(1, 2, 1), padding=(2, 1, 0), dilation=(2, 1, 1)), (2, 2, 5, 6, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_moment_weighs_errors_by_the_outputs_that_they_cause(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    watched = Watched(layer)
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    assert all(torch.equal(watched(x), layer(x)) for x in inputs)
    error = copy.deepcopy(layer)
    error.bias = None
    nn.init.normal_(error.weight)  # type: ignore[arg-type]
    caused = sum(float(error(x).detach().square().sum()) for x in inputs)
    matrix = error.weight.detach().flatten(1)  # type: ignore[operator, union-attr]
    assert watched.moment is not None
    assert watched.positions * float((matrix @ watched.moment * matrix).sum()) == pytest.approx(caused, rel=1e-9)


@pytest.mark.parametrize(
    ("adapter", "backbone", "names"),
    [
        ("parallel", "resnet26_tiny", {"matrix.weight"}),
        ("2plus1d", "x3d_tiny", {"kernel.1.weight"}),
        ("st", "clip_vit_tiny", {"up.weight"}),
        ("lora", "clip_vit_tiny", set()),
    ],
)
def test_what_is_watched_is_shared_on_the_output_side(adapter: str, backbone: str, names: set[str]) -> None:
    model = fresh(adapter, backbone)
    x = clip(model).double()
    before = model(x, "b")
    weights = site_weights(model)
    watched = watch(model, weights)
    assert {name.partition("/")[2] for name in watched} == names
    assert torch.equal(model(x, "b"), before)
    assert moments_of(watched) == {}, "no clip of a"
    model(x, "a")
    found = moments_of(watched)
    assert set(found) == {weight.name for weight in weights if weight.parameter in names}
    sides = {weight.name: weight.axes.sizes(weight.shape)[2] for weight in weights}
    for name, moments in found.items():
        assert all(moment.shape == (sides[name], sides[name]) for moment in moments.values())


def output_errors(dense: MultiDomainModel, other: MultiDomainModel, frames: Tensor, domain: str) -> float:
    """Of the temporal kernels, on the inputs that the dense model gives them."""
    lost = 0.0
    hooks = []
    for site, wrapper in dense.sites.items():
        own: Any = wrapper.adapters[domain]
        theirs: Any = other.sites[site].adapters[domain]

        def measure(layer: Any, given: tuple[Tensor], theirs: Any = theirs) -> None:
            nonlocal lost
            weight = theirs.kernel[1].weight()
            lost += float(functional.conv3d(given[0], layer.weight - weight, padding=layer.padding).square().sum())

        hooks.append(own.kernel[1].register_forward_pre_hook(measure))
    with torch.inference_mode():
        dense(frames, domain)
    for hook in hooks:
        hook.remove()
    return lost


def test_the_outputs_on_the_training_clips_are_nearer(
    world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ("--work", world.work, "--workers", 0)
    once = ("--set", "train.steps.0.updates=1", "--set", "val.every=0")
    source = mdltool(*world.train_words(), *once, "--out", tmp_path / "dense").path
    plain = compress.run(open_artifact(source), compress.Amount(rank=3), tmp_path / "plain", work=world.work).path
    words = ("compress", source, "--rank", 3, "--whiten", "--batches", 100, *where)
    ran = mdltool(*words, "--out", tmp_path / "white")
    made = open_artifact(ran.path)
    sites = len(load_model(open_artifact(source)).sites)
    assert f"{sites} of {2 * sites} weights are whitened" in ran.err
    rows = made.load_json("compression.json")["weights"]
    assert {row["parameter"] for row in rows if row["whitened"]} == {"kernel.1.weight"}
    assert {entry.role for entry in made.inputs} >= {"calibration"}
    assert made.summary["parameters"] == open_artifact(plain).summary["parameters"]
    dense, one, other = (load_model(open_artifact(path)) for path in (source, plain, ran.path))
    recipe = validate(made.load_json("model.json")["recipe"], "test")
    lost = {"plain": 0.0, "white": 0.0}
    for domain in ("chalk", "neon"):
        index = ShardIndex.open(open_artifact(world.shards(domain, "train")))
        views = [c.views.frames for c in ViewLoader(index, val_views(recipe, domain), workers=0) if c.views]
        lost["plain"] += output_errors(dense, one, torch.cat(views), domain)
        lost["white"] += output_errors(dense, other, torch.cat(views), domain)
    assert lost["white"] < lost["plain"]
    for more, message in (
        (("--rank", 3, "--batches", 2), "does nothing without --whiten"),
        (("--extend", source, "--whiten"), "settles the ranks"),
    ):
        ran = mdltool("compress", source, *more, *where, "--out", tmp_path / "x")
        assert (ran.code, message in ran.err) == (1, True)


def with_scales(model: MultiDomainModel) -> dict[str, Tensor]:
    """Its tensors, with BatchNorms away from ones and zeros, some weights negative."""
    torch.manual_seed(3)
    tensors = {key: value.detach().clone() for key, value in model.tensors().items()}
    for key, value in tensors.items():
        if key.endswith("norm.weight"):
            value.uniform_(0.5, 2).mul_(torch.randint(0, 2, value.shape) * 2 - 1)
        elif key.endswith(("running_mean", "running_var")) and "/stage" in key:
            value.uniform_(0.5, 4)
    return tensors


def test_a_folded_norm_computes_the_same(tmp_path: Path) -> None:
    model = fresh("2plus1d", "x3d_tiny")
    x = clip(model).double()
    tensors = with_scales(model)
    model.load_tensors(tensors, "test")
    before, moving = model.eval()(x, "a"), copy.deepcopy(model)
    moving.apply_regime("frozen", "frozen")
    trained = moving.train()(x, "a")
    folded = folded_norms(model, tensors)
    changed = {key.split("/", 2)[2] for key in tensors if not torch.equal(tensors[key], folded[key])}
    norm = {f"norm.{name}" for name in ("weight", "running_mean", "running_var")}
    assert changed == {"kernel.1.weight", "kernel.1.bias", *norm}
    moving.load_tensors(folded, "test")
    torch.testing.assert_close(moving.train()(x, "a"), trained, rtol=1e-2, atol=1e-2)
    model.load_tensors(folded, "test")
    torch.testing.assert_close(model(x, "a"), before, rtol=1e-9, atol=1e-9)
    full = compress.Amount(rank=10_000)
    small = compress.run(stored(model, tmp_path / "m"), full, tmp_path / "s", work=tmp_path)
    torch.testing.assert_close(load_model(small).double()(x, "a"), before, rtol=1e-5, atol=1e-5)


def test_the_scale_of_a_kernel_before_its_norm_no_longer_counts() -> None:
    model = fresh("2plus1d", "x3d_tiny")
    tensors = with_scales(model)
    loud = dict(tensors)
    for key, value in tensors.items():
        if key.startswith("a/") and key.endswith(("kernel.1.weight", "kernel.1.bias", "norm.running_mean")):
            loud[key] = 10 * value
        elif key.startswith("a/") and key.endswith("norm.running_var"):
            loud[key] = 100 * value
    one, other = folded_norms(model, tensors), folded_norms(model, loud)
    for key, value in one.items():
        if "norm." not in key:
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=0)
