"""add-modality: a finished model hears and reads, and all that it was stays bit-identical."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdltool.artifact import open_artifact
from mdltool.model import MultiDomainModel
from mdltool.model_store import load_model
from mdltool.train.log import MetricsLog
from mdltool.types import StreamTokens
from tests.conftest import Ran
from tests.processes import start

FEW = (
    "train.steps.0.updates=2",
    "data.batch=4",
    "val.every=0",
    "data.crop=32",
    "data.augment.short_side=[32,32]",
    "heads.dropout=0.0",
)
SMALL = ("train.steps.0.updates=3", "data.batch=4", "adapters.2.d=8", "adapters.2.heads=2")
D, OTHER = "sound", "quiet"
SHARED = f"adapters.caa.share=[{D},{OTHER}]"


@dataclasses.dataclass(frozen=True)
class Heard:
    """A work directory with training shards of the domain `sound`, which has text too, and of `quiet`, a model of
    their pictures, and validation shards of `sound`.
    """

    work: Path
    model: Path
    val: Path


@pytest.fixture(scope="module")
def heard(mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> Heard:
    work = tmp_path_factory.mktemp("heard")
    assert mdltool("synth", "--out", work / "videos", "--domains", D, "--clips-per-class", 1).code == 0
    made = {}
    both = ("audio", "text")
    for domain, videos, split, kinds in (
        (D, "train", "train", both),
        (D, "val", "val", both[:1]),
        (OTHER, "val", "train", both[:1]),
    ):
        name = f"{domain}-{split}"
        place = work / "shards" / name if split == "train" else work / name  # val only where a test names it
        where = ("--format", "folder", "--domain", domain, "--split", split, "--out", place)
        words = [word for kind in kinds for word in ("--modality", kind)]
        made[name] = mdltool("shard", work / "videos" / D / videos, *where, *words).path
    sets = [w for key in (*FEW, f"domains.{OTHER}={{}}") for w in ("--set", key)]
    data = ("--work", work, "--workers", 0)
    return Heard(work, mdltool("train", "--recipe", "tiny_sound", *sets, *data).path, made[f"{D}-val"])


def shards(heard: Heard, domain: str = D) -> tuple[str, str]:
    return "--data", f"{domain}={heard.work / 'shards' / f'{domain}-train'}"


def add(heard: Heard, mdltool: Callable[..., Ran], model: Path, out: Path, *words: object, domain: str = D) -> Ran:
    where = ("--work", heard.work, "--workers", 0, "--out", out)
    return mdltool("add-modality", model, *shards(heard, domain), *where, *words)


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
    x, _ = clips(new)
    assert torch.equal(old(x, OTHER), new(x, OTHER))
    assert not torch.equal(logits(new), logits(new, "audio")), "the updates have moved what began at 0"
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
    words = ("--without", "aduio", *data, "--out", tmp_path / "no")
    assert "did you mean 'audio'?" in mdltool("eval", with_audio, *words).err


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
    data = (*shards(heard), "--workers", 0, "--out", tmp_path / "plain")
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


def test_without_data_the_domains_that_cannot_gain_it_stay(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ("--work", heard.work, "--workers", 0, "--set", "train.steps.0.updates=1")
    ran = mdltool("add-modality", with_audio, "--modality", "text", *where, "--out", tmp_path / "m")
    assert f"{OTHER} stays as it is: the shards of '{OTHER}' have no text (they have audio)" in ran.err
    new = loaded(ran.path)
    assert {domain: list(streams) for domain, streams in new.spec.streams.items()} == {D: ["audio", "text"]}


def test_domains_that_share_gain_it_one_after_the_other(
    heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    sets = [w for key in (*SMALL, SHARED) for w in ("--set", key)]
    first = add(heard, mdltool, heard.model, tmp_path / "first", "--modality", "audio", *sets).path
    old = loaded(first)
    assert any(key.startswith("shared/") and "+caa/" in key for key in old.tensors())
    assert torch.equal(logits(old), logits(loaded(heard.model)))
    assert not torch.equal(logits(old, "audio"), logits(old))
    words = ("--modality", "audio", "--set", "train.steps.0.updates=2")
    ran = add(heard, mdltool, first, tmp_path / "none", *words, domain=OTHER)
    assert (ran.code, "which has audio already" in ran.err) == (1, True)
    new = loaded(add(heard, mdltool, first, tmp_path / "new", *words, "--train-head", domain=OTHER).path)
    before, after = old.tensors(), new.tensors()
    changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed == {f"{OTHER}/head/weight", f"{OTHER}/head/bias"}
    x, streams = clips(new, "audio")
    assert not torch.equal(new(x, OTHER, streams), new(x, OTHER))


def test_a_domain_takes_its_streams_out_and_in_again(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ("--work", heard.work)
    pack = mdltool("model", "split", D, with_audio, *where, "--out", tmp_path / "pack").path
    without = mdltool("model", "rm", D, with_audio, *where, "--out", tmp_path / "without").path
    merged = mdltool("model", "merge", pack, without, *where, "--out", tmp_path / "merged").path
    recipe = open_artifact(merged).load_json("model.json")["recipe"]
    assert {name: part["streams"] for name, part in recipe["domains"].items()} == {OTHER: [], D: ["audio"]}
    scores = []
    for model in (with_audio, merged):
        data = ("--data", f"{D}={heard.val}", "--workers", 0, "--out", tmp_path / f"eval-{model.name}")
        scores.append((mdltool("eval", model, *data, *where).path / "scores.parquet").read_bytes())
    assert scores[0] == scores[1]


def test_it_stops_and_goes_on(
    heard: Heard, with_audio: Path, mdltool: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = MetricsLog.update

    def stop(self: MetricsLog, number: int, *rest: Any) -> None:
        update(self, number, *rest)
        if number == 1:  # seen in the next update
            signal.raise_signal(signal.SIGUSR1)

    words = ("--modality", "audio", *(w for key in SMALL for w in ("--set", key)))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "update", stop)
        assert add(heard, mdltool, heard.model, tmp_path / "parts", *words).code == 75
    parts = loaded(add(heard, mdltool, heard.model, tmp_path / "parts", *words, "--resume").path).tensors()
    assert all(torch.equal(parts[key], tensor) for key, tensor in loaded(with_audio).tensors().items())


@pytest.mark.full
def test_two_processes_add_it_as_one(heard: Heard, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    sets = (*SMALL, "train.steps.0.optimizer={name: sgd, lr: 0.1}")
    words = ["--modality", "audio", *(w for key in sets for w in ("--set", key))]
    one = loaded(add(heard, mdltool, heard.model, tmp_path / "one", *words).path).tensors()
    where = (*shards(heard), "--work", heard.work, "--workers", 0, "--out", tmp_path / "two")
    processes = start(2, "mdltool", "add-modality", heard.model, *where, *words)
    ended = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for *_, code in ended] == [0, 0], ended
    two = loaded(tmp_path / "two").tensors()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-3, atol=1e-5, msg=key)
    before = loaded(heard.model).tensors()
    assert all(torch.equal(two[key], tensor) for key, tensor in before.items())
