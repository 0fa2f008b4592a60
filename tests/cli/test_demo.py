"""The demo in its smallest form: one clip of a class, two updates, one view."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mdltool.artifact import open_artifact
from mdltool.cli import demo, inputs
from tests.conftest import Ran


def test_the_demo_goes_through_every_stage(
    monkeypatch: pytest.MonkeyPatch, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    small = {"CLIPS_PER_CLASS": 1, "FINETUNE": 2, "SOUND_CLIPS": 1, "VIEWS": "1x1", "SECOND_VIEWS": "1x1"}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(inputs, "workers_or_default", lambda given: 0)
    short = ("--set", "train.steps.0.updates=2", "--set", "val.every=0")
    monkeypatch.setattr(demo._Runner, "_train_seed", lambda self: short)
    ran = mdltool("demo", "--out", tmp_path / "demo", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert set(found["models"]) == {"adapters", "compressed"}
    assert set(found["sound"]) == {"pictures", "pictures and sound"}
    page = Path(found["report"]).read_text()
    evals = [open_artifact(path) for path in sorted((tmp_path / "demo/artifacts/eval").glob("tiny_*"))]
    assert len(evals) == 4
    assert all(artifact.digest[:12] in page for artifact in evals)
