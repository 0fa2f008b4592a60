"""Streams in recipes: what is refused, what the model's spec says, and requests of earlier versions."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mdltool.adapters.embedders import EMBEDDERS, embedder_of
from mdltool.artifact import Artifact, Draft, begin
from mdltool.errors import MdlError
from mdltool.model_spec import ModelSpec
from mdltool.recipe import find, load, validate
from mdltool.schema import Recipe
from mdltool.stages.fitting import train_spec
from mdltool.stages.plan import completed, modalities, model_spec, order_of
from mdltool.types import StreamSpec


def content() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(find("cm3t_ek100").read_text())
    return read


def changed(path: str, value: Any) -> dict[str, Any]:
    found: Any = content()
    *parents, last = path.split(".")
    part = found
    for key in parents:
        part = part[int(key)] if isinstance(part, list) else part[key]
    part[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("adapters", [{"type": "mhva"}], "streams: no adapter reads them; add {type: caa}"),
        ("adapters", [{"type": "caa"}, {"type": "mhva"}], "put mhva or adaptformer before it"),
        ("adapters", [{"type": "mhva"}, {"type": "caa"}, {"type": "caa"}], "one entry of caa holds all streams"),
        ("domains.ek100.streams", ["audi"], "there is no stream 'audi'; did you mean 'audio'?"),
        ("streams.audio", {"kind": "audio", "input": 7}, "'none' leaves an input of 7, but the width is 512"),
        ("streams.audio", {"kind": "audio", "embedder": "linaer"}, "did you mean 'linear'?"),
        ("streams.audio", {"kind": "odour"}, "streams.audio.kind: Input should be"),
        ("streams.Audio", {"kind": "audio"}, "streams.Audio: a stream's name is lower case"),
        ("data.augment.mixup", 0.8, "mixup and cutmix mix frames"),
        ("losses", {"inf": {}}, "are for frames alone"),
        ("train.steps.0.adapters", ["mhav"], "'mhav': there is no such adapter; did you mean 'mhva'?"),
        ("train.steps.0.adapters", [], "a step without adapters is regime: heads"),
        ("train.steps.0.mute", ["mhva"], "'mhva' is to train, so it cannot be muted"),
        ("adapters.2.share", ["ek10"], "there is no domain 'ek10'"),
        ("adapters.2.heads", 3, "d 128 is no multiple of heads 3"),
    ],
)
def test_faults(path: str, value: Any, fault: str) -> None:
    with pytest.raises(MdlError) as caught:
        validate(changed(path, value), "test")
    assert fault in str(caught.value)


def test_caa_without_streams_is_legal() -> None:
    recipe = validate({**content(), "streams": {}}, "test")
    assert model_spec(recipe, {"ek100": 3}).streams == {}


def test_the_spec_and_the_steps_are_the_recipes() -> None:
    recipe = validate(changed("streams.audio", {"kind": "audio", "input": 80, "embedder": "linear"}), "test")
    spec = model_spec(recipe, {"ek100": 3})
    assert list(spec.streams["ek100"]) == ["flow", "audio"]
    assert spec.streams["ek100"]["audio"] == StreamSpec("audio", 512, 80, "linear")
    assert modalities(recipe, "ek100") == {"flow": 490, "audio": 80}
    assert ModelSpec.from_json(spec.to_json()) == spec
    plan = train_spec(recipe, "frozen", order_of(recipe, {"ek100": 640}), {"ek100": 640})
    assert [step.adapters for step in plan.steps] == [("mhva", "prefix"), ("caa",)]
    full = load("cm3t_ek100_swinb_full_caa")
    assert model_spec(full, {"ek100": 3}).mute == ["mhva", "prefix"]


def test_a_model_without_streams_is_stored_as_before_there_were_any() -> None:
    spec = model_spec(load("tiny_demo"), {"a": 3})
    assert {"streams", "mute"} & set(spec.to_json()) == set()
    assert set(asdict(spec)) - set(spec.to_json()) == {"streams", "mute"}


@pytest.mark.parametrize(
    "wrap", [lambda r: r, lambda r: {"recipe": r, "start_from": None}, lambda r: {"finetune": r}]
)
def test_requests_from_before_a_key_are_the_same_request(tmp_path: Path, wrap: Any) -> None:
    now = load("cm3t_ek100_swinb_mhva_pt").model_dump(mode="json")
    old = copy.deepcopy(now)
    del old["streams"], old["data"]["fraction"], old["backbone"]["adapters"], old["train"]["decay_by_size"]
    for part in (*old["domains"].values(), *old["train"]["steps"]):
        for key in ("streams", "augment", "adapters", "mute"):
            part.pop(key, None)
    args: dict[str, Any] = {"kind": "model", "stage": "train", "inputs": []}
    first = begin(tmp_path / "m", request=wrap(old), **args)
    assert isinstance(first, Draft)
    first.abandon(keep=True)
    again = begin(tmp_path / "m", request=wrap(now), resume="must", completed=completed, **args)
    assert isinstance(again, Draft)
    assert again.resumed
    again.commit({})
    assert isinstance(begin(tmp_path / "m", request=wrap(now), completed=completed, **args), Artifact)
    other = wrap({**now, "data": {**now["data"], "fraction": 0.5}})
    with pytest.raises(MdlError, match="fraction"):
        begin(tmp_path / "m", request=other, completed=completed, **args)


def test_what_papers_print_is_no_part_of_a_request() -> None:
    now = load("mst_k400_b16_8").model_dump(mode="json")
    old = {**now, "published": {**now["published"], "notes": "other words", "top1": {"k400": 1.0}}}
    assert completed(now) == completed(old)
    assert completed({"recipe": now}) == completed({"recipe": old})
    assert completed(now) != completed({**now, "about": "another"})


def test_what_is_no_recipe_of_this_version_is_compared_as_it_stands() -> None:
    assert completed({"recipe": {"name": 1}, "start_from": None}) == {"recipe": {"name": 1}, "start_from": None}
    assert set(completed({"domain": "a"})) == {"domain"}
    assert Recipe.model_validate(completed(content()))


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedders_map_each_token_by_itself(name: str) -> None:
    options = {"patch": {"shape": [1, 4, 8], "hidden": 3}}.get(name, {})
    width = 32 if name == "none" else 5
    embedder = embedder_of("s", StreamSpec("audio", width, 32, name, options))
    tokens = torch.randn(2, 3, 32)
    found = embedder(tokens)
    assert found.shape == (2, 3, width)
    torch.testing.assert_close(embedder(tokens.flip(1)), found.flip(1))
    found.sum().backward() if name != "none" else None
    assert all(parameter.grad is not None for parameter in embedder.parameters())


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (StreamSpec("audio", 5, 32), "take 'linear'"),
        (StreamSpec("audio", 5, 32, "patch", {"shape": [1, 4, 4]}), "is of 16 numbers, not 32"),
        (StreamSpec("audio", 5, 32, "patch", {"shape": [8, 2, 2]}), "patches of 4 do not fit into 2 x 2"),
        (StreamSpec("audio", 5, 32, "patch"), "shape: Field required"),
        (StreamSpec("audio", 5, 32, "linear", {"nrm": True}), "keys: norm"),
        (StreamSpec("audio", 5, 32, "conv"), "there is no embedder 'conv'"),
    ],
)
def test_embedders_that_do_not_fit(spec: StreamSpec, fault: str) -> None:
    with pytest.raises(MdlError, match=fault):
        embedder_of("s", spec)
