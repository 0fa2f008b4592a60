"""model split and model merge: a domain out of a model, as a file, and into another; predict on several domains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mdltool.artifact import open_artifact
from mdltool.domain_pack import read_pack
from mdltool.model_store import load_model
from mdltool.recipe import load
from mdltool.train.checkpoint import save_tensors
from tests.conftest import TINY, Ran, World

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def frozen(world: World, mdltool: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of chalk and neon that names its backbone by digest: adapters on a frozen one, with validation."""
    sets = [w for key in TINY for w in ("--set", key)]
    data = ("--data", f"chalk={world.shards('chalk', 'train')}")
    folder = tmp_path_factory.mktemp("frozen")
    backbone = mdltool("backbone", "pretrain", *data, *sets, "--work", world.work, "--out", folder / "b").path
    changes = ("train.steps.0.regime=frozen", "train.bn=per_domain", "adapters=[{type: 2plus1d, ln: none}]")
    words = [w for change in changes for w in ("--set", change)]
    where = ("--backbone", backbone, "--out", folder / "model")
    return mdltool(*world.train_words("pretrained"), *words, *where).path


@pytest.fixture(scope="module")
def without(frozen: Path, mdltool: Command, world: World) -> Path:
    return mdltool("model", "rm", "neon", frozen, "--work", world.work, "--out", frozen.parent / "without").path


@pytest.fixture(scope="module")
def pack(frozen: Path, mdltool: Command, world: World) -> Path:
    return mdltool("model", "split", "neon", frozen, "--work", world.work).path


