"""The papers' printed tables: complete, valid, and one with what the recipes say of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mdltool.errors import MdlError
from mdltool.published import PrintedTable, Row, digits, papers, read, tables, text, with_printed
from mdltool.published import load as load_paper
from mdltool.recipe import find, load, shipped
from tests.conftest import Ran

# counted in the papers
ROWS = {
    "omi_mdl": {
        "Table 1": 3,
        "Table 2": 2,
        "Table 3": 6,
        "Table 4(a)": 10,
        "Table 4(b)": 7,
        "Table 5(a)": 10,
        "Table 5(b)": 7,
    },
    "multitrain": {
        "Table 1": 16,
        "Table 2": 9,
        "Table 3": 7,
        "Table 4": 4,
        "Supplementary Table 1": 2,
        "Supplementary Table 2": 6,
        "Supplementary Table 3": 2,
        "Supplementary Table 4": 12,
    },
    "cm3t": {"Table 1": 10, "Table 2": 5, "Table 3": 5, "Table 4": 12, "Table 5": 5, "Table 6": 3},
    "mst_adapter": {
        "Table 1": 15,
        "Table 2": 16,
        "Table 3": 0,  # a picture
        "Table 4": 2,
        "Table 5": 5,
        "Table 6": 6,
    },
    "residual_adapters": {"Table 1": 10, "Section 4": 4},
}

# recipes whose row is no legible row of a table: the picture of Table 3, ST-Adapter at 8 frames on SSv2, and the
# configuration that MultiTrain's authors released
TEXTS = ("backbone", "pretrain", "training_data", "views")  # columns without figures
NO_ROW = {
    "multitrain_release",
    *(f"mst_{data}_b16_8_{part}" for data in ("k400", "ssv2") for part in ("nopw", "avg", "avg_nopw")),
    "mst_ssv2_b16_8_stadapter",
    "residual_pretrain_series",  # of whose accuracy nothing is printed, nor of most points of Figure 4
    *(name for name in shipped() if name.startswith(("residual_transfer_", "residual_width"))),
}


def rows() -> Iterator[tuple[PrintedTable, Row]]:
    for paper in papers():
        for table in tables(paper):
            yield from ((table, row) for row in table.rows)


def published(recipe: str) -> dict[str, Any]:
    return yaml.safe_load(find(recipe).read_text()).get("published") or {}


def named() -> dict[str, list[tuple[PrintedTable, Row]]]:
    """Recipe -> the printed rows that it stands for."""
    found: dict[str, list[tuple[PrintedTable, Row]]] = {}
    for table, row in rows():
        for recipe in row.recipes:
            found.setdefault(recipe, []).append((table, row))
    return found


NAMED = named()


def test_every_printed_row_ships() -> None:
    assert {paper: {t.table: len(t.rows) for t in tables(paper)} for paper in papers()} == ROWS


def test_no_row_is_without_a_number_and_no_recipe_is_taken_for_a_table() -> None:
    assert all(row.cells for _, row in rows())
    assert not any(name.startswith("published") for name in shipped())


def test_every_recipe_of_a_paper_stands_for_a_printed_row_and_every_named_recipe_ships() -> None:
    assert set(NAMED) <= set(shipped())
    of_papers = {name for name in shipped() if published(name).get("paper") in papers()}
    missing = of_papers - set(NAMED) - NO_ROW
    assert not missing, f"name these in recipes/published/<paper>.yaml, at their rows: {sorted(missing)}"


def by_column(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `published` under the names of the printed columns."""
    found = {f"{domain}.top1": value for domain, value in content.get("top1", {}).items()}
    found |= {f"parameters_m.{part}": value for part, value in content.get("parameters_m", {}).items()}
    found |= {f"{part}_percent": value for part, value in content.get("percent", {}).items()}
    for metric, values in content.get("scores", {}).items():
        found |= {metric if metric == "epochs" else f"{domain}.{metric}": v for domain, v in values.items()}
    return found | content.get("overall", {}) | {key: content[key] for key in ("gflops", "size") if key in content}


