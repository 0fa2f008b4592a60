"""Recipes: what ships is valid, and faults are reported together with their paths and nearest keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mdltool.errors import MdlError
from mdltool.recipe import ALIASES, find, load, rename_domain, shipped, validate


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_begin_with_their_commands(name: str) -> None:
    recipe, text = load(name), find(name).read_text()
    assert recipe.name == name
    first, *comments = text.splitlines()[:4]
    assert first.startswith("# mdltool ")
    assert any("Stands for" in line or "No row of a paper" in line for line in comments)
    if name.startswith("omi_"):
        assert recipe.published is not None
        assert set(recipe.published.top1) == set(recipe.domains)


def test_aliases_stand_for_shipped_recipes() -> None:
    assert ALIASES["omi_x3dm_all"] == "omi_x3dm_2plus1d_all"
    assert all(load(alias).name == name for alias, name in ALIASES.items())


def content() -> dict[str, Any]:
    return yaml.safe_load(find("tiny_demo").read_text())


def faults(changed: dict[str, Any]) -> str:
    with pytest.raises(MdlError) as caught:
        validate(changed, "test.yaml")
    return str(caught.value)


def test_all_faults_are_reported_together_with_paths_and_nearest_keys() -> None:
    bad = content()
    bad["train"]["sed"] = 1
    bad["train"]["steps"][0]["optimiser"] = bad["train"]["steps"][0].pop("optimizer")
    bad["adapters"][0]["type"] = "2plus1"
    bad["backbone"]["name"] = "x3d_tny"
    bad["domains"]["Chalk Two"] = {"task": "single_lable"}
    text = faults(bad)
    for part in (
        "7 faults",
        "train.sed: unknown key; did you mean 'seed'?",
        "train.steps.0.optimiser: unknown key; did you mean 'optimizer'?",
        "train.steps.0.optimizer: missing",
        "adapters.0.type: there is no adapter '2plus1'; did you mean '2plus1d'?",
        "backbone.name: there is no backbone 'x3d_tny'; did you mean 'x3d_tiny'?",
        "domains.Chalk Two: a domain's name",
        "did you mean 'single_label'?",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("adapters.0.kt", 2, "adapters.0.kt: a kernel size must be odd"),
        ("adapters.0.lnn", "none", "adapters.0.lnn: unknown key; did you mean 'ln'?"),
        ("backbone.poool", "fixed", "backbone.poool: unknown key; did you mean 'pool'?"),
        ("domains.shared", {}, "domains.shared: a domain's name"),
        ("data.batch", {"chalk": 4}, "data.batch.neon: missing"),
        ("data.augment.short_side", [64, 56], "the lower bound is above"),
        ("data.crop", 100, "its lower bound is below data.crop"),
        ("views.grid", "10x2", "views.grid"),
        ("train.steps.0.regime", "jont", "train.steps.0.regime"),
        ("train.steps", [], "train.steps"),
        ("train.steps.0.epochs", 2, "train.steps.0: give either updates or epochs\n"),
        ("data.frames", 0, "data.frames"),
        ("data.fraction", 0, "data.fraction"),
        ("domains.chalk.crop", 61, "domains.chalk.crop: crops of 61 are above the shorter side of views (60), val"),
        ("domains.chalk.short_side", 40, "domains.chalk.short_side: crops of 56 are above the shorter side"),
        ("domains.chalk.normalize", {"mean": [1, 1, 2], "std": [1, 1, 1]}, "domains.chalk.normalize.mean.2"),
        ("domains.chalk.augment", "centre", "domains.chalk.augment"),
        ("domains.chalk.task", "regresion", "there is no task 'regresion'; did you mean 'regression'?"),
    ],
)
def test_single_faults(path: str, value: Any, message: str) -> None:
    bad = content()
    node: Any = bad
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    assert message in faults(bad)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("tiny_demo", ["losses.norm=dataset"], "losses.norm: this is of mixed batches"),
        ("tiny_multitrain", ["train.domain_order=shuffled"], "train.domain_order: a mixed batch has every domain"),
        ("tiny_multitrain", ["losses.weights={mode: fixed, half: false}"], "losses.weights.half: this is of mode"),
        (
            "tiny_multitrain",
            ["losses.weights={mode: fixed, sigma_init: uniform}"],
            "losses.weights.sigma_init: this is of mode: uncertainty",
        ),
        ("tiny_multitrain", ["heads.reuse_pretrained=true"], "heads.reuse_pretrained: a pretrained classifier"),
        ("tiny_multihead", ["train.bn=frozen", "train.sync_bn=true"], "train.sync_bn: every BatchNorm of the"),
        ("tiny_clip_st", ["train.sync_bn=true"], "no adapter that trains has one"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(MdlError, match=message):
        load(name, overrides)


def test_defaults_may_be_stated() -> None:
    """The recipe of a finished model has every key."""
    changes = ("losses.weights={mode: fixed, half: true}", "train.domain_order=sequential")
    for recipe in (
        load("tiny_demo"),
        load("tiny_multihead", ["train.bn=frozen"]),
        load("tiny_multitrain", changes),
    ):
        assert validate(recipe.model_dump(mode="json"), recipe.name) == recipe


def test_a_subset_is_a_share_or_a_number_of_each_class() -> None:
    bad = content()
    bad["data"] |= {"fraction": 0.5, "per_class": 3}
    assert "give either fraction or per_class" in faults(bad)
    bad["data"]["fraction"] = 1.0
    bad["domains"]["neon"]["task"] = "multi_label"
    assert "data.per_class: the clips of neon, of multi_label, are of no single class" in faults(bad)


def test_sides_are_swapped_of_single_labels_that_are_flipped() -> None:
    bad = content()
    bad["domains"]["neon"] |= {"swap_sides": True, "task": "multi_label"}
    assert "domains.neon.swap_sides: this is of single labels" in faults(bad)
    bad["domains"]["neon"] |= {"task": "single_label", "flip": 0.0}
    assert "domains.neon.swap_sides: no clip of it is flipped" in faults(bad)


def test_clips_of_mixed_batches_are_alike() -> None:
    bad = content()
    bad["adapters"], bad["train"]["batches"], bad["train"]["bn"] = [], "mixed", "shared"
    bad["domains"]["chalk"]["crop"] = 48
    bad["domains"]["neon"]["normalize"] = {"mean": [0.5] * 3, "std": [0.2] * 3}
    text = faults(bad)
    assert "domains.chalk.crop: the clips of mixed batches are all alike" in text
    assert "domains.neon.normalize: the clips of mixed batches are all alike" in text


def test_overrides_reach_lists_and_new_keys() -> None:
    sets = ["train.steps.0.updates=7", "domains.chalk.weight=2.5", "adapters.0.sites=[stage2]"]
    recipe = load("tiny_demo", sets)
    assert recipe.train.steps[0].updates == 7
    assert recipe.domains["chalk"].weight == 2.5
    assert recipe.adapters[0].sites == ["stage2"]
    kind = recipe.adapters[0].type
    assert load("tiny_demo", [*sets[:2], f"adapters.{kind}.sites=[stage2]"]) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "no override"),
        ("train.steps.4.updates=3", "no index of a list"),
        ("name.x=3", "below a plain value"),
        ("train.sed=3", "did you mean 'seed'"),
        ("name=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    with pytest.raises(MdlError, match=message):
        load("tiny_demo", [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(MdlError, match="no such recipe file"):
        load(str(tmp_path / "none.yaml"))
    for text, message in (("a: [", "not valid YAML"), ("- 1", "mapping")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(MdlError, match=message):
            load(str(tmp_path / "r.yaml"))
    with pytest.raises(MdlError, match="no recipe 'tiny_dmo'") as caught:
        load("tiny_dmo")
    assert "tiny_demo" in str(caught.value)


def test_a_recipe_of_one_domain_takes_the_name_of_the_data() -> None:
    recipe = rename_domain(load("tiny_pretrain"), "field")
    assert list(recipe.domains) == ["field"]
    assert recipe.train == load("tiny_pretrain").train
    with pytest.raises(MdlError, match="several domains"):
        rename_domain(load("tiny_demo"), "field")


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("residual_") and len(load(n).domains) == 9])
def test_decathlon_recipes_have_each_domains_crop_and_pixel_statistics(name: str) -> None:
    recipe = load(name)
    for domain, part in recipe.domains.items():
        still = domain in ("gtsrb", "omniglot", "svhn")  # spec residual_adapters 5
        assert (recipe.crop_of(domain), part.augment) == ((72, "none") if still else (64, "recipe"))
        assert part.normalize is not None
