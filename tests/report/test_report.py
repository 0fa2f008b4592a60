"""The report shows the figures of its evals, in one file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mdltool.report import page, plots
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
    assert "shards artifact, not eval" in ran.err
