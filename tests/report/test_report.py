"""The report shows the figures of its evals, in one file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mdltool.artifact import Artifact, begin
from mdltool.files import write_text
from mdltool.lineage import Node
from mdltool.model import build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.model_store import stored_tensors, write_description
from mdltool.report import branches, build, page, plots
from mdltool.train.checkpoint import save_tensors
from mdltool.types import LabelSpace
from tests.conftest import Ran, World


@pytest.fixture(scope="module")
def evaluated(world: World, mdltool: Callable[..., Ran], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("evals")
    model = mdltool(*world.train_words(), "--out", folder / "model").path
    words = ("--work", world.work)
    return [mdltool("eval", model, "--views", v, *words, "--out", folder / f"e{v}").path for v in ("1x1", "2x3")]


class Reader(HTMLParser):
    """Collects tags, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    return reader


def test_the_page_shows_every_domain_and_its_figures(
    evaluated: list[Path], mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    path = mdltool("report", *evaluated, "--out", tmp_path / "r").path
    found = read(path / "report.html")
    for artifact in evaluated:
        metrics = json.loads((artifact / "metrics.json").read_text())
        for domain, entry in metrics["domains"].items():
            assert domain in found.words
            assert f"{100 * entry['metrics']['top1']:.2f}" in found.words
            assert all(name in found.words for name in entry["per_class"])
    assert found.tags.count("svg") == 2 * (2 + 2 * 2), "curves of two evals, bars and confusion of two domains each"
    assert "training loss" in found.words
    assert "quarantined" in found.words


def test_the_page_needs_nothing_else(evaluated: list[Path], mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    path = mdltool("report", evaluated[0], "--out", tmp_path / "r").path
    found = read(path / "report.html")
    assert "script" not in found.tags
    assert [link for link in found.links if not link.startswith(("#", "data:image/"))] == []
    assert "@import" not in (path / "report.html").read_text()


def test_the_same_evals_give_the_same_page(
    evaluated: list[Path], mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    digests = [mdltool("report", evaluated[0], "--out", tmp_path / n, "--json").json["digest"] for n in "ab"]
    assert digests[0] == digests[1]


def test_a_report_survives_the_loss_of_the_model(
    evaluated: list[Path], mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    model = evaluated[0].parent / "model"
    model.rename(model.with_name("gone"))
    try:
        path = mdltool("report", evaluated[0], "--out", tmp_path / "r").path
    finally:
        model.with_name("gone").rename(model)
    assert "not here any more" in read(path / "report.html").words


def test_every_published_metric_stands_beside_ours(tmp_path: Path) -> None:
    draft = begin(tmp_path / "m", kind="model", stage="train", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    printed = {"rows": ["Table 1"], "top1": {"a": 82.7}, "scores": {"map": {"b": 0.894}, "mean_mse": {"c": 0.8}}}
    write_text(draft.path / "model.json", json.dumps({"recipe": {"name": "r", "published": printed}}))
    model = draft.commit({})
    draft = begin(tmp_path / "e", kind="eval", stage="eval", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    ours = {"a": {"top1": 0.8142}, "b": {"map": 0.5}, "c": {"mse": 1.25}}
    write_text(draft.path / "metrics.json", json.dumps({"domains": {d: {"metrics": m} for d, m in ours.items()}}))
    found = build.published([build.Evaluated(draft.commit({}), model, Node(tmp_path, "eval", ""))])
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", found)
    assert [cells[i + 2 : i + 6] for i in range(0, len(cells), 6)] == [
        ["a", "top-1 %", "82.70", "81.42"],
        ["b", "mAP %", "89.40", "50.00"],
        ["c", "MSE", "0.8", "1.2500"],
    ]


def test_names_cannot_inject_markup() -> None:
    text = page.table(("class",), [("<script>alert(1)</script>",)])
    assert "<script" not in text
    svg = plots.class_bars({"<script>": {"accuracy": 0.5, "clips": 2}})
    assert "<script>" not in svg


def test_four_hundred_classes_stay_readable() -> None:
    names = [f"class {i}" for i in range(400)]
    svg = plots.confusion([[int(i == j) for j in range(400)] for i in range(400)], names)
    assert "class 17" not in svg
    bars = plots.class_bars({name: {"accuracy": 0.5, "clips": 1} for name in names})
    assert "400 classes" in bars
    assert len(re.findall("class 17", bars)) == 0


def test_the_wrong_kind_is_refused(world: World, mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("report", world.shards("chalk", "val"))
    assert ran.code == 1
    assert "of kind shards, not eval" in ran.err


def with_branches(path: Path, fusion: str, last: float, best: float) -> Artifact:
    """A model of the tiny encoder; in block b of domain b the weights are b times `last` or `best`."""
    parts = [AdapterSpec("mst", "all", {"r": 4, "fusion": fusion}), AdapterSpec("cls_shift", "all")]
    spec = ModelSpec("clip_vit_tiny", {}, 4, 32, {"a": 3, "b": 4}, parts, bn="frozen")
    model = build_model(spec)
    draft = begin(path, kind="model", stage="train", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    for name, scale in (("last", last), ("best", best)):
        tensors = stored_tensors(model, own_backbone=True)
        for key in tensors:
            if key.endswith("/weights"):
                block = float(key.split("/")[1].removeprefix("block").partition(".")[0])
                tensors[key] = torch.tensor([1.0, 2.0, -3.0]) * scale * block * (1 if key[0] == "a" else 10)
        save_tensors(draft.path / "weights" / f"{name}.safetensors", tensors)
    recipe = {"name": "branches", "domains": {d: {"task": "single_label"} for d in "ab"}}
    spaces = {domain: LabelSpace("single_label", (name,)) for domain, name in (("a", "x"), ("b", "y"))}
    write_description(draft.path, spec, recipe, spaces, True, {})
    return draft.commit({})


def test_branch_weights_are_those_that_were_evaluated(tmp_path: Path) -> None:
    artifact = with_branches(tmp_path / "m", "learned", 0.01, 0.002)
    for weights, scale in (("last", 0.01), ("best", 0.002)):
        found = branches.branch_weights(artifact, weights)
        assert list(found) == ["a", "b"]
        assert [(block, place) for block, place, _ in found["b"]] == [
            (b, p) for b in (1, 2, 3) for p in ("exit", "mid")
        ]
        for domain, factor in (("a", 1), ("b", 10)):
            for block, _, values in found[domain]:
                assert values == pytest.approx([scale * factor * block * a for a in (1, 2, -3)])
    text = branches.section(artifact, "best")
    assert "-0.180" in text, "negative ones are shown as they are"
    assert text.count("<svg") == 2


def test_branch_weights_are_what_the_branches_are_multiplied_with(tmp_path: Path) -> None:
    softened = branches.branch_weights(with_branches(tmp_path / "s", "softmax", 0.1, 0.1))
    for block, _, values in softened["a"]:
        expected = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64).mul(block).exp()
        assert values == pytest.approx((expected / expected.sum()).tolist())
    assert branches.section(with_branches(tmp_path / "m", "average", 1, 1)) == "", "nothing is learned"
