"""fuse and fuse --undo: whatever reads a model reads a fused one, and undo gives back the bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from torch import nn

from mdltool.adapters.domain_norm import BATCH_NORMS
from mdltool.artifact import Artifact, begin, open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.files import sha256_file, write_text
from mdltool.model import build_model
from mdltool.model_store import (
    load_model,
    read_tensors,
    save_backbone,
    seeded,
    stored_tensors,
    write_description,
)
from mdltool.recipe import load
from mdltool.stages import fuse
from mdltool.stages.plan import model_spec
from mdltool.train.checkpoint import save_tensors
from mdltool.types import LabelSpace
from tests.conftest import TINY, Ran, World

FAST = ("train.steps.0.regime=frozen", "backbone.weights=scratch")
CLASSES = {"chalk": ("x", "y", "z"), "neon": ("u", "v"), "field": ("p", "q", "r", "s")}


def stored(
    out: Path,
    adapters: str,
    *more: str,
    own: bool = True,
    classes: dict[str, tuple[str, ...]] | None = None,
) -> Artifact:
    """A model as `train` leaves it, last and best weights, with tensors that are no start's."""
    classes = classes or CLASSES
    domains = json.dumps({name: {"task": "single_label"} for name in classes})
    recipe = load("tiny_demo", [*TINY, *FAST, f"domains={domains}", f"adapters={adapters}", *more])
    spec = model_spec(recipe, {name: len(names) for name, names in classes.items()})
    seeded(1)
    inputs = []
    model = build_model(spec)
    randomise(model)
    if not own:
        draft = begin(out.parent / "backbone", kind="backbone", stage="backbone import", inputs=[], request={})
        assert not isinstance(draft, Artifact)
        bare = build_model(replace(spec, adapters=[], bn="frozen"))
        state = model.tensors()
        bare.load_tensors({key: state.get(key, value) for key, value in bare.tensors().items()}, "test")
        save_backbone(draft.path, bare.backbone, {"name": spec.backbone})
        inputs.append(draft.commit({}).as_input("backbone"))
    draft = begin(out, kind="model", stage="train", inputs=inputs, request={})
    assert not isinstance(draft, Artifact)
    for weights in ("last", "best"):
        save_tensors(draft.path / "weights" / f"{weights}.safetensors", stored_tensors(model, own))
        for head in model.heads.parameters():
            nn.init.normal_(head)
    content = recipe.model_dump(mode="json")
    spaces = {domain: LabelSpace("single_label", names) for domain, names in classes.items()}
    write_description(draft.path, spec, content, spaces, own, model.parameter_counts())
    write_text(draft.path / "metrics.jsonl", "")
    summary = {"recipe": recipe.name, "domains": {name: {"classes": len(c)} for name, c in classes.items()}}
    return draft.commit(summary, volatile=("metrics.jsonl",))


def randomise(model: Any) -> None:
    for site in model.sites.values():
        for name, parameter in site.adapters.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.1)
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    for norm in norms + [own for wrapper in model.norms.values() for own in wrapper.statistics.values()]:
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.1)
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)


def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(4))


def off(model: Artifact, other: Artifact, domain: str, weights: str = "last") -> float:
    """How far two models' logits are apart, relative to the largest."""
    with torch.no_grad():
        expected, found = (load_model(a, weights)(clips(), domain) for a in (model, other))
    return float((found - expected).abs().max() / expected.abs().max())


def hashes(artifact: Artifact) -> dict[str, str]:
    """What is no time of day."""
    return {
        name: sha256_file(artifact.file(name))
        for name in artifact.files
        if not artifact.files[name].get("volatile") and not name.startswith("original/")
    }


PARALLEL = "[{type: parallel}]"
SERIES = "[{type: series}]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return stored(tmp_path_factory.mktemp("fuse") / "three", SERIES, "train.bn=per_domain")


@pytest.mark.parametrize("fold_bn", [False, True])
def test_a_fused_model_is_read_as_any_other(model: Artifact, tmp_path: Path, fold_bn: bool) -> None:
    fused = fuse.run(model, "neon", tmp_path / "fused", work=tmp_path, fold_bn=fold_bn)
    assert fused.verify() == []
    content = fused.load_json("model.json")
    assert (list(content["domains"]), content["own_backbone"]) == (["neon"], True)
    assert list(content["recipe"]["domains"]) == ["neon"]
    assert fused.summary["fused"] == "domain neon"
    assert set(fused.summary["difference"]) == {"last", "best"}
    for weights in ("last", "best"):
        assert off(model, fused, "neon", weights) < 1e-5
    loaded = load_model(fused)
    assert not loaded.sites
    assert content["parameters"]["adapters"] == content["parameters"]["per_domain"]["neon"]["adapters"] == 0
    assert content["parameters"]["total"] == sum(parameter.numel() for parameter in loaded.parameters())


