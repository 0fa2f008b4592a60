"""inspect follows and verifies lineage; doctor says what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mdltool.artifact import Artifact, Draft, begin
from tests.conftest import Ran


def make(path: Path, kind: str, inputs: list, text: str) -> Artifact:
    draft = begin(path, kind=kind, stage=kind, inputs=inputs, request={"text": text})
    assert isinstance(draft, Draft)
    (draft.path / "content.txt").write_text(text)
    return draft.commit({"clips": 1234, "top1": 0.5})


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Artifact, Artifact, Artifact]:
    shards = make(tmp_path / "shards" / "s", "shards", [], "clips")
    model = make(tmp_path / "model" / "m", "model", [shards.as_input("train")], "weights")
    return shards, model, make(tmp_path / "eval" / "e", "eval", [model.as_input("model")], "scores")


def test_lineage_back_to_the_shards(chain: tuple[Artifact, ...], mdltool: Callable[..., Ran]) -> None:
    shards, model, scores = chain
    ran = mdltool("inspect", scores.path, "--verify")
    assert ran.code == 0, ran.err
    lines = ran.out.split("lineage\n")[1].splitlines()
    assert [line.split()[-1] for line in lines] == [str(scores.path), str(model.path), str(shards.path)]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert indents == sorted(set(indents))
    assert "1,234" in ran.out
    found = mdltool("inspect", scores.path, "--json").json
    assert found["inputs"][0]["inputs"][0]["digest"] == shards.digest


def test_damage_far_back_is_found_by_verify_alone(chain: tuple[Artifact, ...], mdltool: Callable[..., Ran]) -> None:
    shards, _, scores = chain
    (shards.path / "content.txt").write_text("clipz")
    assert mdltool("inspect", scores.path).code == 0
    ran = mdltool("inspect", scores.path, "--verify")
    assert ran.code == 1
    assert "content.txt: content differs" in ran.err
    assert "Traceback" not in ran.err


def test_what_is_gone_or_replaced_is_said(chain: tuple[Artifact, ...], mdltool: Callable[..., Ran]) -> None:
    shards, model, scores = chain
    shards.path.rename(shards.path.with_name("moved"))
    ran = mdltool("inspect", scores.path)
    assert ran.code == 1
    assert "not here any more" in ran.err
    make(shards.path, "shards", [], "others")
    ran = mdltool("inspect", model.path)
    assert ran.code == 1
    assert "another artifact lies there now" in ran.err


def test_doctor_tells_decoders_and_devices(mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    found = mdltool("doctor", "--work", tmp_path / "not" / "yet", "--json").json
    assert found["decoders"]["pyav"] is None
    assert found["torch"]["torchvision"]
    assert found["devices"]["cores"] >= 1
    assert found["disk"]["free_gb"] > 0
    assert json.dumps(found)
    ran = mdltool("doctor")
    assert ran.code == 0
    assert "decoder pyav" in ran.out
