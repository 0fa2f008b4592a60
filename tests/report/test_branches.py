"""What the report says of MST-Adapters and of the papers' tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mdltool.artifact import open_artifact
from mdltool.recipe import find
from mdltool.report import branches
from tests.conftest import Ran, World


@pytest.fixture(scope="module")
def report(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model of the tiny encoder with MST-Adapters under the name of a paper's row, and its report's text."""
    folder = tmp_path_factory.mktemp("branches")
    content = yaml.safe_load(find("tiny_clip_mst").read_text())
    published = yaml.safe_load(find("mst_k400_b16_8").read_text())["published"]
    content |= {"name": "mst_k400_b16_8", "published": {**published, "parameters_m": {}, "top1": {"chalk": 82.7}}}
    content |= {"backbone": {"name": "clip_vit_tiny"}, "domains": {"chalk": {"classes": 8}}}
    content["train"]["steps"][0]["updates"] = 2
    content["data"] |= {"frames": 4, "crop": 32, "batch": 4, "augment": {"short_side": [32, 36]}}
    content["val"], content["views"] = {"every": 0, "short_side": 32}, {"grid": "1x1", "short_side": 32}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    data = ("--data", f"chalk={world.shards('chalk', 'train')}", "--work", world.work)
    model = mdltool("train", "--recipe", folder / "recipe.yaml", *data, "--out", folder / "model").path
    scores = mdltool("eval", model, "--views", "1x1", "--work", world.work, "--out", folder / "eval").path
    page = mdltool("report", scores, "--out", folder / "report").path / "report.html"
    return model, page.read_text()


def test_the_learned_branch_weights_stand_in_the_report(report: tuple[Path, str]) -> None:
    model, text = report
    found = branches.branch_weights(open_artifact(model))["chalk"]
    assert [(block, place) for block, place, _ in found] == [(b, p) for b in (1, 2, 3) for p in ("exit", "mid")]
    for _, _, values in found:
        assert len(values) == 3
        assert all(0.2 < value < 0.5 for value in values), "two updates from 0.33"
        assert all(f"{value:.3f}" in text for value in values)
    assert "Figure 7" in text


def test_the_papers_tables_stand_beside_ours(report: tuple[Path, str]) -> None:
    _, text = report
    assert "As printed: mst_adapter, Table 1" in text
    assert "82.70" in text
    assert "TimeSformer" in text, "rows of other systems too"


def test_other_models_have_no_such_section(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    model = mdltool(*world.train_words(), "--out", tmp_path / "model").path
    assert branches.branch_weights(open_artifact(model)) == {}
    assert branches.section(open_artifact(model)) == ""
