"""Moments in Time as published: trainingSet.csv and validationSet.csv without a header, moments_categories.txt."""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

from mdltool.data.formats.common import in_order, key_of, read_lines, same_split
from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing

_LISTS = {"train": ("trainingSet.csv", "training"), "val": ("validationSet.csv", "validation")}
_CATEGORIES = "moments_categories.txt"


def read(query: Query) -> Listing:
    """List a published CSV file: rows of path,label and the numbers of votes for and against it.

    source: the archive's folder with training/ and validation/, one of these, or the videos flat. annotations: the
    folder of the CSV files, or one of them; without it, in or beside `source`. The classes are those of
    moments_categories.txt beside the CSV file, unless `classes` fixes them. Raises MdlError for what is wrong with
    the files, and for the test list, whose labels are not published.
    """
    source = query.folder()
    path = _list_file(query)
    names, note = (query.classes, "from --classes") if query.classes else _class_list(path.parent / _CATEGORIES)
    gathering = Gathering(source, names, _folder_of(source, query.split))
    rows = _rows(path)
    for name, label_name, where in rows:
        folder = name.parent.name
        # one file name can stand under two labels: another class's file is not this row's
        named = gathering.videos.get(name.stem, ())
        own = [v for v in named if v.parent.name == folder or v.parent.name not in gathering.index]
        gathering.take(own, label_name, where, (key_of(name.as_posix()), f"no file {name}"), folder=folder)
    notes = [f"list: {path.name}, {len(rows)} clips", f"labels: {note}"]
    return gathering.listing(notes, path)


def _published(split: str) -> tuple[str, str] | None:
    """(CSV file, folder of its videos) of a split."""
    return next((names for part, names in _LISTS.items() if same_split(part, split)), None)


def _folder_of(source: Path, split: str) -> Path:
    published = _published(split)
    return source / published[1] if published and (source / published[1]).is_dir() else source


def _list_file(query: Query) -> Path:
    if query.annotations is not None and not query.annotations.is_dir():
        return query.annotations
    published = _published(query.split)
    if published is None:
        raise MdlError(f"no labels of '{query.split}' are published", query.place, "--split train or val")
    beside = (query.source, query.source.parent)
    fix = "--annotations FOLDER of the CSV files"
    return query.find(published[:1], beside, f"{published[0]} is not there", fix)


def _class_list(path: Path) -> tuple[tuple[str, ...], str]:
    """Class names in label order, and a sentence. Lines are <class>,<number>; or <class>, in label order."""
    if not path.is_file():
        raise MdlError(f"{_CATEGORIES} is not beside the CSV file", path, "keep it there, or give --classes")
    numbers: dict[str, str] = {}
    for position, (line, text) in enumerate(read_lines(path)):
        name, comma, number = text.rpartition(",")
        name, number = (name.strip(), number) if comma else (text, str(position))
        if name in numbers:
            raise MdlError(f"the class '{name}' stands twice", f"{path}, line {line}", "restore the file")
        numbers[name] = number
    names, base = in_order(numbers, path)
    return names, f"{base}-based, {path.name}"


def _rows(path: Path) -> list[tuple[PurePosixPath, str, str]]:
    """(path of the video, class, where) of each row."""
    found = []
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([line]))]
        except csv.Error:
            cells = []
        if len(cells) < 2 or not cells[0] or not cells[1]:
            raise MdlError(f"expected '<path>,<label>,...', found '{line:.80}'", where, "restore the file")
        found.append((PurePosixPath(cells[0]), cells[1], where))
    if not found:
        raise MdlError("the CSV file has no rows", path, "check --annotations")
    return found