def test_weights_files_say_what_was_folded_into_what(model: Artifact, tmp_path: Path) -> None:
    found = {}
    for domain in ("chalk", "neon"):
        fused = fuse.run(model, domain, tmp_path / domain, work=tmp_path)
        for weights in ("last", "best"):
            with safe_open(fused.file(f"weights/{weights}.safetensors"), "pt") as file:
                found[domain, weights] = json.loads(file.metadata()["fused"])
    assert [entry["domain"] for entry in found.values()] == ["chalk", "chalk", "neon", "neon"]
    assert len({entry["base"] for entry in found.values()}) == 1
    # `best` differs in its heads alone
    assert found["neon", "last"] == found["neon", "best"]
    assert found["neon", "last"]["adapters"] != found["chalk", "last"]["adapters"]


def test_undo_gives_back_the_bytes_of_all_domains(model: Artifact, tmp_path: Path) -> None:
    """Property 2; what is folded after undoing is what would have been without."""
    fused = fuse.run(model, "chalk", tmp_path / "fused", work=tmp_path, fold_bn=True)
    undone = fuse.undo(fused, tmp_path / "undone")
    assert hashes(undone) == hashes(model)
    assert set(undone.load_json("model.json")["domains"]) == set(CLASSES)
    again = fuse.run(undone, "neon", tmp_path / "again", work=tmp_path)
    direct = fuse.run(model, "neon", tmp_path / "direct", work=tmp_path)
    assert hashes(again) == hashes(direct)


@pytest.mark.parametrize("adapters", [PARALLEL, SERIES])
@pytest.mark.parametrize("keep", [True, False])
def test_a_backbone_named_by_its_digest_is_named_again(tmp_path: Path, adapters: str, keep: bool) -> None:
    source = stored(tmp_path / "model", adapters, "train.bn=per_domain", own=False)
    fused = fuse.run(source, "field", tmp_path / "fused", work=tmp_path, keep_original=keep)
    assert fused.load_json("model.json")["own_backbone"] is True
    assert off(source, fused, "field") < 1e-5
    undone = fuse.undo(fused, tmp_path / "undone")
    assert off(source, undone, "field") == 0
    if keep:
        assert hashes(undone) == hashes(source)
    else:
        before = read_tensors(source.file("weights/best.safetensors"))
        after = read_tensors(undone.file("weights/best.safetensors"))
        assert set(after) == {key for key in before if key.startswith("field/")}
        assert all(torch.equal(after[key], before[key]) for key in after)
    assert off(source, fuse.run(undone, "field", tmp_path / "again", work=tmp_path), "field") < 1e-5


@pytest.mark.parametrize(
    ("adapters", "more"),
    [
        (PARALLEL, ["train.bn=per_domain"]),
        (PARALLEL, ["train.bn=shared"]),
        ("[{type: lora, targets: [q, v]}]", ["backbone.name=swin3d_tiny", "data.frames=8"]),
    ],
    ids=["parallel", "shared statistics", "lora"],
)
def test_without_the_original_the_domain_is_got_by_subtraction(
    tmp_path: Path, adapters: str, more: list[str]
) -> None:
    source = stored(tmp_path / "model", adapters, *more)
    fused = fuse.run(source, "neon", tmp_path / "fused", work=tmp_path, keep_original=False)
    undone = fuse.undo(fused, tmp_path / "undone")
    assert list(undone.load_json("model.json")["domains"]) == ["neon"]
    for weights in ("last", "best"):
        before = read_tensors(source.file(f"weights/{weights}.safetensors"))
        after = read_tensors(undone.file(f"weights/{weights}.safetensors"))
        assert set(after) == {key for key in before if not key.startswith(("chalk/", "field/"))}
        for key, tensor in after.items():
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-6)
    assert off(source, undone, "neon") < 1e-5
    size = sum(entry["bytes"] for name, entry in fused.files.items() if name.startswith("original/"))
    assert size < sum(entry["bytes"] for entry in source.files.values())


@pytest.mark.parametrize("adapters", [PARALLEL, SERIES])
def test_what_cannot_be_subtracted_is_not_undone(tmp_path: Path, adapters: str) -> None:
    source = stored(tmp_path / "model", adapters, "train.bn=per_domain")
    fold_bn = adapters == PARALLEL
    fused = fuse.run(source, "neon", tmp_path / "fused", work=tmp_path, fold_bn=fold_bn, keep_original=False)
    assert not [name for name in fused.files if name.startswith("original/")]
    assert fused.summary["undo"] == "no"
    with pytest.raises(MdlError, match="cannot be subtracted") as refusal:
        fuse.undo(fused, tmp_path / "undone")
    assert str(source.path) in str(refusal.value)
    assert not (tmp_path / "undone.partial").exists()


