"""The printed tables of the papers, rows of other systems included: recipes/published/<paper>.yaml.

Columns of accuracies and other metrics are DATASET.METRIC, those of parameters in millions parameters_m.PART. A row
names the recipes that stand for it; `with_printed` gives them its cells, which stand nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator, ValidationError

from mdltool.errors import MdlError
from mdltool.evaluate.decathlon import Decathlon
from mdltool.recipe_files import PUBLISHED, fault, read_yaml, recipe_dirs
from mdltool.registry import did_you_mean
from mdltool.schema import Part


def _cell(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a cell is a number or a text")
    return value


Cell = Annotated[int | float | str, PlainValidator(_cell)]


class Row(Part):
    """One printed row. group: the heading that it stands under. recipes: those that stand for it, if any exists.

    cells: column -> as printed; empty, dashed and illegible cells are left out. corrected: cells that are proven
    wrong in print, with what they must be.
    """

    system: str
    group: str | None = None
    recipes: list[str] = Field(default_factory=list)
    cells: dict[str, Cell]
    corrected: dict[str, float] = Field(default_factory=dict)
    note: str | None = None


class PrintedTable(Part):
    """A table of a paper. note: its legend, and what could not be read; without columns it is all that is there."""

    table: str
    about: str
    columns: list[str]
    note: str | None = None
    rows: list[Row]


class Paper(Part):
    paper: str
    title: str
    tables: Annotated[list[PrintedTable], Field(min_length=1)]


def papers() -> dict[str, Path]:
    """Name -> file of every paper whose tables ship."""
    return {path.stem: path for folder in recipe_dirs() for path in sorted((folder / PUBLISHED).glob("*.yaml"))}


def tables(paper: str) -> list[PrintedTable]:
    """The tables of one paper in their printed order. Raises MdlError for an unknown paper or a broken file."""
    return load(paper).tables


@functools.cache
def load(paper: str) -> Paper:
    """A paper with its tables. Raises MdlError for an unknown paper or, with all faults together, a broken file."""
    files = papers()
    if paper not in files:
        raise MdlError(f"there are no printed tables of a paper '{paper}'", None, did_you_mean(paper, files))
    return read(files[paper])


def read(path: Path) -> Paper:
    """One file of printed tables. Raises MdlError with all faults together."""
    content = read_yaml(
        path, "a file of printed tables is a mapping of keys", "begin it with: paper, title, tables"
    )
    try:
        paper = Paper.model_validate(content)
        faults = _cross_faults(paper, path.stem)
    except ValidationError as error:
        faults = [fault(entry, Paper) for entry in error.errors()]
    if faults:
        noun = "fault" if len(faults) == 1 else "faults"
        listing = "".join(f"\n    {entry}" for entry in faults)
        raise MdlError(f"the printed tables have {len(faults)} {noun}:{listing}", path, "mend the keys above")
    return paper


def _cross_faults(paper: Paper, stem: str) -> list[str]:
    """Faults between keys that are each valid alone."""
    faults = [] if paper.paper == stem else [f"paper: '{paper.paper}' is in the file of '{stem}'"]
    seen: set[str] = set()
    for i, table in enumerate(paper.tables):
        at = f"tables.{i}"
        if table.table in seen:
            faults.append(f"{at}.table: there are two of '{table.table}'")
        seen.add(table.table)
        if len(set(table.columns)) < len(table.columns):
            faults.append(f"{at}.columns: a column is named twice")
        if not table.rows and table.note is None:
            faults.append(f"{at}.rows: a table without rows needs a note that says why")
        for j, row in enumerate(table.rows):
            faults += _row_faults(row, table.columns, f"{at}.rows.{j}")
    return faults


def _row_faults(row: Row, columns: list[str], at: str) -> list[str]:
    strange = [column for column in row.cells if column not in columns]
    uncorrectable = [column for column in row.corrected if column not in row.cells]
    return [
        *(f"{at}.cells.{c}: there is no such column; {did_you_mean(c, columns)}" for c in strange),
        *(f"{at}.corrected.{c}: this cell is not printed" for c in uncorrectable),
    ]


def with_printed(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe's content whose `published` has the cells of the printed rows that name the recipe.

    What the recipe states itself stays; a content that is not a recipe's is left to validation.
    """
    own, domains = content.get("published"), content.get("domains")
    if not isinstance(own, dict) or not isinstance(domains, dict):
        return content
    paper, others, omit = own.get("paper"), own.get("others", []), own.get("omit", [])
    if not isinstance(paper, str) or paper not in papers() or not all(isinstance(v, list) for v in (others, omit)):
        return content
    found = printed(str(content.get("name")), paper, [*domains, *others], omit)
    for key, value in own.items():
        found[key] = (
            {**found[key], **value} if isinstance(found.get(key), dict) and isinstance(value, dict) else value
        )
    return {**content, "published": found}


def rows_of(recipe: str, paper: str) -> list[tuple[PrintedTable, Row]]:
    """The rows of a paper that name a recipe."""
    return [(table, row) for table in tables(paper) for row in table.rows if recipe in row.recipes]


def printed(recipe: str, paper: str, domains: Collection[str], omit: Collection[str] = ()) -> dict[str, Any]:
    """What a paper's rows print of a recipe, under the keys of a recipe's `published`. omit: columns left out."""
    found: dict[str, Any] = {}
    for table, row in rows_of(recipe, paper):
        for column, cell in row.cells.items():
            for place in _places(column, domains) if column not in omit else ():
                _put(found, place, cell)
                if column in row.corrected:
                    _put(found, ("corrected", place[-1]), row.corrected[column])
                if place[0] == "parameters_m":
                    found["digits"] = max(found.get("digits", 0), digits(table, column))
    return found


def _put(content: dict[str, Any], place: tuple[str, ...], value: Cell) -> None:
    *keys, last = place
    for key in keys:
        content = content.setdefault(key, {})
    content[last] = value


def _places(column: str, domains: Collection[str]) -> list[tuple[str, ...]]:
    """Where in a recipe's `published` a column belongs; nowhere if it is another domain's or has no figures."""
    group, _, name = column.rpartition(".")
    if column in ("gflops", "size"):
        return [(column,)]
    if group == "parameters_m":
        return [(group, name)]
    if column in ("mean_top1", "decathlon_score"):
        return [("overall", column)]
    if column == "trained_percent":
        return [("percent", "trained")]
    if column == "epochs":
        return [("scores", column, domain) for domain in domains]
    if group not in domains:
        return []
    return [("top1", group)] if name == "top1" else [("scores", name, group)]


def top1(row: Row) -> dict[str, float]:
    """{domain: printed top-1 accuracy in percent} of a row."""
    cells = ((column.rpartition("."), cell) for column, cell in row.cells.items())
    return {domain: float(cell) for (domain, _, metric), cell in cells if metric == "top1" and domain}


def decathlon_of(row: Row) -> float:
    """The decathlon's score of a row's printed accuracies."""
    score: float = Decathlon().score(top1(row))["score"]
    return score


def digits(table: PrintedTable, column: str) -> int:
    """Decimals that the paper prints in a column; YAML keeps 71.00 as 71.0, but not every cell ends in zeros."""
    cells = (row.cells.get(column) for row in table.rows)
    return max((len(str(cell).partition(".")[2]) for cell in cells if isinstance(cell, float)), default=0)


def text(cell: int | float | str | None, decimals: int) -> str:
    """A cell as the paper prints it; '' for one that it leaves empty."""
    if cell is None:
        return ""
    return f"{cell:.{decimals}f}" if isinstance(cell, float) else str(cell)
