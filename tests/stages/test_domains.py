"""add-domain and model rm: what was there stays bit-identical."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdltool.artifact import open_artifact
from mdltool.errors import MdlError
from mdltool.model_store import load_model
from mdltool.recipe import load
from mdltool.stages.continuing import alone, joined, settled
from tests.conftest import TINY, Ran, World


@pytest.fixture(scope="module")
def model(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the domain chalk alone."""
    words = ["train", "--recipe", "tiny_single", "--domain", "chalk"]
    words += [w for key in TINY for w in ("--set", key)]
    data = ("--data", f"chalk={world.shards('chalk', 'train')}")
    where = ("--work", world.work, "--out", tmp_path_factory.mktemp("single") / "model")
    adapters = ("--set", "adapters=[{type: 2plus1d}]", "--set", "backbone.weights=scratch")
    return mdltool(*words, *data, *adapters, *where).path


def add(model: Path, world: World, mdltool: Callable[..., Ran], out: Path, *more: object) -> Ran:
    data = ("--data", f"neon={world.shards('neon', 'train')}")
    return mdltool("add-domain", model, *data, "--work", world.work, "--out", out, *more)


@pytest.mark.parametrize("more", [(), ("--init-from", "chalk")])
def test_every_old_tensor_and_output_stays(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path, more: tuple[str, ...]
) -> None:
    ran = add(model, world, mdltool, tmp_path / "larger", *more)
    # The backbone was trained with chalk.
    assert ("neon: its adapters begin fresh" in ran.err) == (not more)
    larger = ran.path
    artifact = open_artifact(larger, "model")
    assert artifact.verify() == []
    old, new = load_model(open_artifact(model)), load_model(artifact)
    assert list(new.spec.domains) == ["chalk", "neon"]
    before, after = old.tensors(), new.tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert any(key.startswith("neon/stage1/") for key in after)
    x = torch.randint(0, 255, (2, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(old(x, "chalk"), new(x, "chalk"))
    scored = mdltool("eval", larger, "--views", "1x1", "--work", world.work, "--out", tmp_path / "e").path
    assert set(open_artifact(scored).load_json("metrics.json")["domains"]) >= {"chalk", "neon"}
    smaller = mdltool("model", "rm", "neon", larger, "--work", world.work, "--out", tmp_path / "smaller").path
    again = load_model(open_artifact(smaller))
    assert set(again.tensors()) == set(before)
    assert all(torch.equal(again.tensors()[key], tensor) for key, tensor in before.items())


def test_the_best_weights_stay_without_a_domain(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    val = ("--data", f"neon={world.shards('neon', 'val')}", "--set", "val.every=1")
    larger = add(model, world, mdltool, tmp_path / "larger", *val).path
    smaller = mdltool("model", "rm", "neon", larger, "--work", world.work, "--out", tmp_path / "smaller").path
    best, kept = (load_model(open_artifact(path), "best").tensors() for path in (larger, smaller))
    assert kept
    assert all(torch.equal(best[key], tensor) for key, tensor in kept.items())


def test_names_follow_the_model_behind_a_link(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "latest").symlink_to(model)
    data = ("--data", f"neon={world.shards('neon', 'train')}", "--work", tmp_path)
    assert mdltool("add-domain", tmp_path / "latest", *data).path.name == "model+neon"


def test_a_model_that_cannot_be_read_leaves_nothing_behind(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    with open(cut / "weights" / "last.safetensors", "r+b") as handle:
        handle.truncate(1000)
    ran = add(cut, world, mdltool, tmp_path / "x")
    assert (ran.code, "cannot be read" in ran.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_finished_model_settles_its_network_and_input(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    for key in ("data.frames=8", "backbone.name=x3d_m", "adapters=[]", "train.bn=shared", "views.grid=1x1"):
        ran = add(model, world, mdltool, tmp_path / "x", "--set", key)
        assert (ran.code, "the finished model settles this key" in ran.err) == (1, True), key
    assert not list(tmp_path.iterdir())


def test_a_domain_that_the_models_recipe_cannot_hold_is_refused(model: Path) -> None:
    source, stored = open_artifact(model), load("tiny_multitrain").model_dump(mode="json")
    fits = settled(alone(stored, "new", "single_label"), [], source)
    assert list(joined(stored, fits, "new", source)["domains"])[-1] == "new"
    normalize = "domains.new.normalize={mean: [0, 0, 0], std: [1, 1, 1]}"
    own = settled(alone(stored, "new", "single_label"), [normalize], source)
    with pytest.raises(MdlError, match=r"domains\.new\.normalize: the clips of mixed batches are all alike"):
        joined(stored, own, "new", source)


def test_a_new_domain_keeps_the_flips_that_it_was_trained_with(model: Path) -> None:
    source, stored = open_artifact(model), load("tiny_demo").model_dump(mode="json")
    assert stored["data"]["augment"]["flip"] == 0
    sets = ["data.augment.flip=0.5", "domains.new.swap_sides=true"]
    own = settled(alone(stored, "new", "single_label"), sets, source)
    whole = joined(stored, own, "new", source)
    assert (whole["domains"]["new"]["flip"], whole["domains"]["new"]["swap_sides"]) == (0.5, True)
    assert whole["data"]["augment"]["flip"] == 0


def test_a_batch_of_each_domain_grows_with_the_model(
    world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = [*world.train_words(), "--set", "data.batch={chalk: 4, neon: 2}", "--out", tmp_path / "two"]
    two = mdltool(*words).path
    shards = tmp_path / "shards"
    words = ["--format", "folder", "--domain", "dusk", "--split", "train", "--out", shards]
    mdltool("shard", world.videos / "chalk" / "train", *words)
    data = ("--data", f"dusk={shards}", "--set", "data.batch=3", "--work", world.work)
    three = mdltool("add-domain", two, *data, "--out", tmp_path / "three").path
    assert load(str(three / "recipe.yaml")).data.batch == {"chalk": 4, "neon": 2, "dusk": 3}


def test_bad_requests(model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    ran = mdltool("add-domain", model, "--data", f"chalk={world.shards('chalk', 'train')}", "--out", tmp_path / "x")
    assert (ran.code, "has a domain 'chalk' already" in ran.err) == (1, True)
    ran = add(model, world, mdltool, tmp_path / "x", "--init-from", "chalc")
    assert (ran.code, "did you mean 'chalk'" in ran.err) == (1, True)
    ran = mdltool("add-domain", model, "--out", tmp_path / "x")
    assert (ran.code, "shards of one new domain" in ran.err) == (1, True)
    ran = mdltool("model", "rm", "neon", model, "--out", tmp_path / "x")
    assert (ran.code, "no domain 'neon'" in ran.err) == (1, True)
    ran = mdltool("model", "rm", "chalk", model, "--out", tmp_path / "x")
    assert (ran.code, "only domain" in ran.err) == (1, True)
    assert not list(tmp_path.iterdir())
