"""UCF101 as published: classInd.txt, trainlist0N.txt with 1-based labels, testlist0N.txt without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mdltool.data.formats.common import key_of, official_part, read_lines
from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing

_FOLDER = "ucfTrainTestlist"
_LISTS = {"train": "trainlist", "eval": "testlist"}


def read(query: Query) -> Listing:
    """List one of the three official folds; val and test both mean the test list.

    source: holds <class>/<video>, the videos flat, or the archive's UCF-101/. annotations: the folder of the
    lists, or one list; without it, ucfTrainTestlist/ in or beside `source`. A re-encoded video is found under
    another extension. Raises MdlError for lists that are missing or contradict classInd.txt.
    """
    source = query.folder()
    path = _list_file(query)
    official = _class_list(path.parent / "classInd.txt")
    entries = [_entry(line, f"{path}, line {number}") for number, line in read_lines(path)]
    base, note = _label_base(entries, official)
    names = query.classes or official
    gathering = Gathering(source, names)
    for name, number, where in entries:
        class_name = name.parent.name or official[(number or 0) - base]
        absent = (key_of(name.as_posix()), f"no file {name}")
        gathering.take(gathering.videos.get(name.stem), class_name, where, absent)
    return gathering.listing([f"list: {path.name}", note], path)


def _list_file(query: Query) -> Path:
    if query.annotations is not None and query.annotations.is_file():
        return query.annotations
    name = f"{_LISTS[official_part(query.split, query.place)]}{query.fold:02d}.txt"
    beside = (query.source / _FOLDER, query.source.parent / _FOLDER, query.source)
    fix = "--annotations FOLDER and --fold 1, 2 or 3"
    return query.find((name,), beside, f"the official list {name} is not there", fix)


def _class_list(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise MdlError("classInd.txt is not there", path, "keep it in the folder of the lists")
    names = []
    for position, (line, text) in enumerate(read_lines(path), 1):
        number, _, name = text.partition(" ")
        if number != str(position) or not name.strip():
            raise MdlError(
                f"expected '{position} <class>', found '{text}'", f"{path}, line {line}", "restore the file"
            )
        names.append(name.strip())
    if not names:
        raise MdlError("classInd.txt is empty", path, "restore the file")
    return tuple(names)


def _entry(line: str, where: str) -> tuple[PurePosixPath, int | None, str]:
    """(relative path, published label or None, where) of one line."""
    name, _, last = line.rpartition(" ")
    if name and last.isdecimal():
        return PurePosixPath(name.strip()), int(last), where
    return PurePosixPath(line), None, where


def _label_base(
    entries: Sequence[tuple[PurePosixPath, int | None, str]], official: Sequence[str]
) -> tuple[int, str]:
    """0 or 1 and a sentence: the label base under which every line's number agrees with its folder."""
    numbered = [(name, number, where) for name, number, where in entries if number is not None]
    for name, number, where in entries:
        if number is None and not name.parent.name:
            raise MdlError("the line names neither a class folder nor a label", where, "use the published list")
    if not numbered:
        return 1, "labels: from the folders' names (this list has no numbers)"
    for base in (1, 0):
        if all(_agrees(name, number - base, official) for name, number, _ in numbered):
            return base, f"labels: {base}-based; classInd.txt agrees"
    name, number, where = next(entry for entry in numbered if not _agrees(entry[0], entry[1] - 1, official))
    raise MdlError(
        f"the label {number} of {name} is not that class in classInd.txt",
        where,
        "use the list and the classInd.txt of one release",
    )


def _agrees(name: PurePosixPath, index: int, official: Sequence[str]) -> bool:
    return 0 <= index < len(official) and name.parent.name in ("", official[index])
