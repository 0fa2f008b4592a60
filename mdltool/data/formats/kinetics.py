"""Kinetics-400/600/700 as published: a CSV with label,youtube_id,time_start,time_end,split."""

from __future__ import annotations

from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import Row, read_rows, rows_of_split
from mdltool.types import Listing

_NO_LABELS = "the published test lists carry no labels: use the train or val list"


def read(query: Query) -> Listing:
    """List the rows of a published CSV file.

    source: holds <youtube_id>.mp4 or <youtube_id>_000017_000027.mp4, flat or in folders; a file is the cut clip,
    and of several of one name the one in its class's folder counts. The classes are the label column, sorted,
    unless `classes` fixes them (needed for excerpts of the lists). Raises MdlError for what is wrong with the file.
    """
    source = query.folder()
    annotations = query.given("the Kinetics CSV file", "add --annotations kinetics-400_val.csv")
    rows = read_rows(annotations, ("label", "youtube_id"), _NO_LABELS)
    labels = [_unquoted(row["label"]) for row in rows]
    names = query.classes or tuple(sorted(set(labels)))
    gathering = Gathering(source, names)
    for row in rows_of_split(rows, query.split, annotations):
        stems = _stems(row)
        candidates = next((gathering.videos[stem] for stem in stems if stem in gathering.videos), None)
        absent = (stems[0], f"no file {stems[0]}.* or {stems[-1]}.*")
        gathering.take(candidates, _unquoted(row["label"]), row.where, absent)
    order = query.origin("the label column, sorted (give --classes for an excerpt)")
    return gathering.listing([f"labels: {order}"], annotations)


def _unquoted(label: str) -> str:
    return label.strip('"').strip()


def _stems(row: Row) -> list[str]:
    """The file names that downloaders give the clip, most specific first."""
    video_id = row["youtube_id"]
    start_s, end_s = row.segment("time_start", "time_end")
    if start_s is None or end_s is None:
        return [video_id]
    return [f"{video_id}_{round(start_s):06d}_{round(end_s):06d}", video_id]
