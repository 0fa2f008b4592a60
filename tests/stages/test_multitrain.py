"""MultiTrain through the commands: mixed batches, what is kept for training alone, projections read back."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.recipe import find
from tests.conftest import Ran, World
from tests.processes import Process, start

CHANGES = (
    "train.steps.0.updates=6",
    "train.steps.0.schedule.warmup=2",
    "train.checkpoint_every=1",
    "train.log_clips=true",
    "train.sync_bn=true",
    "losses.norm=dataset",
    "losses.inf.expander_hidden=16",
    "heads.hidden=16",
    "data.frames=4",
    "data.crop=32",
    "data.augment.short_side=[32, 36]",
    "data.augment.mixup=0.8",
    "data.augment.smoothing=0.1",
    "data.batch=8",
    "val.every=3",
    "val.short_side=32",
    "views.short_side=36",
)


def train_words(world: World, out: Path, *changes: str) -> list[str]:
    recipe = yaml.safe_load(find("tiny_multitrain").read_text())
    del recipe["domains"]["field"]
    path = world.work / "two_mixed.yaml"
    path.write_text(yaml.safe_dump(recipe | {"name": "two_mixed"}))
    sets = [word for change in (*CHANGES, *changes) for word in ("--set", change)]
    return ["train", "--recipe", str(path), *sets, "--work", str(world.work), "--workers", "0", "--out", str(out)]


@pytest.fixture(scope="module")
def model(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mdltool(*train_words(world, tmp_path_factory.mktemp("mixed") / "model")).path


def test_weights_for_training_alone_are_apart(model: Path) -> None:
    last, training = (load_file(model / "weights" / f"{name}.safetensors") for name in ("last", "training"))
    parts = {key.split(".")[1] for key in training}
    assert parts == {"expander", "projections", "weights"}
    assert not any("expander" in key or ">" in key for key in last)
    moved = training["criterion.weights.log_variances.chalk"]
    assert float(moved) != 0, "the loss weights are learned"


def test_what_is_logged(model: Path) -> None:
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    by_domain = {
        domain: [x["step"] for x in lines if x.get("domain") == domain and "loss" in x]
        for domain in ("chalk", "neon")
    }
    assert all(len(steps) >= 4 for steps in by_domain.values()), "most batches of 8 hold both domains"
    terms = [line for line in lines if "domain" not in line]
    assert [line["step"] for line in terms] == [1, 2, 3, 4, 5, 6]
    assert all({"variance", "covariance"} <= set(line) for line in terms)
    keys = [key for line in (model / "clips-0.jsonl").read_text().splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == 6 * 8


def test_an_epoch_has_every_clip_once(model: Path, world: World) -> None:
    indices = [ShardIndex.open(open_artifact(world.shards(d, "train"))) for d in ("chalk", "neon")]
    expected = sorted(key for index in indices for key in index.keys)
    lines = [json.loads(line) for line in (model / "clips-0.jsonl").read_text().splitlines()]
    seen = [key for line in lines for key in line["keys"]]
    assert sorted(seen[: len(expected)]) == expected


def test_noise_in_the_projections_changes_no_score(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    """Spec property 3: nothing of a prediction reads what is for training alone."""
    found = mdltool("eval", model, "--views", "1x1", "--work", world.work, "--out", tmp_path / "a").path
    weights = model / "weights" / "training.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(b"noise")
        again = mdltool("eval", model, "--views", "1x1", "--work", world.work, "--out", tmp_path / "b").path
    finally:
        weights.write_bytes(kept)
    scores = [(path / "scores.parquet").read_bytes() for path in (found, again)]
    assert scores[0] == scores[1]


def test_inspect_prints_the_strongest_pairs(model: Path, mdltool: Callable[..., Ran]) -> None:
    found = mdltool("inspect", model, "--projections", "--topk", 3, "--json").json
    assert [(entry["source"], entry["target"]) for entry in found] == [("neon", "chalk"), ("chalk", "neon")]
    weights = load_file(model / "weights" / "training.safetensors")
    classes = open_artifact(model).load_json("model.json")["domains"]
    for entry in found:
        weight = weights[f"criterion.projections.maps.{entry['source']}>{entry['target']}.weight"]
        values = [pair["weight"] for pair in entry["pairs"]]
        assert values == sorted(weight.flatten().tolist(), reverse=True)[:3]
        for pair in entry["pairs"]:
            row = classes[entry["target"]]["classes"].index(pair["target_class"])
            column = classes[entry["source"]]["classes"].index(pair["source_class"])
            assert float(weight[row, column]) == pair["weight"]
    text = mdltool("inspect", model, "--projections")
    assert text.code == 0
    assert "neon to chalk" in text.out


def test_models_without_projections_say_so(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    path = mdltool(*world.train_words(), "--out", tmp_path / "model").path
    ran = mdltool("inspect", path, "--projections")
    assert ran.code == 1
    assert "no projections" in ran.err


def test_domains_come_and_go(model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    smaller = mdltool("model", "rm", "neon", model, "--work", world.work, "--out", tmp_path / "less").path
    data = [w for split in ("train", "val") for w in ("--data", f"neon={world.shards('neon', split)}")]
    words = (*data, "--set", "train.steps.0.updates=2", "--work", world.work, "--out", tmp_path / "more")
    larger = mdltool("add-domain", smaller, *words).path
    old, new = (load_file(path / "weights" / "last.safetensors") for path in (smaller, larger))
    assert all(torch.equal(value, new[key]) for key, value in old.items())
    assert {key for key in new if key not in old} == {key for key in new if key.startswith("neon/head/")}
    assert mdltool("eval", larger, "--views", "1x1", "--work", world.work, "--out", tmp_path / "e").code == 0


def ranks(world: int, words: list[str]) -> list[Process]:
    """mdltool once for each rank; each has this process's number of threads, which decides the last bits."""
    return start(world, "mdltool", *words, threads=torch.get_num_threads())


