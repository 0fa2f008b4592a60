"""add-modality: a finished model hears and reads, and all that it was stays bit-identical."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdltool.artifact import open_artifact
from mdltool.model import MultiDomainModel
from mdltool.model_store import load_model
from mdltool.types import StreamTokens
from tests.conftest import Ran

FEW = ("train.steps.0.updates=2", "data.batch=4", "val.every=0", "data.crop=32", "data.augment.short_side=[32,32]")
SMALL = ("train.steps.0.updates=2", "data.batch=4", "adapters.2.d=8", "adapters.2.heads=2")
D = "sound"


@dataclasses.dataclass(frozen=True)
class Heard:
    """A work directory with training shards of the domain `sound`, a model of its pictures, and other shards."""

    work: Path
    model: Path
    val: Path


@pytest.fixture(scope="module")
def heard(mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Heard:
    work = tmp_path_factory.mktemp("heard")
    assert mdltool("synth", "--out", work / "videos", "--domains", D, "--clips-per-class", 1).code == 0
    made = {}
    for split, kinds in (("train", ("audio", "text")), ("val", ("audio",))):
        where = ("--format", "folder", "--domain", D, "--split", split, "--out", work / split)
        words = [word for kind in kinds for word in ("--modality", kind)]
        made[split] = mdltool("shard", work / "videos" / D / split, *where, *words).path
    sets = [w for key in FEW for w in ("--set", key)]
    data = ("--data", f"{D}={made['train']}", "--work", work, "--workers", 0)
    return Heard(work, mdltool("train", "--recipe", "tiny_sound", *sets, *data).path, made["val"])


def add(heard: Heard, mdltool: Callable[..., Ran], model: Path, out: Path, *words: object) -> Ran:
    data = ("--data", f"{D}={heard.work / 'train'}", "--work", heard.work, "--workers", 0)
    return mdltool("add-modality", model, *data, "--out", out, *words)


@pytest.fixture(scope="module")
def with_audio(heard: Heard, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = [w for key in SMALL for w in ("--set", key)]
    out = tmp_path_factory.mktemp("audio") / "model"
    return add(heard, mdltool, heard.model, out, "--modality", "audio", *sets).path


@pytest.fixture(scope="module")
def with_text(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("text") / "model"
    return add(heard, mdltool, with_audio, out, "--modality", "text", *("--set", "train.steps.0.updates=2")).path


def loaded(path: Path) -> MultiDomainModel:
    return load_model(open_artifact(path))


def clips(model: MultiDomainModel, *names: str) -> tuple[Tensor, dict[str, StreamTokens]]:
    """Two clips with the named streams of a model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 255, (2, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
    streams = {}
    for name in names:
        tokens = torch.randn(2, 3, model.spec.streams[D][name].input, generator=generator)
        streams[name] = StreamTokens(tokens, torch.tensor([[True, True, True], [True, False, False]]))
    return x, streams


def logits(model: MultiDomainModel, *names: str) -> Tensor:
    x, streams = clips(model, *names)
    with torch.no_grad():
        found = model(x, D, streams)
    assert isinstance(found, Tensor)
    return found


def test_the_first_modality_leaves_every_tensor_and_every_silent_clip_as_it_was(
    heard: Heard, with_audio: Path
) -> None:
    artifact = open_artifact(with_audio, "model")
    assert artifact.verify() == []
    old, new = loaded(heard.model), loaded(with_audio)
    before, after = old.tensors(), new.tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert torch.equal(logits(old), logits(new))
    assert not torch.equal(logits(new), logits(new, "audio")), "two updates have moved what began at 0"
    added = {key for key in after if key not in before}
    assert any("+caa/" in key for key in added)
    assert any(key.startswith(f"{D}/streams/audio.") for key in added)
    assert artifact.summary["added"] == {D: ["audio"]}


def test_a_second_modality_leaves_the_first_as_it_was(heard: Heard, with_audio: Path, with_text: Path) -> None:
    old, new = loaded(with_audio), loaded(with_text)
    before, after = old.tensors(), new.tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert torch.equal(logits(old), logits(new))
    assert torch.equal(logits(old, "audio"), logits(new, "audio"))
    assert not torch.equal(logits(new, "audio"), logits(new, "audio", "text"))
    assert [spec.late for spec in new.spec.streams[D].values()] == [False, True]
    recipe = open_artifact(with_text).load_json("model.json")["recipe"]
    assert list(recipe["streams"]) == ["audio", "text"]
    assert recipe["domains"][D]["streams"] == ["audio", "text"]


def test_an_extended_model_is_scored_with_and_without(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    found = {}
    for name, words in (("with", ()), ("without", ("--without", "audio"))):
        data = ("--data", f"{D}={heard.val}", "--workers", 0)
        scored = mdltool("eval", with_audio, *words, *data, "--out", tmp_path / name).path
        found[name] = json.loads((scored / "metrics.json").read_text())
    bare = mdltool("eval", heard.model, *data, "--out", tmp_path / "bare").path
    scores = [(tmp_path / name / "scores.parquet").read_bytes() for name in ("with", "without", "bare")]
    assert scores[1] == scores[2] != scores[0]
    assert found["with"]["domains"][D]["streams"] == {"audio": 12}
    assert found["without"]["domains"][D]["streams"] == {}
    assert bare.is_dir()


def test_both_at_once_are_founding_streams(heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    sets = [w for key in SMALL for w in ("--set", key)]
    words = ("--modality", "text", "--modality", "audio", *sets)
    both = loaded(add(heard, mdltool, heard.model, tmp_path / "both", *words).path)
    assert [(name, spec.late) for name, spec in both.spec.streams[D].items()] == [("text", False), ("audio", False)]
    assert torch.equal(logits(loaded(heard.model)), logits(both))


def test_end_to_end_trains_the_domain_and_nothing_else(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = ("--modality", "text", "--end-to-end", "--set", "train.steps.0.updates=2")
    whole = loaded(add(heard, mdltool, with_audio, tmp_path / "whole", *words).path)
    before, after = loaded(with_audio).tensors(), whole.tensors()
    changed = {key.split("/", 1)[0] for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed == {D}
    assert not any(spec.late for spec in whole.spec.streams[D].values())


def test_a_head_trains_where_it_is_told_to(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = ("--modality", "text", "--train-head", "--set", "train.steps.0.updates=2")
    new = loaded(add(heard, mdltool, with_audio, tmp_path / "new", *words).path).tensors()
    before = loaded(with_audio).tensors()
    changed = {key for key, tensor in before.items() if not torch.equal(new[key], tensor)}
    assert changed == {f"{D}/head/weight", f"{D}/head/bias"}


def test_streams_begin_as_those_of_another_model(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = ["--modality", "audio", "--init-from", f"{with_audio}:{D}"]
    still = [w for key in (*SMALL[1:], "train.steps.0.updates=1") for w in ("--set", key)]
    still += ["--set", "train.steps.0.optimizer={name: sgd, lr: 1.0e-30}"]
    begun = loaded(add(heard, mdltool, heard.model, tmp_path / "begun", *words, *still).path)
    assert torch.equal(logits(begun, "audio"), logits(loaded(with_audio), "audio"))


def test_validation_shards_without_it_are_refused_before_the_training(
    heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = add(heard, mdltool, heard.model, tmp_path / "none", "--modality", "text", "--data", f"{D}={heard.val}")
    assert ran.code == 1
    assert "the shards sound/val have no stream 'text'" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modality", "audio"), "the model has audio for the domain 'sound' already"),
        (("--modality", "flow"), "the shards of 'sound' have no flow (they have audio, text)"),
        (("--modality", "smell"), "have no smell"),
        ((), "nothing is said to be added"),
        (("--modality", "text", "--init-from", "x"), "is no MODEL:DOMAIN"),
        (("--modality", "text", "--set", "backbone.name=clip_vit_tiny"), "the finished model settles this key"),
    ],
)
def test_what_cannot_be_added_is_one_message(
    words: tuple[str, ...],
    message: str,
    heard: Heard,
    with_audio: Path,
    mdltool: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    ran = add(heard, mdltool, with_audio, tmp_path / "none", *words)
    assert ran.code == 1
    assert message in ran.err
    assert not list(tmp_path.iterdir())


def test_a_model_without_vision_adapters_is_refused(
    heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    sets = [w for key in (*FEW, "adapters=[]") for w in ("--set", key)]
    data = ("--data", f"{D}={heard.work / 'train'}", "--workers", 0, "--out", tmp_path / "plain")
    plain = mdltool("train", "--recipe", "tiny_sound", *sets, *data).path
    ran = add(heard, mdltool, plain, tmp_path / "none", "--modality", "audio")
    assert ran.code == 1
    assert "mhva" in ran.err
    assert not (tmp_path / "none").exists()


def test_a_compressed_model_gains_a_modality(heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    small = mdltool("compress", heard.model, "--rank", 4, "--work", heard.work, "--out", tmp_path / "small").path
    sets = [w for key in SMALL for w in ("--set", key)]
    new = add(heard, mdltool, small, tmp_path / "new", "--modality", "audio", *sets).path
    assert torch.equal(logits(loaded(small)), logits(loaded(new)))
    content: dict[str, Any] = open_artifact(new).load_json("model.json")
    assert content["spec"]["factors"] == open_artifact(small).load_json("model.json")["spec"]["factors"]
