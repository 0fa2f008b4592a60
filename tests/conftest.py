"""Fixtures for the whole suite."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Files of few tests that take long begin first: begun last, one would keep a process busy while the others idle.
LONG_FILES = (
    "tests/test_slurm.py",
    "tests/stages/test_pipeline.py",
    "tests/train/test_processes.py",
    "tests/train/test_engine.py",
    "tests/stages/test_multitrain.py",
    "tests/adapters/test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return LONG_FILES.index(file) if file in LONG_FILES else len(LONG_FILES)

    items.sort(key=place)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real clips and annotation files; tests that need it skip visibly where it is not set."""
    folder = os.environ.get("MDLTOOL_TEST_DATA")
    if not folder:
        pytest.skip("MDLTOOL_TEST_DATA is not set: the real clips are not here")
    path = Path(folder)
    assert (path / "MANIFEST.csv").is_file(), f"MDLTOOL_TEST_DATA={folder} holds no MANIFEST.csv"
    return path


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        """The artifact's path, alone on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        return Path(self.out.strip())

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def run_mdltool(*words: object) -> Ran:
    """Run the command line in this process, as the entry point would."""
    from mdltool.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["mdltool", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = argv
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def mdltool() -> Callable[..., Ran]:
    """`mdltool("train", "--recipe", ...)` -> Ran."""
    return run_mdltool


TINY = (
    "train.steps.0.updates=4",
    "train.checkpoint_every=1",
    "data.frames=4",
    "data.crop=32",
    "data.augment.short_side=[32, 36]",
    "data.batch=4",
    "val.every=2",
    "val.short_side=32",
    "views.short_side=36",
)


@dataclass(frozen=True)
class World:
    """Two small generated domains as shards, a pretrained backbone, a trained model and its eval."""

    work: Path
    videos: Path

    def shards(self, domain: str, split: str) -> Path:
        return self.work / "shards" / f"{domain}-{split}"

    def data(self, *domains: str) -> list[str]:
        return [w for d in domains for s in ("train", "val") for w in ("--data", f"{d}={self.shards(d, s)}")]

    def train_words(self, weights: str = "scratch") -> list[str]:
        """A small training run of both domains; it reads by itself, unless later words have --workers."""
        sets = [w for key in (*TINY, f"backbone.weights={weights}") for w in ("--set", key)]
        return ["train", "--recipe", str(self.work / "two.yaml"), *sets, "--work", str(self.work), "--workers", "0"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once a test process, by the commands."""
    import yaml

    from mdltool.recipe import find

    root = tmp_path_factory.mktemp("world")
    made = World(root / "artifacts", root / "videos")
    ran = run_mdltool("synth", "--out", made.videos, "--domains", "chalk,neon", "--clips-per-class", 2, "--seed", 3)
    assert ran.code == 0, ran.err
    for domain in ("chalk", "neon"):
        for split in ("train", "val"):
            source = made.videos / domain / split
            words = ("--format", "folder", "--domain", domain, "--split", split, "--work", made.work)
            ran = run_mdltool("shard", source, *words)
            assert ran.code == 0, ran.err
    recipe = yaml.safe_load(find("tiny_demo").read_text())
    del recipe["domains"]["field"]
    recipe["name"] = "two"
    (made.work / "two.yaml").write_text(yaml.safe_dump(recipe))
    return made