def test_changed_files_are_not_given_back(model: Artifact, tmp_path: Path) -> None:
    fused = fuse.run(model, "neon", tmp_path / "fused", work=tmp_path)
    kept = fused.path / "original" / "weights" / "last.safetensors"
    assert isinstance(kept, Path)
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(MdlError, match="were changed"):
        fuse.undo(fused, tmp_path / "undone")
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_what_cannot_be_folded_leaves_nothing_behind(tmp_path: Path) -> None:
    mixed = "[{type: lora}, {type: mhva, heads: 2, r: 4}]"
    source = stored(tmp_path / "model", mixed, "backbone.name=swin3d_tiny", "data.frames=8")
    with pytest.raises(MdlError, match=r"mhva at block1\.mlp.*ReLU"):
        fuse.run(source, "neon", tmp_path / "fused", work=tmp_path)
    plain = stored(tmp_path / "plain", "[]", "train.bn=shared")
    with pytest.raises(MdlError, match="nothing to fuse"):
        fuse.run(plain, "neon", tmp_path / "fused", work=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plain"]
    folded = fuse.run(plain, "neon", tmp_path / "fused", work=tmp_path, fold_bn=True)
    assert off(plain, folded, "neon") < 1e-5


def test_logits_that_differ_are_not_written(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "REACH", 0.0)
    with pytest.raises(MdlError, match="logits differ"):
        fuse.run(model, "neon", tmp_path / "fused", work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fused_model_is_refused_where_adapters_are_needed(
    model: Artifact, mdltool: Callable[..., Ran], world: World, tmp_path: Path
) -> None:
    fused = mdltool("fuse", model.path, "--domain", "neon", "--out", tmp_path / "fused").path
    new = ("--data", f"chalk={world.shards('chalk', 'train')}")
    for words in (
        ("fuse", fused, "--domain", "neon"),
        ("model", "rm", "neon", fused),
        ("add-domain", fused, *new),
    ):
        ran = mdltool(*words, "--work", tmp_path, "--out", tmp_path / "x")
        assert (ran.code, "is fused for 'neon'" in ran.err) == (1, True), words
    ran = mdltool("fuse", model.path, "--undo", "--out", tmp_path / "x")
    assert (ran.code, "is not fused" in ran.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_the_command_line(
    model: Artifact, mdltool: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--work", tmp_path)
    ran = mdltool("fuse", model.path, "--domain", "neom", *where)
    assert (ran.code, "did you mean 'neon'" in ran.err) == (1, True)
    ran = mdltool("fuse", model.path, *where)
    assert (ran.code, "--domain chalk or neon or field" in ran.err) == (1, True)
    ran = mdltool("fuse", model.path, "--undo", "--domain", "neon", *where)
    assert (ran.code, "--undo takes the model alone" in ran.err) == (1, True)
    found = mdltool("fuse", model.path, "--domain", "neon", *where, "--json").json
    assert Path(found["artifact"]) == tmp_path / "model" / "three-fused-neon"
    assert (found["kind"], found["summary"]["fused"]) == ("model", "domain neon")
    assert "domain neon" in mdltool("inspect", found["artifact"], "--verify").out
    undone = mdltool("fuse", found["artifact"], "--undo", *where).path
    assert undone == tmp_path / "model" / "three-fused-neon-undone"
    assert hashes(open_artifact(undone)) == hashes(model)
    read, write = os.pipe()
    os.write(write, f"{model.path}\n".encode())
    os.close(write)
    with open(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        piped = mdltool("fuse", "--domain", "chalk", *where).path
    assert piped == tmp_path / "model" / "three-fused-chalk"


def test_eval_report_and_predict_read_it(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    """With the scores of the model that it was made from."""
    names = {d: ShardIndex.open(open_artifact(world.shards(d, "val"))).classes for d in ("chalk", "neon")}
    source = stored(tmp_path / "two", PARALLEL, "train.bn=per_domain", classes=names)
    fused = mdltool("fuse", source.path, "--domain", "neon", "--work", tmp_path).path
    data = ("--data", f"neon={world.shards('neon', 'val')}", "--views", "1x1", "--work", tmp_path)
    evals = [
        mdltool("eval", path, *data, "--out", tmp_path / "e" / path.name).path for path in (source.path, fused)
    ]
    before, after = (pq.read_table(path / "scores.parquet").to_pydict() for path in evals)
    assert len(before["key"]) > 0
    for key, values in before.items():
        assert after[key] == pytest.approx(values, abs=1e-5) if key.startswith("score") else after[key] == values
    page = mdltool("report", *evals, "--out", tmp_path / "report").path / "report.html"
    assert fused.name in page.read_text()
    video = next((world.videos / "neon" / "val").rglob("*.mp4"))
    words = ("predict", source.path, video, "--domain", "neon", "--views", "1x1", "--json")
    expected, found = (
        mdltool(*words).json["top"],
        mdltool("predict", fused, video, "--views", "1x1", "--json").json["top"],
    )
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
