"""Regression CSV, as the OCEAN scores of UDIVA need it: path and a column of numbers for each target.

Where wanted with start,end (seconds) and split (spec cm3t 5.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mdltool.data.formats.common import finished
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import Row, clips_of, read_rows, rows_of_split, segment_notes, value_columns
from mdltool.errors import MdlError
from mdltool.types import Clip, Listing

_COLUMNS = "the first line must name the columns: path,<target>,<target>,... [,start,end][,split]"
_SHOWN = 8
_LARGEST = float(np.finfo(np.float32).max)  # as which a batch carries it


def read(query: Query) -> Listing:
    """List the rows of a CSV file; paths are relative to `source` or absolute.

    The targets are the other columns, in the file's order; `classes` chooses columns and their order. The values
    stay as they are. Raises MdlError for what is wrong with the file, with its row.
    """
    source = query.folder()
    annotations = query.given("the CSV file", "add --annotations FILE (columns: path,<target>,...)")
    rows = read_rows(annotations, ("path",), _COLUMNS)
    names = value_columns(rows[0], query.classes, annotations, _COLUMNS)
    own = rows_of_split(rows, query.split, annotations)
    clips, missing = clips_of(own, source, lambda row: tuple(number_of(row, name) for name in names))
    notes = [f"targets: {len(names)}, {query.origin('in the order of the columns')}"]
    notes += spread_notes(names, clips)
    return finished(names, clips, missing, [*notes, *segment_notes(clips)], annotations, "regression")


def spread_notes(names: Sequence[str], clips: Sequence[Clip]) -> list[str]:
    """Each target's range, mean and variance; of many targets the first."""
    notes = []
    for name, values in list(zip(names, np.array([clip.label for clip in clips]).T, strict=False))[:_SHOWN]:
        spread = f"mean {values.mean():.3g}, variance {values.var():.3g}"
        notes.append(f"{name}: {values.min():.3g} to {values.max():.3g}, {spread}")
    return notes


def number_of(row: Row, column: str) -> float:
    """A cell's number. Raises MdlError for what float32 cannot hold."""
    text = row[column.lower()]
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not abs(value) <= _LARGEST:
        raise MdlError(
            f"'{text}' in column '{column}' is not a number",
            row.where,
            "write e.g. -0.31; where not every column is a target, name the targets with --classes",
        )
    return value
