"""The commands on shards at addresses: what they make is what local shards give."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from mdltool import remote
from mdltool.artifact import open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from tests.conftest import TINY, Ran, World
from tests.file_server import Server, server

__all__ = ["server"]  # a fixture


@pytest.fixture(autouse=True)
def own_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(world: World, server: Server) -> Server:
    """A server of the world's shards, each at /data/<domain>-<split>."""
    for folder in (world.work / "shards").iterdir():
        for path in folder.iterdir() if not folder.is_symlink() else ():
            server.files[f"/data/{folder.name}/{path.name}"] = path.read_bytes()
    return server


def data(server: Server, *names: str) -> list[str]:
    return [w for name in names for w in ("--data", f"{name.partition('-')[0]}={server.url}/data/{name}")]


ALL = ("chalk-train", "chalk-val", "neon-train", "neon-val")


class TestIndex:
    def test_reads_what_the_local_one_reads_by_one_request_a_clip(self, world: World, shards: Server) -> None:
        here = ShardIndex.open(open_artifact(world.shards("chalk", "train")))
        there = ShardIndex.open(open_artifact(f"{shards.url}/data/chalk-train"))
        assert there.digest == here.digest
        assert [path for path, _ in shards.asked] == [
            f"/data/chalk-train/{name}" for name in ("artifact.json", "index.json")
        ]
        shards.asked.clear()
        assert len(here) > 3
        for i in range(len(here)):
            assert there.clip(i) == here.clip(i)
        assert len(shards.asked) == len(here)
        assert shards.connections == 1

    def test_changed_files_are_refused(self, shards: Server) -> None:
        url = f"{shards.url}/data/chalk-train"
        whole = dict(shards.files)
        shards.files["/data/chalk-train/index.json"] += b" "
        with pytest.raises(MdlError, match="sha256 differs"):
            ShardIndex.open(open_artifact(url))
        shards.files |= whole
        shards.files["/data/chalk-train/artifact.json"] = b"<html>"
        with pytest.raises(MdlError, match=r"artifact\.json cannot be read"):
            open_artifact(url)
        shards.files |= whole
        index = ShardIndex.open(open_artifact(url))
        tar = f"/data/chalk-train/{index.files[0]}"
        shards.files[tar] = whole[tar][512:]
        with pytest.raises(MdlError, match=f"this is not the file.*{len(whole[tar])} expected"):
            index.clip(0)
        shards.files[tar] = whole[tar][512:] + bytes(512)
        with pytest.raises(MdlError, match="these shards are damaged"):
            index.clip(0)

    def test_an_index_that_points_outside_is_refused(self, shards: Server) -> None:
        manifest = json.loads(shards.files["/data/chalk-train/artifact.json"])
        (tar,) = (name for name in manifest["files"] if name.endswith(".tar"))
        manifest["files"][tar]["bytes"] = 1024
        shards.files["/data/chalk-train/artifact.json"] = json.dumps(manifest).encode()
        with pytest.raises(MdlError, match="points outside"):
            ShardIndex.open(open_artifact(f"{shards.url}/data/chalk-train"))

    def test_names_that_leave_the_directory_are_refused(self, shards: Server) -> None:
        manifest = json.loads(shards.files["/data/chalk-train/artifact.json"])
        manifest["files"]["../neon-train/index.json"] = manifest["files"]["index.json"]
        shards.files["/data/chalk-train/artifact.json"] = json.dumps(manifest).encode()
        artifact = open_artifact(f"{shards.url}/data/chalk-train")
        with pytest.raises(MdlError, match="has no file"):
            artifact.load_json("../neon-train/index.json")
        assert "../neon-train/index.json: lies outside the artifact" in artifact.verify()

    def test_a_missing_artifact(self, shards: Server) -> None:
        with pytest.raises(MdlError, match="404") as caught:
            open_artifact(f"{shards.url}/data/chalk-test")
        assert caught.value.where == f"{shards.url}/data/chalk-test/artifact.json"

    def test_other_kinds_are_used_on_this_machine(self, shards: Server) -> None:
        artifact = open_artifact(f"{shards.url}/data/chalk-train")
        with pytest.raises(MdlError, match="on this machine only"):
            artifact.file("index.json")


@pytest.fixture(scope="module")
def model(world: World, mdltool: Callable[..., Ran]) -> Path:
    """Trained from local shards."""
    return mdltool(*world.train_words(), "--workers", 0).path


