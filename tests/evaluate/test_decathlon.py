"""The Visual Decathlon's score: spec residual_adapters 3.3 and 7 (4), and what `eval --decathlon` does with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mdltool.artifact import Artifact, begin, open_artifact
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.evaluate.decathlon import RA17, Baseline, Decathlon, headline, parse_added, read_baseline
from mdltool.lineage import trace
from mdltool.model import build_model
from mdltool.model_store import stored_tensors, write_description
from mdltool.published import Row, decathlon_of, tables, top1
from mdltool.recipe import load
from mdltool.report.build import Evaluated, decathlons
from mdltool.stages.plan import model_spec
from mdltool.train.checkpoint import save_tensors
from mdltool.types import LabelSpace
from tests.conftest import TINY, Ran, World

TEN = ["imagenet", "aircraft", "cifar100", "dped", "dtd", "gtsrb", "flowers", "omniglot", "svhn", "ucf101"]
# spec 3.3, each as it is printed there
EMAX = [80.26, 79.32, 35.76, 14.36, 88.94, 4.94, 37.18, 24.62, 6.90, 97.60]
SPEC = [3096.06, 3158.18, 3412.02, 2608.72, 2851.33, 3156.94, 3061.40, 3396.81, 2644.00, 2851.77]
ROWS = next(table for table in tables("residual_adapters") if table.table == "Table 1").rows


def test_the_baseline_is_the_specs() -> None:
    assert list(RA17.accuracy) == TEN
    assert [round(RA17.max_error(domain), 2) for domain in TEN] == EMAX
    assert (RA17.gamma, RA17.highest) == (2, 10_000)


@pytest.mark.parametrize(
    ("row", "spec"), zip(ROWS, SPEC, strict=True), ids=lambda value: getattr(value, "system", "")
)
def test_printed_scores_come_out_of_the_printed_accuracies(row: Row, spec: float) -> None:
    assert list(top1(row)) == TEN
    assert decathlon_of(row) == pytest.approx(spec, abs=0.005)
    assert isinstance(row.cells["decathlon_score"], int)
    assert abs(decathlon_of(row) - row.cells["decathlon_score"]) < 2.5, "accuracies are printed with two decimals"


def test_the_ends_of_the_scale() -> None:
    score = Decathlon().score
    assert score(RA17.accuracy)["score"] == 2500
    assert {entry["points"] for entry in score(RA17.accuracy)["domains"].values()} == {250}
    assert score(dict.fromkeys(TEN, 100.0))["score"] == 10_000
    assert score(dict.fromkeys(TEN, 0.0))["score"] == 0, "every largest error is below 100%"
    at_most = {domain: 100 - RA17.max_error(domain) for domain in TEN}
    assert score(at_most)["score"] == pytest.approx(0, abs=1e-9)
    assert score(at_most | {"svhn": 0.0})["domains"]["svhn"]["points"] == 0, (
        "an error above the largest counts as it"
    )


def test_gamma_and_points() -> None:
    own = Baseline("mine", {"a": 50.0, "b": 80.0}, gamma=1.0, points=10.0)
    found = Decathlon(own).score({"a": 75.0, "b": 80.0})  # errors 25 of 100, 20 of 40
    assert [entry["points"] for entry in found["domains"].values()] == pytest.approx([7.5, 5])
    assert found["highest"] == 20
    cubic = Baseline("mine", {"a": 50.0}, gamma=3.0)
    assert Decathlon(cubic).score({"a": 50.0})["score"] == 125


def test_a_subset_says_so_and_added_domains_complete_it() -> None:
    row = top1(ROWS[2])
    part = Decathlon().score({d: row[d] for d in TEN[1:]})
    assert part["missing"] == ["imagenet"]
    assert "over 9 of 10 domains, of at most 9000: not comparable" in headline(part)
    whole = Decathlon(added={"imagenet": row["imagenet"]}).score({d: row[d] for d in TEN[1:]})
    assert whole["missing"] == []
    assert whole["score"] == decathlon_of(ROWS[2])
    assert headline(whole) == "decathlon score 3412 of 10000, over all 10 domains"
    assert part["score"] == pytest.approx(whole["score"] - whole["domains"]["imagenet"]["points"])


@pytest.mark.parametrize(
    ("added", "measured", "message"),
    [
        ({}, ["aircarft"], "no domain 'aircarft'.*did you mean 'aircraft'.*--decathlon-baseline FILE"),
        ({"imagnet": 1.0}, [], "no domain 'imagnet'.*did you mean 'imagenet'"),
        ({"svhn": 1.0}, ["svhn"], "svhn is measured here"),
    ],
)
def test_domains_that_the_baseline_cannot_place(added: dict[str, float], measured: list[str], message: str) -> None:
    with pytest.raises(MdlError) as caught:
        Decathlon(added=added).check(measured, "here")
    assert_matches(message, caught.value)


def assert_matches(message: str, error: MdlError) -> None:
    assert re.search(message, str(error), re.DOTALL), str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 60.5', "not valid JSON"),
        ("[60.5]", "no mapping of domains"),
        ("{}", "no mapping of domains"),
        ('{"a": "60"}', "a: '60' is no accuracy in percent"),
        ('{"a": true, "b": 101, "c": NaN}', "a: True .*b: 101 .*c: nan "),
        ('{"a": 100}', "a: at 100% there is no error"),
        ('{"domains": {"a": 60}, "gama": 2}', "gama: unknown key; did you mean 'gamma'"),
        ('{"domains": {"a": 60}, "gamma": 0, "points": "x"}', "gamma: a number above 0; points: a number above 0"),
    ],
)
def test_bad_baselines_are_one_message(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(content)
    with pytest.raises(MdlError) as caught:
        read_baseline(path)
    assert_matches(message, caught.value)
    assert str(path) in str(caught.value)


def test_baselines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text('{"a": 60, "domains": 70.5}')
    assert read_baseline(path) == Baseline("b.json", {"a": 60.0, "domains": 70.5})
    path.write_text('{"domains": {"a": 60}, "gamma": 1, "points": 100}')
    assert read_baseline(path) == Baseline("b.json", {"a": 60.0}, 1.0, 100.0)
    with pytest.raises(MdlError, match="cannot be read"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize("word", ["imagenet", "imagenet=x", "=60", "imagenet=101", "imagenet=nan"])
def test_what_is_no_added_accuracy(word: str) -> None:
    with pytest.raises(MdlError, match="no DOMAIN=PERCENT"):
        parse_added([word])


def test_scores_of_a_file(mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    row = top1(ROWS[7])
    file = tmp_path / "svd.json"
    file.write_text(json.dumps(row))
    found = mdltool("eval", "--decathlon", "--scores", file, "--json").json
    assert found["score"] == decathlon_of(ROWS[7])
    shown = mdltool("eval", "--decathlon", "--scores", file).out
    assert "decathlon score 3397 of 10000" in shown
    assert "39.66" in shown, "the baseline's error of aircraft"
    file.write_text(json.dumps({d: row[d] for d in TEN[1:]}))
    added = ("--decathlon-add", f"imagenet={row['imagenet']}")
    assert mdltool("eval", "--decathlon", "--scores", file, *added, "--json").json["score"] == found["score"]


def test_scores_take_the_place_of_a_model(mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    ran = mdltool("eval", tmp_path, "--decathlon", "--scores", "x.json")
    assert ran.code == 1
    assert "leave out one or the other" in ran.err


@pytest.mark.parametrize(
    "words", [("--scores", "x.json"), ("--decathlon-add", "svhn=1"), ("--decathlon-baseline", "x")]
)
def test_its_options_want_decathlon(words: tuple[str, str], mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("eval", *words)
    assert ran.code == 1
    assert "add --decathlon" in ran.err


def untrained(world: World, path: Path) -> Path:
    """A model of chalk as it is made, which is enough to be scored."""
    recipe = load(str(world.work / "two.yaml"), TINY)
    recipe = recipe.model_copy(update={"domains": {"chalk": recipe.domains["chalk"]}})
    names = ShardIndex.open(open_artifact(world.shards("chalk", "val"))).classes
    spec = model_spec(recipe, {"chalk": len(names)})
    draft = begin(path, kind="model", stage="train", inputs=[], request={})
    assert not isinstance(draft, Artifact)
    save_tensors(draft.path / "weights" / "last.safetensors", stored_tensors(build_model(spec), own_backbone=True))
    write_description(
        draft.path, spec, recipe.model_dump(mode="json"), {"chalk": LabelSpace("single_label", names)}, True, {}
    )
    draft.commit({"domains": {"chalk": {}}})
    return path


def test_eval_and_report_have_the_score(world: World, mdltool: Callable[..., Ran], tmp_path: Path) -> None:
    model = untrained(world, tmp_path / "m")
    words = ("eval", model, "--views", "1x1", "--work", world.work, "--workers", 0, "--decathlon")
    ran = mdltool(*words, "--out", tmp_path / "e")
    assert ran.code == 1
    assert "no domain 'chalk'" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    baseline = tmp_path / "own.json"
    baseline.write_text('{"source": 60, "chalk": 5, "field": 70}')
    ran = mdltool(*words, "--decathlon-baseline", baseline, "--decathlon-add", "source=80", "--out", tmp_path / "e")
    assert ran.code == 0, ran.err
    metrics = json.loads((ran.path / "metrics.json").read_text())
    found, top = metrics["decathlon"], 100 * metrics["domains"]["chalk"]["metrics"]["top1"]
    assert (found["missing"], found["added"]) == (["field"], ["source"])
    assert found["domains"]["chalk"]["accuracy"] == top
    assert found["score"] == pytest.approx(1000 * (60 / 80) ** 2 + 1000 * ((190 - (100 - top)) / 190) ** 2)
    assert "over 2 of 3 domains" in ran.err
    evaluated = Evaluated(open_artifact(ran.path), None, trace(ran.path))
    assert "Visual Decathlon" in decathlons([evaluated])
    assert headline(found) in decathlons([evaluated])
    again = mdltool("eval", "--decathlon", "--scores", ran.path, "--decathlon-baseline", baseline, "--json").json
    assert again["score"] == pytest.approx(found["score"] - found["domains"]["source"]["points"])


def test_recipe_list_shows_ours_beside_the_printed_score(mdltool: Callable[..., Ran]) -> None:
    shown = mdltool("recipe", "list", "--published", "residual_adapters").out
    assert "Finetuning 3096, Series Res. adapt. 3158, Parallel Res. adapt. 3412" in shown
