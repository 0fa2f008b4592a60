"""From shards to predictions through the commands: bad input, resuming after SIGKILL, processes, real clips."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mdltool.artifact import open_artifact
from mdltool.model_store import load_model, read_tensors
from mdltool.recipe import find
from tests.conftest import TINY, Ran, World
from tests.processes import Process, start

MDLTOOL = [sys.executable, "-m", "mdltool"]


@pytest.fixture(scope="module")
def model(world: World, mdltool: Callable[..., Ran]) -> Path:
    return mdltool(*world.train_words()).path


def test_train_writes_a_whole_model(model: Path, world: World) -> None:
    artifact = open_artifact(model, "model")
    assert artifact.verify() == []
    assert {"model.json", "recipe.yaml", "metrics.jsonl", "weights/last.safetensors"} <= set(artifact.files)
    assert not list(model.rglob("checkpoints"))
    assert [entry.role for entry in artifact.inputs] == ["train", "train", "val", "val"]
    assert artifact.summary["updates"] == 4
    assert artifact.summary["best_step"] in (2, 4)
    assert artifact.summary["seconds_to_best"] > 0
    assert list(model.rglob("events.out.tfevents*")), "TensorBoard"


def test_the_same_request_is_reused_and_another_refused(
    model: Path, world: World, mdltool: Callable[..., Ran]
) -> None:
    digest = open_artifact(model).digest
    assert mdltool(*world.train_words()).path == model
    assert open_artifact(model).digest == digest
    ran = mdltool(*world.train_words(), "--set", "train.seed=9")
    assert ran.code == 1
    assert "different: train.seed" in ran.err


def test_the_same_inputs_give_the_same_digest(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    again = mdltool(*world.train_words(), "--out", tmp_path / "again", "--workers", 2).path
    assert open_artifact(again).digest == open_artifact(model).digest


def test_eval_scores_every_clip_once(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    path = mdltool("eval", model, "--views", "2x3", "--work", world.work, "--out", tmp_path / "e").path
    artifact = open_artifact(path, "eval")
    assert artifact.verify() == []
    metrics = artifact.load_json("metrics.json")
    assert metrics["model_digest"] == open_artifact(model).digest
    assert metrics["views"] == "2x3"
    table = pq.read_table(artifact.file("scores.parquet")).to_pylist()
    for domain, entry in metrics["domains"].items():
        listed = json.loads((world.shards(domain, "val") / "index.json").read_text())
        keys = [member["key"] for shard in listed["shards"] for member in shard["members"]]
        rows = [row for row in table if row["domain"] == domain]
        assert sorted(row["key"] for row in rows) == sorted(keys)
        assert entry["clips"] == {"listed": len(keys), "evaluated": len(keys), "missing": [], "reasons": {}}
        correct = [max(range(8), key=lambda i: row[f"score_{i}"]) == row["label"] for row in rows]
        assert entry["metrics"]["top1"] == pytest.approx(sum(correct) / len(correct))
        assert all(sum(row[f"score_{i}"] for i in range(8)) == pytest.approx(1, abs=1e-5) for row in rows)
        assert {"split_digest", "decoder", "precision", "distinct_views"} <= set(entry)


def test_damaged_weights_leave_nothing_behind(
    model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(model, cut)
    with open(cut / "weights" / "last.safetensors", "r+b") as handle:
        handle.truncate(1000)
    ran = mdltool("eval", cut, "--work", world.work, "--out", tmp_path / "e")
    assert (ran.code, "cannot be read" in ran.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.full)])
def test_two_processes_give_the_scores_of_one(
    torchrun: bool, model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = ["eval", str(model), "--views", "2x3", "--work", str(world.work), "--workers", "0"]
    one = mdltool(*words, "--out", tmp_path / "one").path
    words = ["mdltool", *words, "--out", str(tmp_path / "two")]
    if torchrun:
        processes = [Process("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", *words)]
    else:
        processes = start(2, *words)
    said = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), said
    assert "".join(out for out, _ in said) == f"{tmp_path / 'two'}\n", "one path, from one process"
    tables = [pq.read_table(path / "scores.parquet").to_pylist() for path in (one, tmp_path / "two")]
    assert [(r["domain"], r["key"], r["label"]) for r in tables[0]] == [
        (r["domain"], r["key"], r["label"]) for r in tables[1]
    ]
    for a, b in zip(*tables, strict=True):
        assert [a[f"score_{i}"] for i in range(8)] == pytest.approx([b[f"score_{i}"] for i in range(8)], abs=1e-6)


def test_predict_agrees_with_eval(model: Path, world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    path = mdltool("eval", model, "--views", "2x3", "--work", world.work, "--out", tmp_path / "e").path
    rows = {r["key"]: r for r in pq.read_table(path / "scores.parquet").to_pylist() if r["domain"] == "chalk"}
    videos = sorted((world.videos / "chalk" / "val").glob("*/*.mp4"))[:3]
    ran = mdltool("predict", model, *videos, "--domain", "chalk", "--views", "2x3", "--topk", 8, "--json")
    assert ran.code == 0, ran.err
    classes = json.loads((model / "model.json").read_text())["domains"]["chalk"]["classes"]
    for line, video in zip(ran.out.splitlines(), videos, strict=True):
        found = json.loads(line)
        assert (found["video"], found["domain"]) == (str(video), "chalk")
        row = rows[f"{video.parent.name}/{video.stem}"]
        scores = {entry["label"]: entry["score"] for entry in found["top"]}
        assert [scores[name] for name in classes] == pytest.approx([row[f"score_{i}"] for i in range(8)], abs=1e-5)
    plain = mdltool("predict", model, videos[0], "--domain", "chalk", "--topk", 1).out
    assert plain.count("\t") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--domain", "chalc"), "did you mean 'chalk'"),
        ((), "several domains"),
    ],
)
def test_predict_refuses(
    words: tuple[str, ...], message: str, model: Path, world: World, mdltool: Callable[..., Ran], test_data: Path
) -> None:
    video = next((world.videos / "chalk" / "val").glob("*/*.mp4"))
    ran = mdltool("predict", model, video, *words)
    assert ran.code == 1
    assert message in ran.err
    ran = mdltool("predict", model, test_data / "awkward" / "corrupt" / "WrongFile.mp4", "--domain", "chalk")
    assert ran.code == 1
    assert "cannot be used" in ran.err
    ran = mdltool("predict", model, "--domain", "chalk")
    assert (ran.code, "no video was given" in ran.err) == (1, True)
    ran = mdltool("predict", world.work / "model" / "typo", video)
    assert "there is no such model, video or image" in ran.err


def test_eval_names_the_split_without_shards(model: Path, world: World, mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("eval", model, "--split", "trian", "--work", world.work)
    assert ran.code == 1
    assert "-trian" in ran.err


def test_a_frozen_model_stores_its_backbone_by_digest(
    world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    sets = [w for key in TINY for w in ("--set", key)]
    data = ("--data", f"chalk={world.shards('chalk', 'train')}")
    backbone = mdltool("backbone", "pretrain", *data, *sets, "--work", world.work, "--out", tmp_path / "b").path
    frozen = ["--set", "train.steps.0.regime=frozen", "--set", "train.bn=frozen"]
    path = mdltool(*world.train_words("pretrained"), *frozen, "--backbone", backbone, "--out", tmp_path / "m").path
    stored = read_tensors(path / "weights" / "last.safetensors")
    assert not [key for key in stored if key.startswith("backbone/")]
    loaded = load_model(open_artifact(path))
    original = read_tensors(backbone / "backbone.safetensors")
    own = loaded.tensors()
    checked = [key for key in original if f"backbone/{key}" in own]
    assert len(checked) > 50
    assert all(torch.equal(own[f"backbone/{key}"], original[key]) for key in checked)
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    ran = mdltool("eval", path, "--views", "1x1", "--work", world.work, "--out", tmp_path / "e")
    assert ran.code == 1
    assert "backbone is not here" in ran.err
    (world.work / "backbone").mkdir(exist_ok=True)
    (tmp_path / "elsewhere").rename(world.work / "backbone" / "moved")
    ran = mdltool("eval", path, "--views", "1x1", "--work", world.work, "--out", tmp_path / "e")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--data", "neon={chalk}"], ("these shards are of domain 'chalk'", "--data chalk=")),
        (["--data", "nein={chalk}"], ("no domain 'nein'", "did you mean 'neon'")),
        (["--data", "chalk"], ("no DOMAIN=PATH",)),
        (
            ["--set", "domains.chalk.classes=9"],
            ("has 8 classes, the recipe says 9", "--set domains.chalk.classes=8"),
        ),
        (["--set", "domains.meadow.classes=3"], ("'meadow' has no training shards",)),
        (["--set", "backbone.weights=kinetics400", "--work", "{empty}"], ("has no training shards",)),
        (["--backbone", "{chalk}"], ("of kind shards, not backbone",)),
        (["--set", "adapters=[{{type: mhva}}]"], ("no site for the adapter 'mhva'", "kind conv, stage")),
    ],
)
def test_train_refuses(
    change: list[str], parts: tuple[str, ...], world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    names = {"chalk": world.shards("chalk", "train"), "empty": tmp_path / "none"}
    words = [word.format(**names) for word in change]
    ran = mdltool(*world.train_words(), "--out", tmp_path / "m", *words)
    assert ran.code == 1, ran.err
    assert all(part in ran.err for part in parts), ran.err
    assert list(tmp_path.iterdir()) == []


def killed_run(words: list[str], out: Path, rng: random.Random, at: str | None = None) -> None:
    """Start the run and SIGKILL it: after a random number of logged lines, or while a file of name `at` exists."""
    process = Process("mdltool", *words)
    partial = out.with_name(out.name + ".partial")
    log = partial / "metrics.jsonl"
    already = len(log.read_text().splitlines()) if log.exists() else 0
    lines = already + rng.randint(1, 5)
    while process.poll() is None:
        if at is not None:
            if list(partial.glob(at)):
                break
        elif log.exists() and len(log.read_text().splitlines()) >= lines:
            time.sleep(rng.random() * 0.2)
            break
        time.sleep(0.001)
    process.kill()
    process.communicate()


def assert_kills_change_nothing(
    kills: int, updates: int, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    """updates: more than the kills can use up."""
    sets = ["--set", f"train.steps.0.updates={updates}", "--set", "train.log_clips=true", "--workers", "2"]
    steady = mdltool(*world.train_words(), *sets, "--out", tmp_path / "steady").path
    out, rng = tmp_path / "killed", random.Random(kills)
    words = [*world.train_words(), *sets, "--out", str(out)]
    for number in range(kills):
        resume = ["--resume"] if out.with_name("killed.partial").exists() else []
        killed_run([*words, *resume], out, rng, at="checkpoints/*.tmp" if number == 1 else None)
        assert not out.exists(), f"kill {number} came too late"
    last = Process("mdltool", *words, "--resume")
    _, err = last.communicate()
    assert last.returncode == 0, err
    a, b = (read_tensors(path / "weights" / "last.safetensors") for path in (steady, out))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert open_artifact(out).digest == open_artifact(steady).digest
    logged = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (steady, out)]
    assert [(x["step"], x["domain"], x.get("loss")) for x in logged[0]] == [
        (x["step"], x["domain"], x.get("loss")) for x in logged[1]
    ]
    clips = [(path / "clips-0.jsonl").read_text() for path in (steady, out)]
    assert clips[0] == clips[1], "no clip is seen twice or skipped"


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """The same number of threads in this process and in those that it starts."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_three_kills_change_nothing(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """One of them while a checkpoint is written."""
    assert_kills_change_nothing(3, 9, world, mdltool, tmp_path)


@pytest.mark.full
@pytest.mark.usefixtures("one_thread")
def test_twenty_kills_change_nothing(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    assert_kills_change_nothing(20, 120, world, mdltool, tmp_path)


def test_an_interrupted_run_is_named_by_the_next_stage_and_by_train(
    world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    killed_run([*world.train_words(), "--out", str(out)], out, random.Random(0))
    for words in (("eval", out), [*world.train_words(), "--out", str(out)]):
        ran = mdltool(*words)
        assert ran.code == 1
        assert "--resume" in ran.err
    assert f"rm -r {out}.partial" in ran.err
    assert mdltool(*world.train_words(), "--out", out, "--resume").path == out


def test_a_stopped_run_exits_with_75(world: World, tmp_path: Path) -> None:
    out = tmp_path / "m"
    words = [*MDLTOOL, *world.train_words(), "--set", "train.steps.0.updates=500", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "m.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "checkpoint is written" in stderr
    assert stdout == ""
    assert list((tmp_path / "m.partial" / "checkpoints").glob("update-*.safetensors"))


def test_real_clips_are_overfitted(test_data: Path, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """A handful of real clips, from their files through shard, train, eval and predict, to 100%.

    Encoded small, since each is decoded many times.
    """
    work, source = tmp_path / "artifacts", tmp_path / "clips"
    chosen = {}
    for name in ("PlayingPiano", "Surfing", "HorseRace"):
        (source / name).mkdir(parents=True)
        for clip in sorted((test_data / "clips" / "ucf101" / name).iterdir())[:2]:
            os.symlink(clip, source / name / clip.name)
            chosen[clip] = name
    for split in ("train", "val"):
        small = ("--encode", "h264", "--short-side", 72)
        words = ("--format", "folder", "--domain", "ucf101", "--split", split, "--work", work, *small)
        assert mdltool("shard", source, *words).code == 0
    sets = (
        *(change for change in TINY if change.startswith(("data.", "views."))),
        "train.steps.0.updates=100",
        "data.batch=6",
        "val.every=0",
        "heads.dropout=0.0",
        "backbone.weights=scratch",
    )
    recipe = ["--recipe", "tiny_single", "--domain", "ucf101", *(w for s in sets for w in ("--set", s))]
    path = mdltool("train", *recipe, "--work", work).path
    evaluated = mdltool("eval", path, "--views", "2x3", "--work", work).path
    entry = json.loads((evaluated / "metrics.json").read_text())["domains"]["ucf101"]
    assert entry["metrics"]["top1"] == 1.0
    ran = mdltool("predict", path, *chosen, "--topk", 1, "--work", work, "--json")
    assert [json.loads(line)["top"][0]["label"] for line in ran.out.splitlines()] == list(chosen.values())


@pytest.mark.full
def test_two_real_domains_are_learned_beyond_chance(
    test_data: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    """UT-Interaction's two sets: each beats chance (1 of 6) with p under 1% over all its clips.

    Every clip is scored by a model that saw no clip of its recorded sequence: three folds. One fold
    alone has 18 clips of a set, too few to tell what these little models learn from chance.
    """
    rows = [row for row in csv.DictReader((test_data / "MANIFEST.csv").open()) if row["kind"] == "clips"]
    sets = {name: [row for row in rows if row["domain"] == name] for name in ("ut_set1", "ut_set2")}
    right = dict.fromkeys(sets, 0)
    for fold in range(3):
        for name, found in _scores_of_fold(sets, fold, test_data, mdltool, tmp_path / str(fold)).items():
            right[name] += round(found["metrics"]["top1"] * found["clips"]["listed"])
    for name, own in sets.items():
        clips = len(own)
        chance = sum(comb(clips, k) * 5 ** (clips - k) for k in range(right[name], clips + 1)) / 6**clips
        print(f"{name}: {right[name]} of {clips} right, by chance with p = {chance:.2g}")
        assert chance < 0.01


def _scores_of_fold(
    sets: dict[str, list[dict[str, str]]], fold: int, data: Path, mdltool: Callable[..., Ran], folder: Path
) -> dict[str, Any]:
    """Train on all sequences but every third and score those; the eval's entry of each domain."""
    work = folder / "artifacts"
    for domain, rows in sets.items():
        held_out = sorted({row["group"] for row in rows})[fold::3]
        for row in rows:
            split = "val" if row["group"] in held_out else "train"
            place = folder / domain / split / row["label"]
            place.mkdir(parents=True, exist_ok=True)
            os.symlink(data / row["file"], place / Path(row["file"]).name)
        for split in ("train", "val"):
            words = ("--format", "folder", "--domain", domain, "--split", split, "--work", work)
            assert mdltool("shard", folder / domain / split, *words).code == 0
    recipe = yaml.safe_load(find("tiny_demo").read_text())
    recipe |= {"name": "ut", "domains": {domain: {"task": "single_label"} for domain in sets}}
    (work / "ut.yaml").write_text(yaml.safe_dump(recipe))
    changes = ("train.steps.0.updates=400", "backbone.weights=scratch", "val.every=0", "data.augment.flip=0.5")
    words = [w for change in changes for w in ("--set", change)]
    path = mdltool("train", "--recipe", work / "ut.yaml", *words, "--work", work).path
    evaluated = mdltool("eval", path, "--views", "10x3", "--work", work).path
    found: dict[str, Any] = json.loads((evaluated / "metrics.json").read_text())["domains"]
    return found
