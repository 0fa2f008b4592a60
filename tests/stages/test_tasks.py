"""Single-label, multi-label and regression domains in one model: from annotation files to the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.model_store import load_model
from mdltool.recipe import find
from tests.conftest import TINY, Ran, World

BITS = ("one", "two", "four")
TARGETS = ("height", "depth")
TASKS = {"chalk": "single_label", "marks": "multi_label", "traits": "regression"}
SETS = [w for key in (*TINY, "backbone.weights=scratch", "heads.dropout=0") for w in ("--set", key)]


def labels_of(name: str, number: int) -> list[Any]:
    """A domain's cells for a clip of the generated class `number`: its binary digits, or two values."""
    if name == "marks":
        return [";".join(bit for i, bit in enumerate(BITS) if number >> i & 1)]
    return [number / 4 - 1, -0.25 * number]


@dataclass(frozen=True)
class Mixed:
    """World's chalk; its neon videos again as `marks` and `traits`, whose labels are in CSV files; the model."""

    work: Path
    videos: Path
    recipe: Path
    model: Path

    def source(self, name: str, split: str) -> Path:
        return self.videos / ("chalk" if name == "chalk" else "neon") / split

    def shards(self, name: str, split: str = "val") -> Path:
        return self.work / "shards" / f"{name}-{split}"