def tensors(path: Path, weights: str = "last") -> dict[str, torch.Tensor]:
    return load_model(open_artifact(path), weights).tensors()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_out_and_in_and_out_again(
    frozen: Path, without: Path, pack: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    assert pack == world.work / "domains" / "model.neon.safetensors"
    kept = {path.name: path.read_bytes() for path in (frozen / "weights").iterdir()}
    merged = mdltool("model", "merge", pack, without, "--work", world.work, "--out", tmp_path / "merged").path
    artifact = open_artifact(merged, "model")
    assert artifact.verify() == []
    assert [entry.role for entry in artifact.inputs] == ["model", "backbone"]
    assert same(tensors(merged), tensors(frozen))
    assert [p.name for p in (merged / "weights").iterdir()] == ["last.safetensors"]
    assert (merged / "weights" / "last.safetensors").read_bytes() == kept["last.safetensors"]
    old, new = (json.loads((path / "model.json").read_text()) for path in (frozen, merged))
    assert new["spec"] == old["spec"]
    assert new["domains"] == old["domains"]
    assert load(str(merged / "recipe.yaml")).domains.keys() == {"chalk", "neon"}
    again = tmp_path / "again.safetensors"
    mdltool("model", "split", "neon", merged, "--work", world.work, "--out", again)
    assert again.read_bytes() == pack.read_bytes()
    words = ("--views", "1x1", "--work", world.work, "--out")
    scored = [mdltool("eval", path, *words, tmp_path / f"eval-{path.name}").path for path in (frozen, merged)]
    first, second = (open_artifact(path).load_json("metrics.json")["domains"] for path in scored)
    assert first["neon"]["metrics"] == second["neon"]["metrics"]
    assert {path.name: path.read_bytes() for path in (frozen / "weights").iterdir()} == kept


def test_under_another_name(
    without: Path, frozen: Path, pack: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    words = ("--work", tmp_path, "--as", "night", "--out", tmp_path / "m", "--json")
    ran = mdltool("model", "merge", pack, frozen, *words)
    assert ran.json["summary"]["added"] == "night"
    found = tensors(tmp_path / "m")
    assert set(load_model(open_artifact(tmp_path / "m")).spec.domains) == {"chalk", "neon", "night"}
    twins = {key: f"neon/{key.removeprefix('night/')}" for key in found if key.startswith("night/")}
    assert twins
    assert all(torch.equal(found[key], found[twin]) for key, twin in twins.items())


def test_a_model_that_stores_its_backbone_takes_it_too(
    without: Path, pack: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    """The digest is of the backbone's tensors, wherever they are kept."""
    target = tmp_path / "target"
    shutil.copytree(without, target)
    save_tensors(target / "weights" / "last.safetensors", tensors(without))
    _edit(target, lambda content: content | {"own_backbone": True})
    merged = mdltool("model", "merge", pack, target, "--work", world.work, "--out", tmp_path / "m").path
    whole = load_file(merged / "weights" / "last.safetensors")
    assert {key.split("/")[0] for key in whole} == {"backbone", "chalk", "neon"}
    assert same({k: t for k, t in whole.items() if not k.startswith("neon/")}, tensors(without))


def test_the_default_name_and_a_second_time(
    without: Path, frozen: Path, pack: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    words = ("model", "merge", pack, without, "--work", tmp_path)
    first = mdltool(*words).path
    assert first == tmp_path / "model" / "without+neon"
    assert mdltool(*words).path == first
    assert mdltool("model", "split", "neon", frozen, "--work", world.work).path == pack, "the same file is there"
    ran = mdltool("model", "split", "chalk", frozen, "--work", world.work, "--out", pack)
    assert (ran.code, "something else is already there" in ran.err) == (1, True)
    ran = mdltool("model", "split", "neon", frozen, "--weights", "best", "--work", world.work, "--json")
    assert ran.json["artifact"].endswith("model.neon.best.safetensors")
    assert ran.json["kind"] == "domain"
    best, own = tensors(frozen, "best"), read_pack(Path(ran.json["artifact"])).tensors
    assert all(torch.equal(own[key.removeprefix("neon/")], best[key]) for key in best if key.startswith("neon/"))


def test_what_the_domain_had_of_its_own_stays_its_own(
    frozen: Path, without: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    """Sampling, views, flip and batch where the other model's recipe has others; the protocol is announced."""
    target = tmp_path / "target"
    shutil.copytree(without, target)
    recipe = yaml.safe_load((target / "recipe.yaml").read_text())
    recipe["data"]["sampling"]["clip_seconds"] = 1.0
    recipe["data"]["augment"]["flip"] = 0.5
    recipe["data"]["batch"] = 6
    recipe["views"] |= {"grid": "2x1", "short_side": 40}
    _edit(target, lambda content: content | {"recipe": recipe})
    source = mdltool("model", "split", "neon", frozen, "--work", world.work).path
    ran = mdltool("model", "merge", source, target, "--work", world.work, "--out", tmp_path / "m")
    assert "short_side 40 (it had 36)" in ran.err
    found = load(str(ran.path / "recipe.yaml"))
    was = load(str(frozen / "recipe.yaml"))
    neon = found.domains["neon"]
    assert (neon.sampling, neon.flip, neon.views) == (was.data.sampling, was.data.augment.flip, was.views.grid)
    assert found.domains["chalk"].sampling is None
    assert found.data.batch == {"chalk": 6, "neon": 4}
    back = mdltool("model", "split", "neon", ran.path, "--work", world.work, "--out", tmp_path / "n.safetensors")
    ours, theirs = (dict(read_pack(path).recipe) for path in (back.path, source))
    assert ours.pop("views") != theirs.pop("views")
    assert ours == theirs


def _edit(artifact: Path, change: Callable[[dict], dict]) -> None:
    """Change a model.json as if it had been written so."""
    import hashlib

    path, manifest = artifact / "model.json", artifact / "artifact.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    content = json.loads(manifest.read_text())
    content["files"]["model.json"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def test_what_merge_and_split_refuse(
    frozen: Path, without: Path, pack: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    joint = mdltool(*world.train_words(), "--set", "train.bn=per_domain", "--out", tmp_path / "joint").path
    cut = tmp_path / "cut.safetensors"
    data = pack.read_bytes()
    cut.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fused = tmp_path / "fused"
    shutil.copytree(without, fused)
    part = {"domain": "chalk", "biases": [], "norms": []}
    _edit(fused, lambda content: content | {"spec": content["spec"] | {"fused": part}})
    out = tmp_path / "x"
    cases: list[tuple[tuple[object, ...], str]] = [
        (("merge", pack, frozen), "has a domain 'neon' already"),
        (("merge", pack, without, "--as", "chalk"), "has a domain 'chalk' already"),
        (("merge", pack, without, "--as", "Neon!"), "a domain's name is"),
        (
            ("merge", pack, joint, "--as", "n"),
            "made for another model (adapters.0.options.ln: none there, channel here",
        ),
        (("merge", cut, without), "damaged"),
        (("merge", frozen / "weights" / "last.safetensors", without), "holds no domain"),
        (("merge", frozen / "model.json", without), "cannot be read"),
        (("merge", tmp_path / "no", without), "no such file"),
        (("merge", pack, fused), "this model is fused for 'chalk'"),
        (("split", "chalk", fused), "this model is fused for 'chalk'"),
        (("split", "chalc", frozen), "did you mean 'chalk'"),
        (("split", "chalk", joint, "--weights", "ema"), "no ema weights"),
    ]
    for words, message in cases:
        ran = mdltool("model", *words, "--work", world.work, "--out", out)
        assert (ran.code, message in ran.err) == (1, True), ran.err
    own = mdltool("model", "split", "neon", joint, "--work", world.work, "--out", tmp_path / "j.safetensors").path
    smaller = mdltool("model", "rm", "neon", joint, "--work", world.work, "--out", tmp_path / "smaller").path
    best = ("merge", own, smaller, "--weights", "best")
    other = mdltool("model", *best, "--work", world.work, "--out", out)
    assert (other.code, "trained on another backbone" in other.err) == (1, True), other.err
    assert mdltool("model", "merge", own, smaller, "--work", world.work, "--out", tmp_path / "both").code == 0
    assert same(tensors(tmp_path / "both"), tensors(joint))
    assert not list(tmp_path.glob("x*"))


def test_a_domain_of_a_compressed_model_needs_its_factors(
    frozen: Path, without: Path, world: World, mdltool: Command, tmp_path: Path
) -> None:
    where = ("--work", world.work, "--out")
    small = mdltool("compress", frozen, "--rank", 0.5, *where, tmp_path / "small").path
    pack = mdltool("model", "split", "neon", small, *where, tmp_path / "neon.safetensors").path
    smaller = mdltool("model", "rm", "neon", small, *where, tmp_path / "smaller").path
    merged = mdltool("model", "merge", pack, smaller, *where, tmp_path / "merged").path
    assert same(tensors(merged), tensors(small))
    again = mdltool("model", "split", "neon", merged, *where, tmp_path / "again.safetensors").path
    assert again.read_bytes() == pack.read_bytes()
    ran = mdltool("model", "merge", pack, without, *where, tmp_path / "x")
    assert (ran.code, "made for another model (factors.stage1: " in ran.err) == (1, True), ran.err
    assert not list(tmp_path.glob("x*"))


def test_predict_on_several_domains_at_once(frozen: Path, world: World, mdltool: Command) -> None:
    videos = [next((world.videos / d / "val").glob("*/*.mp4")) for d in ("neon", "chalk", "chalk")]
    videos[2] = sorted((world.videos / "chalk" / "val").glob("*/*.mp4"))[-1]
    domains = ["neon", "chalk", "neon"]
    common = ("--views", "2x1", "--topk", 8, "--work", world.work, "--json")

    def read(*words: object) -> list[dict]:
        ran = mdltool("predict", frozen, *words, *common)
        assert ran.code == 0, ran.err
        return [json.loads(line) for line in ran.out.splitlines()]

    alone = [read(video, "--domain", d)[0] for video, d in zip(videos, domains, strict=True)]
    for batch in (1, 3, 32):
        words = [w for d in domains for w in ("--domain", d)]
        found = read(*videos, *words, "--batch", batch)
        assert [(f["video"], f["domain"]) for f in found] == [(f["video"], f["domain"]) for f in alone]
        for ours, theirs in zip(found, alone, strict=True):
            scores = {entry["label"]: entry["score"] for entry in theirs["top"]}
            assert {e["label"]: e["score"] for e in ours["top"]} == pytest.approx(scores, abs=1e-5)
    assert [f["domain"] for f in read(*videos, "--domain", "chalk")] == ["chalk"] * 3
    ran = mdltool("predict", frozen, *videos, "--domain", "neon", "--domain", "chalk", "--work", world.work)
    assert (ran.code, "2 domains were given for 3 videos" in ran.err) == (1, True)
    assert ran.out == ""
