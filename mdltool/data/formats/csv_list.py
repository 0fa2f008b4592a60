"""Generic CSV: columns path,label and, where wanted, start,end (seconds) and split."""

from __future__ import annotations

from mdltool.data.formats.common import finished, label_of
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import clips_of, read_rows, rows_of_split, segment_notes
from mdltool.types import Listing


def read(query: Query) -> Listing:
    """List the rows of a CSV file; paths are relative to `source` or absolute.

    The classes are the labels of the whole file, sorted, whatever the split, so that the splits of one file
    agree; files of their own need `classes`. Raises MdlError for what is wrong with the file, with its row.
    """
    source = query.folder()
    annotations = query.given("the CSV file", "add --annotations FILE (columns: path,label)")
    rows = read_rows(annotations, ("path", "label"), "the first line must name the columns: path,label[,start,end]")
    names = query.classes or tuple(sorted({row["label"] for row in rows}))
    index = {name: i for i, name in enumerate(names)}
    own = rows_of_split(rows, query.split, annotations)
    clips, missing = clips_of(own, source, lambda row: label_of(row["label"], index, row.where))
    order = query.origin("the labels of this file, sorted (give --classes where other splits are in other files)")
    return finished(names, clips, missing, [f"labels: {order}", *segment_notes(clips)], annotations)