@pytest.mark.parametrize("workers", [0, 2])
def test_train(
    model: Path, world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path, workers: int
) -> None:
    shards.cuts = [10**9] * 10 + [300, 0]
    words = (*world.train_words(), *data(shards, *ALL), "--workers", workers, "--out", tmp_path / "m")
    made = open_artifact(mdltool(*words).path)
    assert made.digest == open_artifact(model).digest
    assert not shards.cuts
    assert {entry.path for entry in made.inputs} == {f"{shards.url}/data/{name}" for name in ALL}
    assert any(span for path, span in shards.asked if path.endswith(".tar"))
    assert all(span for path, span in shards.asked if path.endswith(".tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval(
    model: Path, world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path, workers: int
) -> None:
    words = ("eval", model, "--views", "2x1", "--workers", workers)
    here = mdltool(*words, "--out", tmp_path / "here", *world.data("chalk")[2:]).path
    there = mdltool(*words, "--out", tmp_path / "there", *data(shards, "chalk-val")).path
    assert open_artifact(here).digest == open_artifact(there).digest
    for name in ("metrics.json", "scores.parquet"):
        assert (here / name).read_bytes() == (there / name).read_bytes()


def test_pretrain_and_add_domain(world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    sets = [w for key in TINY for w in ("--set", key)]
    here, there = (
        mdltool("backbone", "pretrain", *source, *sets, "--out", tmp_path / name).path
        for name, source in (("here", world.data("chalk")), ("there", data(shards, *ALL[:2])))
    )
    assert open_artifact(there).digest == open_artifact(here).digest
    words = ("train", "--recipe", "tiny_single", "--domain", "chalk", *sets, "--set", "backbone.weights=scratch")
    one = mdltool(*words, *world.data("chalk"), "--out", tmp_path / "one")
    here, there = (
        mdltool("add-domain", one.path, *source, "--out", tmp_path / f"more-{name}").path
        for name, source in (("here", world.data("neon")), ("there", data(shards, *ALL[2:])))
    )
    assert open_artifact(there).digest == open_artifact(here).digest


def test_an_object_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry, "s3", MemoryFileSystem)
    store = MemoryFileSystem()
    folder = world.shards("neon", "val")
    for path in folder.iterdir():
        store.pipe_file(f"s3://bucket/neon-val/{path.name}", path.read_bytes())
    here = ShardIndex.open(open_artifact(folder))
    there = pickle.loads(pickle.dumps(ShardIndex.open(open_artifact("s3://bucket/neon-val"))))
    assert [there.clip(i) for i in range(len(here))] == [here.clip(i) for i in range(len(here))]
    assert open_artifact("s3://bucket/neon-val").verify() == []
    store.store.clear()


def test_one_message_when_the_server_fails_for_good(
    world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    words = [*world.train_words(), *data(shards, *ALL), "--workers", "2", "--out", tmp_path / "m"]
    for path in [path for path in shards.files if "neon-train" in path and path.endswith(".tar")]:
        del shards.files[path]
    ran = mdltool(*words)
    assert ran.code == 1
    assert "404 Not Found" in ran.err
    assert f"{shards.url}/data/neon-train/" in ran.err
    assert "Traceback" not in ran.err
    shards.ranges = False
    ran = mdltool(*words, "--resume")
    assert ran.code == 1
    assert "ignores Range" in ran.err


def test_shards_of_another_domain(
    world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = mdltool(*world.train_words(), "--data", f"chalk={shards.url}/data/neon-val", "--out", tmp_path / "m")
    assert ran.code == 1
    assert f"--data neon={shards.url}/data/neon-val" in ran.err


def test_overlap(world: World, shards: Server, mdltool: Callable[..., Ran]) -> None:
    paths = [str(world.shards("chalk", split)) for split in ("train", "val")]
    addresses = [f"{shards.url}/data/chalk-{split}" for split in ("train", "val")]
    assert mdltool("overlap", *addresses, "--json").json == mdltool("overlap", *paths, "--json").json


def test_inspect(
    world: World, shards: Server, mdltool: Callable[..., Ran], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*world.train_words(), *data(shards, *ALL), "--workers", 0, "--out", tmp_path / "m")
    made = mdltool(*words).path
    shards.asked.clear()
    ran = mdltool("inspect", made)
    assert ran.code == 0
    assert f"{shards.url}/data/neon-val" in ran.out
    assert not shards.asked
    ran = mdltool("inspect", made, "--verify")
    assert ran.code == 0, ran.err
    assert "every other hash is right" in ran.err
    assert f"{shards.url}/data/neon-val: its shards were not read" in ran.err
    assert not [path for path, _ in shards.asked if path.endswith(".tar")]

    url = f"{shards.url}/data/chalk-train"
    ran = mdltool("inspect", url, "--verify")
    assert ran.code == 0, ran.err
    assert "every hash is right" in ran.err
    (tar,) = (path for path in shards.files if "chalk-train" in path and path.endswith(".tar"))
    shards.files[tar] = shards.files[tar][:-1] + b"x"
    ran = mdltool("inspect", url, "--verify")
    assert ran.code == 1
    assert "content differs from its sha256" in ran.err

    shards.files["/data/chalk-train/artifact.json"] = shards.files["/data/neon-train/artifact.json"]
    shards.files["/data/neon-val/index.json"] += b" "
    del shards.files["/data/chalk-val/artifact.json"]
    ran = mdltool("inspect", made, "--verify")
    assert ran.code == 1
    assert "another artifact lies there now" in ran.err
    assert "not here any more (the server does not give this file (404 Not Found))" in ran.err
    assert "index.json" in ran.err
    assert "Traceback" not in ran.err
