"""The printed tables of the papers, rows of other systems included: recipes/published/<paper>.yaml.

Columns of accuracies and other metrics are DATASET.METRIC, named as in the recipes' `published`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, PlainValidator, ValidationError

from mdltool.errors import MdlError
from mdltool.evaluate.decathlon import Decathlon
from mdltool.recipe import PUBLISHED, fault, recipe_dirs
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


def load(paper: str) -> Paper:
    """A paper with its tables. Raises MdlError for an unknown paper or, with all faults together, a broken file."""
    files = papers()
    if paper not in files:
        raise MdlError(f"there are no printed tables of a paper '{paper}'", None, did_you_mean(paper, files))
    return read(files[paper])


def read(path: Path) -> Paper:
    """One file of printed tables. Raises MdlError with all faults together."""
    try:
        # libyaml's loader: a list of many rows should not take seconds
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MdlError(f"this is not valid YAML: {error}", path, "mend the file") from None
    if not isinstance(content, dict):
        raise MdlError("a file of printed tables is a mapping of keys", path, "begin it with: paper, title, tables")
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