def after_step(partial: Path, step: int, processes: list[Process]) -> None:
    """Wait until a running training has logged an update."""
    metrics, deadline = partial / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.005)
    raise AssertionError([process.communicate()[1] for process in processes])


def kill(processes: list[Process]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def clips_by_step(folder: Path) -> dict[int, list[str]]:
    """Update -> its clips' keys over all processes, sorted."""
    found: dict[int, list[str]] = {}
    for path in folder.glob("clips-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in sorted(found.items())}


def test_a_killed_run_ends_as_one_that_was_not(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = [*train_words(world, tmp_path / "cut"), "--workers", "2"]
    processes = ranks(1, words)
    after_step(tmp_path / "cut.partial", 2, processes)
    kill(processes)
    path = mdltool(*words, "--resume").path
    assert open_artifact(path).digest == open_artifact(model).digest
    assert (path / "clips-0.jsonl").read_text() == (model / "clips-0.jsonl").read_text()


def test_other_numbers_of_processes_go_on_without_repeating_or_skipping(
    world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    changes = ("train.steps.0.updates=16", "val.every=0")
    steady = mdltool(*train_words(world, tmp_path / "steady", *changes)).path
    words = train_words(world, tmp_path / "moved", *changes)
    partial = tmp_path / "moved.partial"
    processes = ranks(2, words)
    after_step(partial, 3, processes)
    kill(processes)
    (alone,) = ranks(1, [*words, "--resume"])
    after_step(partial, 8, [alone])
    alone.send_signal(signal.SIGTERM)
    _, err = alone.communicate(timeout=60)
    assert alone.returncode == 75, err
    for process in ranks(2, [*words, "--resume"]):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert clips_by_step(tmp_path / "moved") == clips_by_step(steady)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapters=[{type: 2d}]", "mixed batches share every layer"),
        ("train.bn=per_domain", "tells domains apart"),
        ("data.batch={chalk: 4, neon: 4}", "one number of clips"),
        ("train.split=batches", "each domain's own loss"),
        ("data.proportions={replicas: {meadow: 2}}", "no such domain"),
        ("domains.chalk.task=regression", "for single_label, not regression"),
        ("domains.chalk.weight=2", "the weights are learned"),
    ],
)
def test_refused(change: str, message: str, world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    ran = mdltool(*train_words(world, tmp_path / "m", change))
    assert ran.code == 1
    assert message in ran.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.split=batches", "train.bn=shared"), "would mix"),
        (("train.split=batches", "train.bn=per_domain", "train.sync_bn=true"), "would mix"),
        (("train.split=batches", "train.bn=per_domain", "train.domain_order=shuffled"), "domain_order: sequential"),
        (("train.bn=recalibrate", "train.ema=0.9"), "no random order, no ema"),
        (("train.compile=true", "train.checkpoint_activations=true"), "torch cannot compile"),
    ],
)
def test_refused_in_turn(
    changes: tuple[str, ...], message: str, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    ran = mdltool(*world.train_words(), *sets, "--out", tmp_path / "m")
    assert ran.code == 1
    assert message in ran.err


def test_pretraining_wants_a_linear_head(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    data = ("--data", f"chalk={world.shards('chalk', 'train')}", "--work", world.work)
    ran = mdltool("backbone", "pretrain", *data, "--set", "heads.type=mlp", "--out", tmp_path / "b")
    assert ran.code == 1
    assert "keeps its head as the classifier" in ran.err
