"""Videos with sound and subtitles through shard, train, eval and predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.schema import Recipe
from mdltool.stages import evaluate
from mdltool.stages.compression import Finetune, training_of
from mdltool.stages.sources import check_sources
from mdltool.stages.whitening import Whiten, check_whiten
from tests.conftest import Ran
from tests.data.tiny_shards import write_shards
from tests.data.tiny_sound import make_video, tone

RECIPE = """
name: heard
about: two streams of a few videos
backbone: {name: swin3d_tiny, weights: scratch}
domains: {d: {task: single_label}}
streams:
  audio: {kind: audio, width: 12, input: 64, embedder: linear}
  text: {kind: text, width: 12, input: 32, embedder: linear}
adapters:
  - {type: mhva, heads: 2, r: 6}
  - {type: caa, d: 8, heads: 2}
train:
  steps:
    - {regime: frozen, updates: 3, optimizer: {name: adamw, lr: 0.05}}
  checkpoint_every: 10
data: {frames: 4, crop: 32, sampling: {clip_seconds: 0.5}, augment: {short_side: [32, 36]}, batch: 4}
val: {every: 3, short_side: 32}
views: {grid: 1x1, short_side: 36}
"""
MODALITIES = ("--modality", "audio", "--modality", "text")
SETS = ("audio.bands=16", "audio.fft=512", "audio.bins=4", "text.buckets=32")


@dataclass(frozen=True)
class Heard:
    videos: Path
    recipe: Path
    work: Path
    mdltool: Callable[..., Ran]

    def shard(self, split: str, sets: tuple[str, ...] = SETS, modalities: tuple[str, ...] = MODALITIES) -> Ran:
        words = [word for setting in sets for word in ("--set", setting)]
        where = ("--domain", "d", "--split", split, "--work", self.work)
        return self.mdltool("shard", self.videos, "--format", "folder", *where, *modalities, *words)

    def train(self, *words: object) -> Ran:
        return self.mdltool("train", "--recipe", self.recipe, "--work", self.work, *words)


def heard_in(folder: Path, mdltool: Callable[..., Ran]) -> Heard:
    """Two classes of three videos each; the last of each has no sound and no subtitles."""
    for number in range(6):
        path = folder / "videos" / ("low", "high")[number % 2] / f"{number}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = tone(1.2, hertz=(200.0, 2000.0)[number % 2])
        path.write_bytes(make_video(sound if number < 4 else None, 1.2))
        if number < 4:
            word = ("boom", "ping")[number % 2]
            path.with_suffix(".srt").write_text(f"1\n00:00:00,100 --> 00:00:01,000\n{word}\n")
    recipe = folder / "heard.yaml"
    recipe.write_text(RECIPE)
    return Heard(folder / "videos", recipe, folder / "artifacts", mdltool)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory, mdltool: Callable[..., Ran]) -> Heard:
    made = heard_in(tmp_path_factory.mktemp("heard"), mdltool)
    for split in ("train", "val"):
        assert made.shard(split).code == 0
    return made


def test_train_eval_and_predict_read_the_same_streams(heard: Heard, tmp_path: Path) -> None:
    model = heard.train("--out", tmp_path / "model").path
    part = yaml.safe_load((model / "recipe.yaml").read_text())["streams"]["audio"]
    assert (part["extractor"], part["extractor_version"], part["extractor_options"]["bands"]) == (
        "log_mel",
        "1",
        16,
    )
    shards = heard.work / "shards" / "d-val"
    scored = heard.mdltool("eval", model, "--data", f"d={shards}", "--out", tmp_path / "eval", "--work", heard.work)
    rows = pq.read_table(scored.path / "scores.parquet").to_pylist()
    scores = {row["key"]: [row["score_0"], row["score_1"]] for row in rows}
    refuses_other_tokens(model, tmp_path)
    videos = {"low/0": heard.videos / "low/0.mkv", "low/4": heard.videos / "low/4.mkv"}
    ran = heard.mdltool("predict", model, *videos.values(), "--json", "--work", heard.work)
    found = [json.loads(line) for line in ran.out.splitlines()]
    for key, entry in zip(videos, found, strict=True):
        own = {top["label"]: top["score"] for top in entry["top"]}
        assert [own["high"], own["low"]] == pytest.approx(scores[key], abs=1e-5)
    assert found[0]["streams"] == {
        "audio": {"tokens": 2, "missing": None},
        "text": {"tokens": 1, "missing": None},
    }
    assert found[1]["streams"]["audio"] == {"tokens": 0, "missing": "the video has no audio track"}
    assert "low/4.mkv: without text (there is no transcript of this video)" in ran.err
    other = tmp_path / "subs"
    other.mkdir()
    (other / "4.vtt").write_text("WEBVTT\n\n00:00.100 --> 00:01.000\nboom\n")
    words = ("predict", model, videos["low/4"], "--json", "--side", f"text={other}", "--work", heard.work)
    again = json.loads(heard.mdltool(*words).out)
    assert again["streams"]["text"]["tokens"] == 1
    assert again["top"] != found[1]["top"], "what is said counts"
    assert "no stream 'flow'" in heard.mdltool("predict", model, videos["low/4"], "--side", f"flow={other}").err


def refuses_other_tokens(path: Path, folder: Path) -> None:
    """Of the same width, but made by something else than those in training."""
    audio: list[np.ndarray | None] = [np.zeros((2, 64), np.float32)] * 2
    streams, classes = {"audio": audio}, ("high", "low")
    other = write_shards(folder / "other", [b"video"] * 2, domain="d", classes=classes, streams=dict(streams))
    what = "the stream 'audio' of the shards d/train has extractor made_up, where log_mel is wanted"
    model = open_artifact(path)
    content = model.load_json("model.json")
    with pytest.raises(MdlError, match=what):
        evaluate.run(model, [other], folder / "no")
    with pytest.raises(MdlError, match=what):
        training_of(content["recipe"], content["domains"], Finetune(1, [other]), model)
    with pytest.raises(MdlError, match=what):
        check_whiten(Whiten([other]), content, model)
    check_sources(Recipe.model_validate(content["recipe"]), ShardIndex.open(other), ["audio"])
    silent = write_shards(folder / "silent", [b"video"] * 2, domain="d", classes=classes)
    with pytest.raises(MdlError, match="the shards d/train have no stream 'audio'"):
        training_of(content["recipe"], content["domains"], Finetune(1, [silent]), model)


def test_shards_without_what_training_asks_for(heard: Heard, tmp_path: Path) -> None:
    flow = ("--set", "streams.flow.kind=flow", "--set", "streams.flow.width=12")
    ran = heard.train(*flow, "--out", tmp_path / "model")
    assert ran.code == 1
    assert "d/train have no stream 'flow' (they have: audio (audio, 64 wide), text (text, 32 wide))" in ran.err
    assert "--modality flow" in ran.err
    ran = heard.train("--set", "streams.audio.input=128", "--out", tmp_path / "model")
    assert "the stream 'audio' is 64 wide in the shards d/train, 128 in the recipe" in ran.err
    ran = heard.train("--set", "streams.audio.extractor_options.hop_ms=10.0", "--out", tmp_path / "model")
    assert "has hop_ms 5.0, where 10.0 is wanted" in ran.err
    assert not (tmp_path / "model").exists()


def test_splits_made_with_different_options(tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
    made = heard_in(tmp_path, mdltool)
    text = ("--modality", "text")
    assert made.shard("train", ("text.buckets=32",), text).code == 0
    recipe = yaml.safe_load(made.recipe.read_text())
    del recipe["streams"]["audio"]
    made.recipe.write_text(yaml.safe_dump(recipe))
    for sets, what in (
        (("text.buckets=32", "text.unit=word"), "d/val has unit word, where utterance is wanted"),
        (("text.buckets=16",), "d/val has buckets 16, where 32 is wanted"),
    ):
        assert made.shard("val", sets, text).code == 0
        ran = made.train()
        assert ran.code == 1
        assert what in ran.err
        shutil.rmtree(made.work / "shards" / "d-val")
