"""A domain of verbs and nouns from the published lists to the report: real rows, generated videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mdltool.artifact import open_artifact
from mdltool.recipe import find
from tests import epic_videos
from tests.conftest import TINY, Ran

MORE = ("backbone.weights=scratch", "data.augment.smoothing=0.1", "train.steps.0.updates=2", "data.batch=4")
SETS = [w for key in (*TINY, *MORE) for w in ("--set", key)]


class Kitchen:
    """Shards of two splits, and a model that was trained and scored on them."""

    def __init__(self, root: Path, lists: Path, mdltool: Callable[..., Ran]) -> None:
        epic_videos.write_kitchen(root, lists)
        self.work, self.videos, annotations = root / "work", root / "videos", root / "lists"
        words = ("--format", "epic_kitchens", "--annotations", annotations, "--domain", "ek", "--work", self.work)
        for split in ("train", "val"):
            assert mdltool("shard", self.videos, *words, "--split", split).code == 0
        recipe = yaml.safe_load(find("tiny_demo").read_text())
        recipe |= {"name": "kitchen", "domains": {"ek": {"task": "verb_noun", "classes": 397}}}
        (root / "kitchen.yaml").write_text(yaml.safe_dump(recipe))
        self.recipe = root / "kitchen.yaml"
        self.model = mdltool("train", "--recipe", self.recipe, *SETS, "--work", self.work, "--out", root / "m").path
        ran = mdltool("eval", self.model, "--views", "1x1", "--work", self.work, "--out", root / "e")
        self.shown, self.evaluated = ran.err, ran.path


@pytest.fixture(scope="module")
def kitchen(test_data: Path, tmp_path_factory: pytest.TempPathFactory, mdltool: Callable[..., Ran]) -> Kitchen:
    lists = test_data / "annotations" / "epic_kitchens_100"
    return Kitchen(tmp_path_factory.mktemp("kitchen"), lists, mdltool)


def test_what_the_artifacts_say(kitchen: Kitchen) -> None:
    domain = open_artifact(kitchen.model).load_json("model.json")["domains"]["ek"]
    index = open_artifact(kitchen.work / "shards" / "ek-val").load_json("index.json")
    assert domain == {key: index[key] for key in ("task", "classes", "verbs", "actions")}
    assert (domain["task"], domain["verbs"], len(domain["classes"])) == ("verb_noun", 97, 397)
    lines = [json.loads(line) for line in (kitchen.model / "metrics.jsonl").read_text().splitlines()]
    assert any("val_action_top1" in line for line in lines)


def test_metrics_against_the_file_of_scores(kitchen: Kitchen) -> None:
    rows = pq.read_table(kitchen.evaluated / "scores.parquet").to_pylist()
    scores = np.array([[row[f"score_{i}"] for i in range(397)] for row in rows])
    verbs, nouns = (np.array([row[name] for row in rows]) for name in ("verb", "noun"))
    np.testing.assert_allclose([scores[:, :97].sum(1), scores[:, 97:].sum(1)], np.ones((2, len(rows))), atol=1e-5)
    entry = json.loads((kitchen.evaluated / "metrics.json").read_text())["domains"]["ek"]
    pairs = open_artifact(kitchen.model).load_json("model.json")["domains"]["ek"]["actions"]
    of_actions = np.array([[row[verb] * row[97 + noun] for verb, noun in pairs] for row in scores])
    true = np.array([pairs.index([verb, noun]) for verb, noun in zip(verbs, nouns, strict=True)])
    for name, own, labels in (
        ("verb", scores[:, :97], verbs),
        ("noun", scores[:, 97:], nouns),
        ("action", of_actions, true),
    ):
        order = np.argsort(-own, axis=1, kind="stable")
        for k in (1, 5):
            hits = (order[:, :k] == labels[:, None]).any(1)
            assert entry["metrics"][f"{name}_top{k}"] == pytest.approx(hits.mean())
            unseen = np.array([row["key"].startswith("P18") for row in rows])
            assert entry["subsets"]["unseen"][f"{name}_top{k}"] == pytest.approx(hits[unseen].mean())
    assert "unseen" in kitchen.shown
    confusion = json.loads((kitchen.evaluated / "confusion.json").read_text())["ek"]
    assert np.sum(confusion["matrix"]) == 2 * len(rows)
    assert len(set(confusion["classes"])) == 397


def test_predict_lists_actions_verbs_and_nouns(kitchen: Kitchen, mdltool: Callable[..., Ran]) -> None:
    video = kitchen.videos / "P03" / "videos" / "P03_26.MP4"
    words = ("predict", kitchen.model, video, "--views", "1x1", "--topk", 3, "--work", kitchen.work)
    found = json.loads(mdltool(*words, "--json").out)
    domain = open_artifact(kitchen.model).load_json("model.json")["domains"]["ek"]
    names = {f"{domain['classes'][verb]} {domain['classes'][97 + noun]}" for verb, noun in domain["actions"]}
    assert {key: len(found[key]) for key in ("top", "verbs", "nouns")} == {"top": 3, "verbs": 3, "nouns": 3}
    assert {entry["label"] for entry in found["top"]} <= names
    assert {entry["label"] for entry in found["verbs"]} <= set(domain["classes"][:97])
    assert found["top"][0]["score"] <= found["verbs"][0]["score"] * found["nouns"][0]["score"] + 1e-9
    assert mdltool(*words).out.splitlines()[0].split("\t")[1] == found["top"][0]["label"]


def test_the_report_has_actions_and_subsets(kitchen: Kitchen, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    path = mdltool("report", kitchen.evaluated, "--work", kitchen.work, "--out", tmp_path / "r").path
    page = (path / "report.html").read_text()
    for text in ("action top-1 %", "ek, unseen", "ek, tail_verb", "accuracy, % per verb or noun"):
        assert text in page


def test_train_refuses_splits_with_other_actions(
    kitchen: Kitchen, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    """Shards whose lists were not side by side."""
    lists = kitchen.recipe.parent / "lists"
    shutil.copytree(lists, tmp_path / "lists")
    (tmp_path / "lists" / "EPIC_100_train.csv").unlink()
    words = ("--format", "epic_kitchens", "--annotations", tmp_path / "lists", "--domain", "ek", "--split", "val")
    shards = mdltool("shard", kitchen.videos, *words, "--out", tmp_path / "s").path
    data = ("--data", f"ek={kitchen.work / 'shards' / 'ek-train'}", "--data", f"ek={shards}")
    ran = mdltool("train", "--recipe", kitchen.recipe, *SETS, *data, "--out", tmp_path / "m")
    assert (ran.code, "ek: train and val have different actions" in ran.err) == (1, True)
    ran = mdltool("eval", kitchen.model, "--data", f"ek={shards}", "--out", tmp_path / "e")
    assert (ran.code, "other actions than the model" in ran.err) == (1, True)
