"""Shards for a recipe: what its streams are called on the command line, and that training then takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.data.modalities.asked import asked
from mdltool.data.modalities.plan import Streams
from mdltool.errors import MdlError
from mdltool.model_store import load_model
from mdltool.recipe import load, validate
from mdltool.schema import Recipe
from mdltool.stages.sources import asked_for
from mdltool.types import Clip
from tests.conftest import Ran
from tests.data.tiny_people import make_mpiigi, make_udiva

MICROPHONES = [f"audio_mic{number}" for number in range(4)]
PEOPLE = ["audio_self", "audio_other", "text_self", "text_other"]
SMALL = (
    "backbone.name=swin3d_tiny",
    "backbone.weights=scratch",
    "adapters.0.heads=2",
    "adapters.0.r=4",
    "adapters.1.length=2",
    "data.frames=4",
    "data.crop=32",
    "data.augment.short_side=[32,32]",
    "data.batch=2",
    "val.every=0",
    "train.precision=fp32",
)
STEP = ("epochs=1", "schedule.warmup=0")
CAA = ("adapters.caa.d=8", "adapters.caa.heads=2")


def words(sets: Sequence[str], steps: int) -> list[str]:
    own = [f"train.steps.{i}.{key}" for i in range(steps) for key in STEP]
    return [word for key in (*sets, *own) for word in ("--set", key)]


def test_the_microphones_of_mpiigi_are_what_its_recipe_trains_on(
    tmp_path: Path, mdltool: Callable[..., Ran]
) -> None:
    source = make_mpiigi(tmp_path / "videos")
    where = ("--domain", "mpiigi", "--split", "train", "--work", tmp_path, "--workers", 1)
    ask = ("--recipe", "cm3t_mpiigi", "--modality", "audio")
    dry = mdltool("shard", source, "--format", "mpiigi", *where, *ask, "--dry-run")
    assert f"streams of cm3t_mpiigi_swinb: {', '.join(MICROPHONES)}" in " ".join(dry.err.split())
    made = mdltool("shard", source, "--format", "mpiigi", *where, *ask)
    index = ShardIndex.open(open_artifact(made.path))
    assert list(index.streams) == MICROPHONES
    assert {(s.extractor, s.width, s.clips) for s in index.streams.values()} == {("log_mel", 1024, 2)}
    tokens = index.clip_and_streams(0, dict.fromkeys(MICROPHONES, 1024))[2]
    assert not np.array_equal(tokens["audio_mic0"], tokens["audio_mic3"]), "each has the file of its own"
    sets = words((*SMALL, *CAA, "domains.mpiigi.classes=2"), steps=2)
    trained = mdltool("train", "--recipe", "cm3t_mpiigi", *sets, "--work", tmp_path, "--workers", 0)
    model = load_model(open_artifact(trained.path))
    assert list(model.spec.streams["mpiigi"]) == MICROPHONES


def test_a_model_gains_what_both_participants_say_by_the_recipe(
    tmp_path: Path, mdltool: Callable[..., Ran]
) -> None:
    """shard --recipe, train on frames, add-modality --recipe: two streams of each kind."""
    source = make_udiva(tmp_path / "videos")
    where = ("--domain", "udiva", "--split", "train", "--work", tmp_path, "--workers", 1)
    recipe = ("--recipe", "cm3t_udiva", "--modality", "audio", "--modality", "text")
    shards = mdltool("shard", source, "--format", "udiva", *where, *recipe).path
    assert list(ShardIndex.open(open_artifact(shards)).streams) == PEOPLE
    here = ("--work", tmp_path, "--workers", 0)
    frames = mdltool("train", "--recipe", "cm3t_udiva_swinb_mhva_pt", *words(SMALL, steps=1), *here).path
    sets = words((*CAA, "streams.audio_self.width=24"), steps=1)
    artifact = open_artifact(mdltool("add-modality", frames, *recipe, *sets, *here).path)
    assert artifact.summary["added"] == {"udiva": PEOPLE}
    old, new = load_model(open_artifact(frames)), load_model(artifact)
    assert all(torch.equal(new.tensors()[key], tensor) for key, tensor in old.tensors().items())
    # as the recipe declares them: of shards alone every stream gets a linear embedder
    streams = new.spec.streams["udiva"].values()
    assert [s.embedder for s in streams] == ["linear", "linear", "none", "none"]
    assert [(s.width, s.input) for s in streams] == [(24, 1024), (512, 1024), (512, 512), (512, 512)]
    stored = artifact.load_json("model.json")["recipe"]
    made = ["log_mel", "log_mel", "hashed_ngrams", "hashed_ngrams"]
    assert [part["extractor"] for part in stored["streams"].values()] == made
    assert stored["adapters"][-1]["fusion"] == "adapterfusion", "which the model's recipe did not have"


def recipe(**changes: Any) -> Recipe:
    """cm3t_mpiigi with a second domain, which has two of the microphones. changes: of stream audio_mic0."""
    content = load("cm3t_mpiigi").model_dump(mode="json")
    content["domains"]["pairs"] = content["domains"]["mpiigi"] | {"streams": MICROPHONES[1:3]}
    content["streams"]["words"] = {"kind": "text"}
    content["streams"]["audio_mic0"] |= changes
    return validate(content, "test")


def names(*modalities: str, domain: str = "mpiigi") -> list[str]:
    return [entry.name for entry in asked_for(recipe(), domain, modalities)]


def test_words_are_kinds_or_names_of_the_domains_streams() -> None:
    assert names("audio") == names("audio", domain="unheard_of") == MICROPHONES
    assert names("audio", domain="pairs") == MICROPHONES[1:3]
    assert names("text", "audio_mic2") == ["words", "audio_mic2"]
    assert names("audio_mic1", "audio") == ["audio_mic1", "audio_mic0", *MICROPHONES[2:]], "each once"


@pytest.mark.parametrize(
    ("modalities", "domain", "fix"),
    [
        (("flow",), "mpiigi", "one of: audio, audio_mic0"),
        (("adio",), "mpiigi", "did you mean 'audio'?"),
        (("audio_mik1",), "mpiigi", "did you mean 'audio_mic1'?"),
        (("audio_mic0",), "pairs", "did you mean 'audio_mic"),
        ((), "mpiigi", "add --modality audio --modality text"),
    ],
)
def test_words_of_no_such_stream(modalities: tuple[str, ...], domain: str, fix: str) -> None:
    with pytest.raises(MdlError) as caught:
        names(*modalities, domain=domain)
    assert fix in str(caught.value)


def test_a_recipe_without_streams_is_none_to_shard_by() -> None:
    with pytest.raises(MdlError, match="the recipe cm3t_mpiigi_swinb_mhva_pt has no streams"):
        asked_for(load("cm3t_mpiigi_swinb_mhva_pt"), "mpiigi", ("audio",))


def test_streams_are_made_as_the_recipe_declares(tmp_path: Path) -> None:
    """Its options hold, the recorded marks among them do not; nothing else differs from naming the stream."""
    options = {"bands": 64, "bins": 16, "store": "opus", "side": True}
    own = recipe(extractor="log_mel", extractor_options=options)
    spread = ("audio.rate=48000", "audio_mic0.store=flac")
    (found,) = asked_for(own, "mpiigi", ("audio_mic0",), settings=spread[1:])
    given = ("audio_mic0.bands=64", "audio_mic0.bins=16", "audio_mic0.store=flac")
    clip = Clip("k", tmp_path / "v.mp4", 0)
    plans = [Streams([entry], [clip], tmp_path) for entry in (found, *asked(("audio_mic0",), (), (), given))]
    assert plans[0].request() == plans[1].request()
    every = asked_for(own, "mpiigi", ("audio",), settings=spread)
    assert [entry.settings["rate"] for entry in every] == [48_000] * 4, "a setting of a kind is one of all"
    assert [entry.settings.get("store") for entry in every] == ["flac", None, None, None]


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"extractor_options": {"bands": 128}}, {"settings": ("audio_mic0.bands=64",)}, "with bands 128, not 64"),
        ({"extractor": "log_mel"}, {"settings": ("audio_mic0.extractor=x",)}, "with extractor log_mel, not x"),
        ({"extractor": "log_mel"}, {"features": ("audio_mic0=.",)}, "with extractor log_mel, not files"),
        ({"extractor": "files"}, {}, "takes the tokens of 'audio_mic0' from files of the data set"),
        ({}, {"sides": ("audio=.",)}, "'audio' is not among the streams of --modality"),
    ],
)
def test_the_command_line_and_the_recipe_that_do_not_agree(
    changes: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(MdlError, match=message):
        asked_for(recipe(**changes), "mpiigi", ("audio",), **given)


def test_tokens_of_another_width_than_the_recipes_are_refused_before_the_work(tmp_path: Path) -> None:
    clips = [Clip("k", tmp_path / "v.mp4", 0)]
    np.save(tmp_path / "v.npy", np.zeros((3, 512), np.float32))
    for given in ({"settings": ("audio_mic0.bins=4",)}, {"features": (f"audio_mic0={tmp_path}",)}):
        wanted = asked_for(recipe(), "mpiigi", ("audio_mic0",), **given)
        with pytest.raises(MdlError, match=r"'audio_mic0' \((log_mel|files)\) are 512 wide, the recipe wants 1024"):
            Streams(wanted, clips, tmp_path)
