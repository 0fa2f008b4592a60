"""Multi-label CSV, as MPIIGroupInteraction needs it: path,labels, or a column of 0 and 1 for each class.

Where wanted with start,end (seconds) and split (spec cm3t 5.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mdltool.data.formats.common import finished, label_notes, label_of, number_base
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import Row, clips_of, read_rows, rows_of_split, segment_notes, value_columns
from mdltool.errors import MdlError
from mdltool.types import Listing

_COLUMNS = "the first line must name the columns: path,labels or path,<class>,<class>,... [,start,end][,split]"
Label = Callable[[Row], tuple[int, ...]]


def read(query: Query) -> Listing:
    """List the rows of a CSV file; paths are relative to `source` or absolute.

    With a column `labels`: names or numbers with ; or | between them, none for a clip of no class. The classes are
    those of the whole file, sorted, whatever the split, or `classes`; then numbers are positions in that list.
    Without it: a column of 0 and 1 for each class, in the file's order; `classes` chooses columns and their order.
    Raises MdlError for what is wrong with the file, with its row.
    """
    source = query.folder()
    annotations = query.given("the CSV file", "add --annotations FILE (columns: path,labels)")
    rows = read_rows(annotations, ("path",), _COLUMNS)
    form = _listed if "labels" in rows[0].values else _wide
    names, label, notes = form(rows, query.classes, annotations)
    clips, missing = clips_of(rows_of_split(rows, query.split, annotations), source, label)
    return finished(
        names, clips, missing, [*notes, *label_notes(clips), *segment_notes(clips)], annotations, "multi_label"
    )


def _listed(
    rows: Sequence[Row], classes: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], Label, list[str]]:
    """(classes, a row's label, notes) of the form path,labels."""
    seen = {name for row in rows for name in _names(row)}
    if not seen:
        raise MdlError("no row has a label", path, "fill the column 'labels'")
    numbers = all(name.isdecimal() for name in seen)
    if classes is None:
        names = tuple(sorted(seen, key=int) if numbers else sorted(seen))
        order = "of this file, sorted (give --classes where other splits are in other files)"
    elif numbers and not seen <= set(classes):
        base = number_base({int(name) for name in seen}, len(classes), path)
        return tuple(classes), _numbered(base), [f"labels: numbers from {base}, names from --classes"]
    else:
        names, order = tuple(classes), "from --classes"
    index = {name: i for i, name in enumerate(names)}

    def label(row: Row) -> tuple[int, ...]:
        return tuple(sorted({label_of(name, index, row.where) for name in _names(row)}))

    return names, label, [f"labels: {order}"]


def _names(row: Row) -> list[str]:
    return [name.strip() for name in re.split("[;|]", row.values["labels"]) if name.strip()]


def _numbered(base: int) -> Label:
    return lambda row: tuple(sorted({int(name) - base for name in _names(row)}))


def _wide(
    rows: Sequence[Row], classes: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], Label, list[str]]:
    """(classes, a row's label, notes) of the form with a column for each class."""
    names = value_columns(rows[0], classes, path, _COLUMNS)

    def label(row: Row) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(names) if is_one(row, name))

    order = "from --classes" if classes else "in the file's order"
    return names, label, [f"labels: a column of 0 and 1 for each class, {order}"]


def is_one(row: Row, column: str) -> bool:
    """Whether a cell is 1. Raises MdlError for what is neither 0 nor 1."""
    text = row[column.lower()]
    if text not in ("0", "1", "0.0", "1.0"):
        raise MdlError(
            f"'{text}' in column '{column}' is not 0 or 1",
            row.where,
            "write 0 or 1; where not every column is a class, name the classes with --classes",
        )
    return text[0] == "1"