@pytest.mark.parametrize("recipe", NAMED)
def test_recipes_have_the_cells_of_their_printed_rows_and_state_none_themselves(recipe: str) -> None:
    loaded, own = load(recipe), published(recipe)
    assert loaded.published is not None
    domains = {*loaded.domains, *loaded.published.others}
    expected: dict[str, Any] = {}
    wrong: dict[str, Any] = {}
    for table, row in NAMED[recipe]:
        for column, cell in row.cells.items():
            group = column.rpartition(".")[0]
            if column in TEXTS or column in loaded.published.omit or group not in {"", "parameters_m", *domains}:
                continue
            assert expected.setdefault(column, cell) == cell, (table.table, row.system, column)
            if column in row.corrected:
                wrong[column.removeprefix("parameters_m.")] = row.corrected[column]
    stated = by_column(own)
    assert not stated.keys() & expected.keys(), "this stands at the printed row already"
    assert by_column(loaded.published.model_dump(exclude_unset=True)) == expected | stated
    assert loaded.published.corrected == wrong
    # what no printed row of its own says: MultiTrain's ablations cost what the paper's model does
    assert set(stated) <= ({"gflops"} if recipe.startswith("multitrain_") else set())


def test_a_recipe_without_a_row_states_its_own_figures_and_what_is_no_recipe_passes() -> None:
    released = published("multitrain_release")
    assert load("multitrain_release").published.top1 == released["top1"]
    mst = {"name": "mst_k400_b16_8", "domains": {"k400": {}}}
    for content in (
        {},
        {"published": None},
        {"published": {"paper": "none"}},
        {"published": {"paper": "cm3t"}},
        {**mst, "published": {"paper": ["mst_adapter"]}},
        {**mst, "published": {"paper": "mst_adapter", "others": 5}},
        {**mst, "published": {"paper": "mst_adapter", "omit": 5}},
        {**mst, "domains": 5, "published": {"paper": "mst_adapter"}},
    ):
        assert with_printed(content) == content
    changed = load("mst_k400_b16_8", ["published.gflops=1", "domains.k400.classes=3"]).published
    assert (changed.gflops, changed.top1) == (1, {"k400": 82.7}), "overrides come after"


def test_means_are_those_of_the_accuracies_or_corrected() -> None:
    checked = 0
    for _, row in rows():
        values = [v for column, v in row.cells.items() if column.endswith(".top1") and isinstance(v, float)]
        mean = row.corrected.get("mean_top1", row.cells.get("mean_top1"))
        if mean is not None:
            assert mean == pytest.approx(sum(values) / len(values), abs=0.0101), row.system
            checked += 1
    assert checked == 21


def test_cells_are_shown_with_the_decimals_of_print() -> None:
    table = next(t for t in tables("omi_mdl") if t.table == "Table 3")
    assert digits(table, "k400.top1") == 2
    assert text(table.rows[0].cells["k400.top1"], 2) == "71.00"
    assert text(None, 2) == ""
    assert text(">4790", 1) == ">4790"
    assert text(3096, 2) == "3096"


def test_an_unknown_paper_is_a_message() -> None:
    with pytest.raises(MdlError) as caught:
        tables("omi")
    assert "did you mean 'omi_mdl'?" in str(caught.value)
    assert load_paper("omi_mdl").paper == "omi_mdl"


def broken() -> dict[str, Any]:
    return {
        "paper": "one",
        "title": "A paper",
        "tables": [
            {"table": "Table 1", "about": "a", "columns": ["a.top1"], "rows": [{"system": "s", "cells": {}}]}
        ],
    }


