"""Backbones pretrained with series adapters in them: what is stored, who may use it, and how domains begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from mdltool.artifact import Artifact, begin, open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel, build_model
from mdltool.model_spec import AdapterSpec, ModelSpec
from mdltool.model_store import backbone_with_weights, read_tensors, save_backbone
from mdltool.recipe import load
from mdltool.source_adapters import begin_as_source, check_source_adapters, save_source_adapters
from mdltool.stages.backbone import of_classes
from mdltool.stages.fitting import gather_data
from tests.conftest import Ran, World


def spec(form: str | None = "series", domains: tuple[str, ...] = ("a", "b"), **options: Any) -> ModelSpec:
    adapters = [AdapterSpec(form, "all", options)] if form else []
    return ModelSpec("resnet26_tiny", {}, 1, 32, dict.fromkeys(domains, 5), adapters, bn="per_domain", dropout=0.0)


def source_model(**options: Any) -> MultiDomainModel:
    """A network with series adapters whose norms are away from ones and zeros, in eval mode."""
    torch.manual_seed(0)
    own = spec("series", ("source",), **options)
    model = build_model(ModelSpec(**{**vars(own), "bn": "shared"}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def stored(model: MultiDomainModel, path: Path) -> Artifact:
    draft = begin(path, kind="backbone", stage="backbone pretrain", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    note = {"name": "resnet26_tiny", **save_source_adapters(draft.path, model, "source")}
    save_backbone(draft.path, model.backbone, note)
    return draft.commit({})


@pytest.mark.parametrize("pre_bn", [True, False])
def test_every_domain_begins_as_the_pretrained_network(pre_bn: bool, tmp_path: Path) -> None:
    source = source_model(pre_bn=pre_bn)
    artifact = stored(source, tmp_path / "b")
    bare = build_model(spec(None)).backbone.library_state()
    assert read_tensors(artifact.file("backbone.safetensors")).keys() == bare.keys(), (
        "adapters leave no trace in it"
    )
    about = artifact.load_json("backbone.json")
    assert [entry["type"] for entry in about["adapters"]] == ["series"]
    # a sixteenth of the channels' products, a quarter of the channels (spec 3.1)
    assert about["adapter_parameters"] == 689_152 // 16 + (7_232 // 4 if pre_bn else 0)
    model = build_model(spec(pre_bn=pre_bn), backbone_with_weights(spec(), artifact))
    x = torch.randn(2, 3, 1, 32, 32)
    expected = source.features(x, "source")
    assert not torch.allclose(model.eval().features(x, "a"), expected, atol=0.1)
    check_source_adapters(model.spec, artifact, "copy")
    begin_as_source(model, artifact, "copy", ["a", "b"])
    for domain in ("a", "b"):
        torch.testing.assert_close(model.features(x, domain), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "other", [spec(None), spec("parallel"), spec(pre_bn=False), spec(placement="late"), spec(stem="never")]
)
def test_other_models_are_refused_and_may_ignore_the_adapters(other: ModelSpec, tmp_path: Path) -> None:
    artifact = stored(source_model(), tmp_path / "b")
    with pytest.raises(MdlError) as caught:
        check_source_adapters(other, artifact, "copy")
    for part in (
        "pretrained with series adapters in it, at 25 sites",
        "residual_series",
        "backbone.adapters=ignore",
    ):
        assert part in str(caught.value)
    check_source_adapters(other, artifact, "ignore")
    model = build_model(other)
    before = {key: value.clone() for key, value in model.tensors().items()}
    begin_as_source(model, artifact, "ignore", ["a"])
    assert all(torch.equal(before[key], value) for key, value in model.tensors().items())


def test_the_same_shapes_of_another_function_are_refused(tmp_path: Path) -> None:
    def tokens(adapter: str, **options: Any) -> ModelSpec:
        return ModelSpec("clip_vit_tiny", {}, 4, 32, {"a": 3}, [AdapterSpec(adapter, "all", options)], bn="frozen")

    own = build_model(tokens("mst", r=4, fusion="softmax"))
    draft = begin(tmp_path / "b", kind="backbone", stage="backbone pretrain", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    save_backbone(draft.path, own.backbone, {"name": "clip_vit_tiny", **save_source_adapters(draft.path, own, "a")})
    artifact = draft.commit({})
    check_source_adapters(tokens("mst", r=4, fusion="softmax"), artifact, "copy")
    for other in (tokens("mst", r=4), tokens("mst", r=4, fusion="softmax", act="gelu_down")):
        assert own.tensors().keys() == build_model(other).tensors().keys()
        with pytest.raises(MdlError, match="not the same ones"):
            check_source_adapters(other, artifact, "copy")


def test_what_only_training_uses_may_differ(tmp_path: Path) -> None:
    artifact = stored(source_model(), tmp_path / "b")
    check_source_adapters(spec(init="zero", dropout="01"), artifact, "copy")


TINY = {
    "backbone": {"name": "resnet26_tiny", "weights": "scratch"},
    "data": {"frames": 1, "crop": 32, "sampling": {"clip_seconds": 1.0}, "augment": {"short_side": [32, 36]}},
    "views": {"grid": "1x1", "short_side": 32},
}


def recipe_file(
    path: Path, domains: dict[str, Any], adapters: list[Any], regime: str, bn: str, weights: str
) -> Path:
    content = {
        **TINY,
        "name": path.stem,
        "about": "a test",
        "backbone": {**TINY["backbone"], "weights": weights},
        "domains": domains,
        "adapters": adapters,
        # a rate so small that nothing moves, but by what is copied
        "train": {"steps": [{"regime": regime, "updates": 1, "optimizer": {"lr": 1e-30}}], "bn": bn},
        "data": {**TINY["data"], "batch": 4},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_from_pretrain_to_train_and_add_domain(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    source = recipe_file(tmp_path / "source.yaml", {"source": {}}, [], "joint", "shared", "scratch")
    data = ("--data", f"chalk={world.shards('chalk', 'train')}", "--workers", 0, "--work", tmp_path)
    pretrain = ("backbone", "pretrain", "--recipe", source, *data)
    ran = mdltool(*pretrain, "--adapters", "series", "--classes", 3)
    artifact = open_artifact(ran.path)
    assert artifact.name == "resnet26_tiny-chalk-series-3classes"
    assert artifact.summary["adapters"] == "series at 25 sites"
    assert (artifact.summary["classes"], artifact.summary["parameters"]) == (
        3,
        (5_806_944 - 864) // 16 + 216 + 7_744 // 4,
    )
    assert "series at 25 sites" in mdltool("inspect", ran.path).out
    names = ShardIndex.open(open_artifact(world.shards("chalk", "train"))).classes
    kept = artifact.load_json("backbone.json")["classes"]
    assert [name for name in names if name in kept] == kept
    classifier = read_tensors(artifact.file("backbone.safetensors"))
    assert classifier["fc.weight"].shape == (3, 64)

    file = recipe_file(tmp_path / "own.yaml", {"chalk": {}}, [{"type": "series"}], "frozen", "per_domain", "chalk")
    ran = mdltool("train", "--recipe", file, *data, "--backbone", artifact.path)
    assert "adapters begin as those that the backbone was pretrained with, at 25 sites" in ran.err
    adapters = read_tensors(artifact.file("adapters.safetensors"))
    matrices = {key: value for key, value in adapters.items() if key.endswith("matrix.weight")}
    assert len(matrices) == 25
    weights = read_tensors(ran.path / "weights" / "last.safetensors")
    assert all(torch.equal(weights[f"chalk/{key}"], value) for key, value in matrices.items())
    more = ("--data", f"neon={world.shards('neon', 'train')}", "--workers", 0, "--work", tmp_path)
    added = mdltool("add-domain", ran.path, *more, "--out", tmp_path / "added").path
    weights = read_tensors(added / "weights" / "last.safetensors")
    assert all(torch.equal(weights[f"neon/{key}"], value) for key, value in matrices.items())

    refused = recipe_file(tmp_path / "no.yaml", {"chalk": {}}, [{"type": "parallel"}], "frozen", "per_domain", "x")
    ran = mdltool("train", "--recipe", refused, *data, "--backbone", artifact.path, "--out", tmp_path / "no")
    assert ran.code == 1
    assert "pretrained with series adapters" in ran.err
    assert not (tmp_path / "no.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapters", "parallel"), "none or series"),
        (("--set", "adapters=[{type: parallel}]"), "series adapters or none"),
        (("--adapters", "series", "--set", "train.steps.0.regime=full"), "pretrained together"),
        (("--set", "train.bn=per_domain"), "the backbone's own BatchNorms"),
        (("--classes", "9"), "there are 8 classes, not 9"),
        (("--classes", "1"), "from 2 to 8"),
    ],
)
def test_pretrain_refuses(
    words: tuple[str, ...], message: str, world: World, mdltool: Callable[..., Ran], tmp_path: Path
) -> None:
    data = ("--data", f"chalk={world.shards('chalk', 'train')}", "--work", tmp_path)
    ran = mdltool("backbone", "pretrain", *data, *words)
    assert ran.code == 1
    assert message in ran.err.replace("pretrained together", "pretrained together")
    assert list(tmp_path.iterdir()) == []


def test_classes_are_nested_and_numbered_anew(world: World) -> None:
    recipe = load(str(world.work / "two.yaml"))
    shards = [open_artifact(world.shards(d, s)) for d in ("chalk", "neon") for s in ("train", "val")]
    whole = gather_data(recipe, shards)["chalk"]
    sets = {}
    for count in (2, 5, 8):
        part = of_classes(whole, count, seed=1)
        sets[count] = set(part.train_index.classes)
        assert part.val_index is not None
        for index, full in ((part.train_index, whole.train_index), (part.val_index, whole.val_index)):
            assert full is not None
            named = {key: full.classes[label] for key, label in zip(full.keys, full.labels, strict=True)}
            assert index.classes == tuple(name for name in full.classes if name in sets[count])
            assert len(index) == sum(name in sets[count] for name in named.values())
            assert all(
                index.classes[label] == named[key] for key, label in zip(index.keys, index.labels, strict=True)
            )
            assert json.loads(index.read(0)["json"])["key"] == index.keys[0], "clips are read where they lie"
    assert sets[2] < sets[5] < sets[8]
    assert len(sets[2]) == 2
    other = [set(of_classes(whole, 5, seed=seed).train_index.classes) for seed in range(2, 6)]
    assert any(chosen != sets[5] for chosen in other), "the seed chooses"
    assert np.array_equal(of_classes(whole, 8, 1).train_index.labels, whole.train_index.labels)
