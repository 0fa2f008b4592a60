"""EPIC-Kitchens-100 from its published rows to the scores of a compressed model, in one shell pipe."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mdltool.artifact import Artifact, open_artifact
from mdltool.data.index import ShardIndex
from mdltool.model_store import read_tensors
from tests import epic_videos
from tests.conftest import Ran

pytest.importorskip("cv2", reason="the extra 'flow' (OpenCV) is not installed")
KINDS = ("audio", "flow")


class Piped:
    """Shards of the real rows, and what `train | compress | eval` made of them."""

    def __init__(self, root: Path, lists: Path, mdltool: Callable[..., Ran]) -> None:
        self.rows, self.work = epic_videos.write_kitchen(root, lists), root / "work"
        source = (root / "videos", "--format", "epic_kitchens", "--annotations", root / "lists")
        streams = [word for kind in KINDS for word in ("--modality", kind)]
        for split in ("train", "val"):
            where = ("--domain", "ek100", "--split", split, "--work", self.work)
            ran = mdltool("shard", *source, *streams, "--set", "flow.method=dis", *where)
            assert ran.code == 0, ran.err
        sets = " ".join(f"--set '{key}'" for key in epic_videos.SMALL)
        pipe = f"""set -o pipefail
            mdltool() {{ "{sys.executable}" -m mdltool "$@"; }}
            mdltool train --recipe cm3t_ek100 {sets} --workers 0 |
            mdltool compress --rank 0.5 |
            mdltool eval --views 10x3 --workers 0"""
        env = {**os.environ, "MDLTOOL_WORK": str(self.work), "OMP_NUM_THREADS": "1"}
        self.ran = subprocess.run(["bash", "-c", pipe], env=env, capture_output=True, text=True, timeout=300)
        assert self.ran.returncode == 0, self.ran.stderr
        self.scored = open_artifact(Path(self.ran.stdout.strip()), "eval")

    def shards(self, split: str) -> ShardIndex:
        return ShardIndex.open(open_artifact(self.work / "shards" / f"ek100-{split}"))

    def model(self, suffix: str = "") -> Artifact:
        return open_artifact(self.work / "model" / f"cm3t_ek100_swinb{suffix}", "model")


@pytest.fixture(scope="module")
def piped(test_data: Path, tmp_path_factory: pytest.TempPathFactory, mdltool: Callable[..., Ran]) -> Piped:
    lists = test_data / "annotations" / "epic_kitchens_100"
    return Piped(tmp_path_factory.mktemp("epic"), lists, mdltool)


def test_shards_are_the_real_rows_with_their_streams(piped: Piped) -> None:
    for split, rows in piped.rows.items():
        index = piped.shards(split)
        labels = {row["narration_id"]: [int(row["verb_class"]), int(row["noun_class"])] for row in rows}
        assert {key: index.labels[i].tolist() for i, key in enumerate(index.keys)} == labels
        assert {name: info.clips for name, info in index.streams.items()} == dict.fromkeys(KINDS, len(rows))
        widths = {name: info.width for name, info in index.streams.items()}
        for i, key in enumerate(index.keys):
            row = next(row for row in rows if row["narration_id"] == key)
            tokens = index.clip_and_streams(i, widths)[2]
            length_s = epic_videos.seconds(row["stop_timestamp"]) - epic_videos.seconds(row["start_timestamp"])
            assert abs(len(tokens["audio"]) - max(1, length_s / 0.48 - 1)) <= 1, "a patch every 0.48 s of the row"
            assert len(tokens["flow"]) == 8


def test_one_path_comes_out_of_the_pipe_and_is_linked_to_all_before(piped: Piped) -> None:
    assert piped.ran.stdout == f"{piped.scored.path}\n"
    dense, small = piped.model(), piped.model("-r0.5")
    assert piped.scored.verify() == dense.verify() == small.verify() == []
    assert dense.digest in {entry.digest for entry in small.inputs}
    assert small.digest in {entry.digest for entry in piped.scored.inputs}


def test_both_steps_trained_what_they_name(piped: Piped) -> None:
    recipe: dict[str, Any] = piped.model().load_json("model.json")["recipe"]
    assert {name: part["extractor"] for name, part in recipe["streams"].items()} == {
        "flow": "flow_grid",
        "audio": "log_mel",
    }
    assert [step["adapters"] for step in recipe["train"]["steps"]] == [["mhva", "prefix"], ["caa"]]
    lines = [json.loads(line) for line in piped.model().file("metrics.jsonl").read_text().splitlines()]
    updates = 2 * math.ceil(len(piped.rows["train"]) / 8)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, updates + 1))
    stored = read_tensors(piped.model().file("weights/last.safetensors"))
    began_at_0 = [key for key in stored if key.endswith(("attn/gain", "mlp/up", "+caa/out.weight"))]
    assert {key.rpartition("/")[2] for key in began_at_0} == {"gain", "up", "out.weight"}
    assert all(stored[key].any() for key in began_at_0)


def test_verbs_nouns_and_actions_are_scored_over_all_rows(piped: Piped) -> None:
    metrics = piped.scored.load_json("metrics.json")
    rows = piped.rows["val"]
    entry = metrics["domains"]["ek100"]
    assert metrics["views"] == "10x3"
    assert entry["clips"] == {"listed": len(rows), "evaluated": len(rows), "missing": [], "reasons": {}}
    assert entry["streams"] == dict.fromkeys(("flow", "audio"), len(rows))
    kinds = [f"{what}_{k}" for what in ("verb", "noun", "action") for k in ("top1", "top5")]
    assert set(kinds) <= set(entry["metrics"])
    assert all(0 <= entry["metrics"][kind] <= 1 for kind in kinds)
    table = pq.read_table(piped.scored.file("scores.parquet")).to_pylist()
    labels = {row["narration_id"]: (int(row["verb_class"]), int(row["noun_class"])) for row in rows}
    assert {row["key"]: (row["verb"], row["noun"]) for row in table} == labels
    assert {"seen", "unseen", "tail_verb", "tail_noun"} <= set(entry["subsets"])