def faults(content: object, folder: Path) -> str:
    path = folder / "one.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(MdlError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_all_faults_of_a_file_are_one_message_with_their_paths(tmp_path: Path) -> None:
    content = broken()
    content["tables"][0]["colums"] = []
    content["tables"][0]["rows"][0]["cells"] = {"a.top1": True}
    content["tables"][0]["rows"][0]["recipe"] = "tiny_demo"
    del content["title"]
    found = faults(content, tmp_path)
    for part in (
        "4 faults",
        "title: missing",
        "tables.0.colums: unknown key; did you mean 'columns'?",
        "tables.0.rows.0.cells.a.top1: a cell is a number or a text (got True)",
        "tables.0.rows.0.recipe: unknown key; did you mean 'recipes'?",
    ):
        assert part in found, found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("paper", "two", "paper: 'two' is in the file of 'one'"),
        ("tables", [], "tables: "),
        ("tables.0.columns", ["a.top1", "a.top1"], "tables.0.columns: a column is named twice"),
        ("tables.0.rows", [], "a table without rows needs a note"),
        ("tables.0.rows.0.cells", {"a.top": 1.0}, "cells.a.top: there is no such column; did you mean 'a.top1'?"),
        ("tables.0.rows.0.corrected", {"a.top1": 1.0}, "corrected.a.top1: this cell is not printed"),
        ("tables.1", {**broken()["tables"][0]}, "tables.1.table: there are two of 'Table 1'"),
    ],
)
def test_single_faults(path: str, value: Any, message: str, tmp_path: Path) -> None:
    content = broken()
    *parents, key = path.split(".")
    place: Any = content
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    if key == "1":
        place.append(value)
    else:
        place[key] = value
    found = faults(content, tmp_path)
    assert "1 fault:" in found
    assert message in found


@pytest.mark.parametrize(
    ("content", "message"), [("a: [1", "not valid YAML"), ("- 1\n", "a mapping of keys"), ("", "a mapping of keys")]
)
def test_what_is_no_file_of_tables_is_a_message(content: str, message: str, tmp_path: Path) -> None:
    assert message in faults(content, tmp_path)


def test_recipe_list_shows_the_printed_tables(mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("recipe", "list", "--published", "mst_adapter")
    assert ran.code == 0
    assert all(f"Table {i}:" in ran.out for i in range(1, 7))
    for part in ("EVL ViT-L/14", "= mst_k400_l14_16", "174", "87.0", "could be read"):
        assert part in ran.out
    assert "omi_" not in ran.out
    everything = mdltool("recipe", "list", "--published").out
    assert all(load_paper(paper).title in everything for paper in papers())
    for name in NAMED:
        assert f"= {name} " in everything, name
    assert "parameters_m.total must be 5.09" in everything
    assert "[Audio] + [Image]" in everything


def test_recipe_list_published_as_json_is_one_object(mdltool: Callable[..., Ran]) -> None:
    found = mdltool("recipe", "list", "--published", "--json").json["papers"]
    assert {p["paper"]: {t["table"]: len(t["rows"]) for t in p["tables"]} for p in found} == ROWS
    (only,) = mdltool("recipe", "list", "--published", "residual_adapters", "--json").json["papers"]
    row = only["tables"][0]["rows"][3]
    assert row["recipes"] == ["residual_parallel_early"]
    assert row["cells"]["aircraft.top1"] == 50.47
    assert row["corrected"] == {"size": 1.048}


def test_recipe_list_says_where_the_printed_rows_are(mdltool: Callable[..., Ran]) -> None:
    assert "--published" in mdltool("recipe", "list", "--family", "tiny").out.splitlines()[-1]
    assert "published" not in mdltool("recipe", "list", "--json").json


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--published", "omi"), ("'omi'", "did you mean 'omi_mdl'?")),
        (("omi_mdl",), ("mdltool recipe list --published omi_mdl",)),
        (("--published", "--family", "omi"), ("do not go together",)),
    ],
)
def test_misuse_is_one_message(words: tuple[str, ...], parts: tuple[str, ...], mdltool: Callable[..., Ran]) -> None:
    ran = mdltool("recipe", "list", *words)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert all(part in ran.err for part in parts), ran.err