@pytest.fixture(scope="module")
def mixed(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    root = tmp_path_factory.mktemp("mixed")
    made = Mixed(root / "artifacts", world.videos, root / "mixed.yaml", root / "model")
    for name, form in (("chalk", "folder"), ("marks", "multilabel"), ("traits", "regression")):
        for split in ("train", "val"):
            source = made.source(name, split)
            words = ["--format", form, "--domain", name, "--split", split, "--work", made.work]
            if name != "chalk":
                words += ["--annotations", write_list(root / f"{name}-{split}.csv", name, source)]
            if name == "marks":
                (root / "bits.txt").write_text("\n".join(BITS))
                words += ["--classes", root / "bits.txt"]
            assert mdltool("shard", source, *words).code == 0
    recipe = yaml.safe_load(find("tiny_demo").read_text())
    recipe |= {"name": "mixed", "domains": {name: {"task": task} for name, task in TASKS.items()}}
    made.recipe.write_text(yaml.safe_dump(recipe))
    ran = mdltool("train", "--recipe", made.recipe, *SETS, "--work", made.work, "--out", made.model)
    assert ran.code == 0, ran.err
    return made


def write_list(path: Path, name: str, source: Path) -> Path:
    numbers = {folder.name: i for i, folder in enumerate(sorted(source.iterdir()))}
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", *(TARGETS if name == "traits" else ["labels"])])
        for video in sorted(source.glob("*/*.mp4")):
            writer.writerow([video.relative_to(source), *labels_of(name, numbers[video.parent.name])])
    return path


@pytest.fixture(scope="module")
def evaluated(mixed: Mixed, mdltool: Callable[..., Ran]) -> Path:
    return mdltool("eval", mixed.model, "--views", "2x1", "--work", mixed.work).path


def scores_of(evaluated: Path, domain: str, width: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(keys, scores [M, N], labels [M, N]) of scores.parquet."""
    rows = [r for r in pq.read_table(evaluated / "scores.parquet").to_pylist() if r["domain"] == domain]
    scores, labels = (
        np.array([[r[f"{part}_{i}"] for i in range(width)] for r in rows]) for part in ("score", "label")
    )
    return [r["key"] for r in rows], scores, labels


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Sum over thresholds of precision times the recall gained."""
    value = last = 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        recall = (positive & chosen).sum() / positive.sum()
        value += (recall - last) * (positive & chosen).sum() / chosen.sum()
        last = recall
    return value


def test_shards_say_their_task_and_labels(mixed: Mixed) -> None:
    classes = sorted(folder.name for folder in mixed.source("marks", "val").iterdir())
    for name, task in TASKS.items():
        artifact = open_artifact(mixed.shards(name))
        content, index = artifact.load_json("index.json"), ShardIndex.open(artifact)
        assert content["task"] == index.task == task
        for i, key in enumerate(index.keys):
            metadata, _ = index.clip(i)
            member = next(m for s in content["shards"] for m in s["members"] if m["key"] == key)
            assert metadata["label"] == member["label"]
            number = classes.index(key.split("/")[0]) if name != "chalk" else 0
            if name == "marks":
                assert index.labels[i].tolist() == [number >> bit & 1 for bit in range(3)]
                assert metadata["class"] == [bit for bit, there in zip(BITS, index.labels[i], strict=True) if there]
            if name == "traits":
                assert index.labels[i].tolist() == member["label"] == labels_of("traits", number)


def test_validation_logs_each_tasks_own_metrics(mixed: Mixed) -> None:
    lines = [json.loads(line) for line in (mixed.model / "metrics.jsonl").read_text().splitlines()]
    headlines = {"chalk": "val_top1", "marks": "val_map", "traits": "val_mse"}
    for domain, headline in headlines.items():
        own = [line for line in lines if line.get("domain") == domain and "val_loss" in line]
        assert {line["step"] for line in own} == {2, 4}
        for line in own:
            assert {key for key in headlines.values() if key in line} == {headline}
            assert line["val_loss"] > 0
    for line in lines:
        if "val_mse" in line:  # one centre view: the loss of regression is the metric
            assert line["val_loss"] == pytest.approx(line["val_mse"], rel=1e-5)
    assert "weights/best.safetensors" in open_artifact(mixed.model).files


def test_eval_computes_each_tasks_metrics(evaluated: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["mean"] == {}, "these tasks share no metric"
    assert {domain: entry["task"] for domain, entry in metrics["domains"].items()} == TASKS
    assert list(json.loads((evaluated / "confusion.json").read_text())) == ["chalk"]
    _, scores, labels = scores_of(evaluated, "marks", 3)
    assert set(np.unique(labels)) == {0, 1}
    assert ((scores > 0) & (scores < 1)).all()
    entry = metrics["domains"]["marks"]
    each = [average_precision(scores[:, i], labels[:, i] == 1) for i in range(3)]
    assert entry["metrics"]["map"] == pytest.approx(np.mean(each), abs=1e-5)
    assert [entry["per_class"][bit]["average_precision"] for bit in BITS] == pytest.approx(each, abs=1e-5)
    assert [entry["per_class"][bit]["clips"] for bit in BITS] == labels.sum(0).tolist()
    _, scores, labels = scores_of(evaluated, "traits", 2)
    entry = metrics["domains"]["traits"]
    each = ((scores - labels) ** 2).mean(0)
    assert entry["metrics"] == {"mse": pytest.approx(each.mean(), rel=1e-5)}
    assert [entry["per_class"][target]["mse"] for target in TARGETS] == pytest.approx(each, rel=1e-5)


def test_eval_shows_percent_of_fractions_only(mixed: Mixed, evaluated: Path, mdltool: Callable[..., Ran]) -> None:
    shown = mdltool("eval", mixed.model, "--views", "2x1", "--work", mixed.work).err
    metrics = json.loads((evaluated / "metrics.json").read_text())["domains"]
    assert all(part in shown for part in ("top1 %", "map %", f"{100 * metrics['marks']['metrics']['map']:.2f}"))
    assert "mse %" not in shown
    assert f"{metrics['traits']['metrics']['mse']:.4f}" in shown


def test_predict_gives_sigmoids_and_values(mixed: Mixed, evaluated: Path, mdltool: Callable[..., Ran]) -> None:
    for domain, names in (("marks", BITS), ("traits", TARGETS)):
        keys, scores, _ = scores_of(evaluated, domain, len(names))
        source = mixed.source(domain, "val")
        words = ("--domain", domain, "--views", "2x1", "--work", mixed.work)
        for key, expected in list(zip(keys, scores, strict=True))[:2]:
            (found,) = mdltool("predict", mixed.model, source / f"{key}.mp4", *words, "--json").out.splitlines()
            top = json.loads(found)["top"]
            assert {e["label"]: e["score"] for e in top} == pytest.approx(
                dict(zip(names, expected, strict=True)), abs=1e-5
            )
            if domain == "marks":
                assert [e["score"] for e in top] == sorted((e["score"] for e in top), reverse=True)
            else:
                assert [e["label"] for e in top] == list(TARGETS)
        one = mdltool("predict", mixed.model, source / f"{keys[0]}.mp4", *words, "--topk", 1).out.splitlines()
        assert len(one) == (1 if domain == "marks" else 2), "a regression has every target"


def test_both_tasks_are_learned(mixed: Mixed, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """The clips of training themselves: the labels that reach the loss are those of the clips."""
    recipe = yaml.safe_load(mixed.recipe.read_text())
    del recipe["domains"]["chalk"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    sets = ("train.steps.0.updates=50", "train.checkpoint_every=50", "data.batch=8", "val.every=0")
    words = [*SETS, *(w for s in sets for w in ("--set", s)), "--work", mixed.work]
    model = mdltool("train", "--recipe", tmp_path / "two.yaml", *words, "--out", tmp_path / "m").path
    data = [w for d in ("marks", "traits") for w in ("--data", f"{d}={mixed.shards(d, 'train')}")]
    evaluated = mdltool("eval", model, *data, "--views", "2x1", "--out", tmp_path / "e").path
    found = {d: e["metrics"] for d, e in json.loads((evaluated / "metrics.json").read_text())["domains"].items()}
    _, _, labels = scores_of(evaluated, "traits", 2)
    assert found["marks"]["map"] > 0.9
    assert found["traits"]["mse"] < 0.3 * labels.var(0).mean(), "the mean predictor's error"


def test_the_report_shows_each_tasks_figures(
    mixed: Mixed, evaluated: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    path = mdltool("report", evaluated, "--work", mixed.work, "--out", tmp_path / "r").path
    page = (path / "report.html").read_text()
    domains = json.loads((evaluated / "metrics.json").read_text())["domains"]
    for heading in ("top-1 %", "mAP %", "micro mAP %", "MSE", "average precision, % per class", "MSE per target"):
        assert heading in page
    for metric in ("top-1, %", "mAP, %", "MSE"):
        assert f"validation, one centre view: {metric}" in page
    assert f"{100 * domains['marks']['per_class']['two']['average_precision']:.2f}" in page
    assert f"{domains['traits']['per_class']['depth']['mse']:.4f}" in page
    assert page.count("<svg") == 1 + 3 + 4, "loss, three validations, bars of three domains and one confusion"


def test_a_task_that_is_not_the_shards_is_refused(
    mixed: Mixed, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = ("train", "--recipe", mixed.recipe, *SETS, "--work", mixed.work, "--out", tmp_path / "m")
    ran = mdltool(*words, "--set", "domains.marks.task=single_label")
    assert ran.code == 1
    assert "marks: these shards are of the task multi_label, the recipe says single_label" in ran.err
    assert "--set domains.marks.task=multi_label" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses_shards_of_another_task(mixed: Mixed, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    source = mixed.source("traits", "val")
    (tmp_path / "list.csv").write_text(
        f"path,{','.join(TARGETS)}\n" + "".join(f"{v.relative_to(source)},0,1\n" for v in source.glob("*/*.mp4"))
    )
    words = (
        "--format",
        "multilabel",
        "--annotations",
        tmp_path / "list.csv",
        "--domain",
        "traits",
        "--split",
        "val",
    )
    shards = mdltool("shard", source, *words, "--out", tmp_path / "s").path
    ran = mdltool("eval", mixed.model, "--data", f"traits={shards}", "--out", tmp_path / "e")
    assert ran.code == 1
    assert "of the task multi_label, the model is of regression" in ran.err


def test_domains_of_other_tasks_come_and_go(mixed: Mixed, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """model rm takes the regression out, add-domain brings it back; what stays is bit-identical."""
    where = ("--work", mixed.work)
    less = mdltool("model", "rm", "traits", mixed.model, *where, "--out", tmp_path / "less").path
    data = [w for s in ("train", "val") for w in ("--data", f"traits={mixed.shards('traits', s)}")]
    more = mdltool("add-domain", less, *data, *where, "--out", tmp_path / "more").path
    tasks = {name: entry["task"] for name, entry in open_artifact(more).load_json("model.json")["domains"].items()}
    assert tasks == TASKS
    first, last = (load_model(open_artifact(path)).tensors() for path in (mixed.model, more))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first if not key.startswith("traits/"))
    scored = mdltool("eval", more, "--views", "1x1", *where, "--out", tmp_path / "e").path
    assert set(json.loads((scored / "metrics.json").read_text())["domains"]["traits"]["metrics"]) == {"mse"}


def test_overlap_reads_every_task(mixed: Mixed, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    for name, form in (("marks", "multilabel"), ("traits", "regression")):
        source = mixed.source(name, "val")
        words = ("--format", form, "--annotations", write_list(tmp_path / f"{name}.csv", name, source))
        again = mdltool(
            "shard", source, *words, "--domain", name, "--split", "train", "--out", tmp_path / name
        ).path
        (found,) = mdltool("overlap", again, mixed.shards(name), "--json").json["overlaps"]
        assert found["train_keys"] == found["test_keys"] == sorted(ShardIndex.open(open_artifact(again)).keys)
        assert mdltool("overlap", mixed.shards(name, "train"), mixed.shards(name), "--json").json["overlaps"] == []
