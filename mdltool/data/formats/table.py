"""Reading the CSV files of annotation formats: header, rows with their line numbers, the split column, clips."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdltool.data.formats.common import key_of, relative_name, same_split
from mdltool.errors import MdlError
from mdltool.registry import did_you_mean, nearest
from mdltool.types import Clip, Label

_OF_THE_CLIP = ("path", "start", "end", "split")


@dataclass(frozen=True)
class Row:
    """One row of a CSV file. values: by column, in lower case. where: the file and line, for messages.

    header: the columns as the file writes them.
    """

    values: dict[str, str]
    where: str
    header: tuple[str, ...]

    def __getitem__(self, column: str) -> str:
        value = self.values[column]
        if not value:
            raise MdlError(f"the column '{column}' is empty", self.where, "fill it, or remove the row")
        return value

    def seconds(self, column: str) -> float | None:
        """A time in seconds, or None where the cell or the column is not there. Raises MdlError."""
        text = self.values.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise MdlError(f"'{text}' in column '{column}' is no time in seconds", self.where, "write e.g. 12.5")
        return value

    def segment(self, start: str, end: str) -> tuple[float | None, float | None]:
        """The row's segment in seconds. Raises MdlError when it ends before it starts."""
        start_s, end_s = self.seconds(start), self.seconds(end)
        if end_s is not None and end_s <= (start_s or 0.0):
            raise MdlError(
                f"the segment ends at {end_s:g} s, before it starts at {start_s or 0.0:g} s",
                self.where,
                f"correct '{start}' and '{end}'",
            )
        return start_s, end_s


def read_rows(path: Path, required: Sequence[str], hint: str) -> list[Row]:
    """All rows of a CSV file with a header. Raises MdlError for a missing column (fix: `hint`) and bad rows."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = list(_rows(csv.reader(handle), path, required, hint))
    except FileNotFoundError:
        raise MdlError("there is no such file", path, "check --annotations") from None
    except IsADirectoryError:
        raise MdlError("this is a directory, not a CSV file", path, "give the file as --annotations") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise MdlError(f"this is not a CSV file ({error})", path, "check --annotations") from None
    if not rows:
        raise MdlError("the CSV file has no rows", path, "check --annotations")
    return rows


def _rows(reader: Iterator[list[str]], path: Path, required: Sequence[str], hint: str) -> Iterator[Row]:
    written = tuple(name.strip() for name in next(reader, []))
    header = [name.lower() for name in written]
    for column in required:
        if column not in header:
            near = nearest(column, header)
            found = f"it has: {', '.join(header) or 'nothing'}" + (f" ('{near}'?)" if near else "")
            raise MdlError(f"the CSV file has no column '{column}' ({found})", path, hint)
    for number, cells in enumerate(reader, 2):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, row {number}"
        if len(cells) > len(header):
            raise MdlError(
                f"the row has {len(cells)} cells, the header {len(header)}", where, "quote cells that hold commas"
            )
        values = [cell.strip() for cell in cells] + [""] * (len(header) - len(cells))
        yield Row(dict(zip(header, values, strict=True)), where, written)


def rows_of_split(rows: Sequence[Row], split: str, path: Path) -> list[Row]:
    """The rows of one split where the file has a split column, else all. Raises MdlError when none is left."""
    if "split" not in rows[0].values:
        return list(rows)
    chosen = [row for row in rows if same_split(row.values["split"], split)]
    if not chosen:
        splits = ", ".join(sorted({row.values["split"] for row in rows}))
        raise MdlError(f"no row is of the split '{split}' (the file has: {splits})", path, "check --split")
    return chosen


def clips_of(
    rows: Sequence[Row], source: Path, label: Callable[[Row], Label]
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """(clips, missing) of rows with path and, where wanted, start and end.

    A path is relative to `source` or absolute. missing: (key, reason). Raises MdlError for a bad segment, and what
    `label` raises.
    """
    clips, missing = [], []
    for row in rows:
        video = source / row["path"]
        start_s, end_s = row.segment("start", "end")
        key = key_of(relative_name(video, source), start_s, end_s)
        value = label(row)
        if video.is_file():
            clips.append(Clip(key, video, value, start_s, end_s))
        else:
            missing.append((key, f"no file {row['path']}"))
    return clips, missing


def segment_notes(clips: Sequence[Clip]) -> list[str]:
    """The note that says how many clips are segments, where there are any."""
    segments = sum(clip.is_segment for clip in clips)
    return [f"segments: {segments}"] if segments else []


def value_columns(row: Row, chosen: Sequence[str] | None, path: Path, hint: str) -> tuple[str, ...]:
    """The columns that stand for a class or target each: the `chosen` ones, else all that do not name the clip.

    Raises MdlError for none (fix: `hint`), one twice, one without a name, and a chosen one that is not there.
    """
    header = [name.lower() for name in row.header]
    own = tuple(name for name in row.header if name.lower() not in _OF_THE_CLIP)
    names = own if chosen is None else tuple(chosen)
    if not names:
        raise MdlError("the CSV file has no columns beside those of the clip", path, hint)
    for name in names:
        count = header.count(name.lower())
        if count == 0:
            raise MdlError(f"the CSV file has no column '{name}'", path, did_you_mean(name, own))
        if count > 1 or not name:
            what = f"the column '{name}' stands twice" if name else "a column has no name"
            raise MdlError(what, path, hint)
    return names
