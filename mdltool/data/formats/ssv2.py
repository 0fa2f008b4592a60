"""Something-Something v2 as published: JSON lists of records, labels.json, videos named <id>.webm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdltool.data.formats.common import in_order, key_of, read_lines, same_split
from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.json_file import object_of, read_json, text_of
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing

_PREFIX = "something-something-v2-"
_LISTS = {
    "train": (f"{_PREFIX}train.json", "train.json"),
    "val": (f"{_PREFIX}validation.json", "validation.json"),
    # the published test.json has ids only; the labels came later, in a file of their own
    "test": ("test-answers.csv", f"{_PREFIX}test.json", "test.json"),
}
_LABELS = (f"{_PREFIX}labels.json", "labels.json")
_NO_LABELS = "the published test.json has no labels: use train or val, or test-answers.csv"


def read(query: Query) -> Listing:
    """List one of the published lists; a class is a template without its brackets.

    source: holds <id>.webm, flat or in folders; re-encoded videos are found under other extensions.
    annotations: the folder of the lists, or one list with labels.json beside it; without it, labels/ in or beside
    `source`. Raises MdlError for lists that are missing, carry no labels, or name unknown templates.
    """
    source = query.folder()
    path = _list_file(query)
    names, note = (query.classes, "from --classes") if query.classes else _class_list(path.parent)
    gathering = Gathering(source, names)
    entries = _answers(path) if path.suffix == ".csv" else _records(path)
    for video_id, template, where in entries:
        absent = (key_of(video_id), f"no file {video_id}.webm")
        gathering.take(gathering.videos.get(video_id), template, where, absent)
    notes = [f"list: {path.name}, {len(entries)} clips", f"labels: {note}"]
    return gathering.listing(notes, path)


def _list_file(query: Query) -> Path:
    if query.annotations is not None and not query.annotations.is_dir():
        return query.annotations
    wanted = next((names for part, names in _LISTS.items() if same_split(part, query.split)), None)
    if wanted is None:
        raise MdlError(f"this data set has no split '{query.split}'", query.place, "--split train, val or test")
    inside, outside = query.source, query.source.parent
    beside = (inside / "labels", outside / "labels", inside, outside)
    fix = "--annotations FOLDER of the JSON files"
    return query.find(wanted, beside, f"there is no {' or '.join(wanted)}", fix)


def _class_list(folder: Path) -> tuple[tuple[str, ...], str]:
    path = next((folder / name for name in _LABELS if (folder / name).is_file()), None)
    if path is None:
        fix = f"keep {' or '.join(_LABELS)} there, or give --classes"
        raise MdlError("the labels file is not beside the list", folder, fix)
    numbers = object_of(read_json(path), path)
    names, base = in_order({_plain(name): number for name, number in numbers.items()}, path)
    return names, f"{base}-based, {path.name}"


def _records(path: Path) -> list[tuple[str, str, str]]:
    """(id, class, where) of each record of a JSON list."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise MdlError(
            "expected a list of records with id and template", path, "use the published train or val list"
        )
    return [_record(entry, f"{path}, record {number}") for number, entry in enumerate(content)]


def _record(entry: Any, where: str) -> tuple[str, str, str]:
    entry = object_of(entry, where)
    video_id = str(entry["id"]) if isinstance(entry.get("id"), int) else text_of(entry, "id", where)
    return video_id, _plain(text_of(entry, "template", where, _NO_LABELS)), where


def _answers(path: Path) -> list[tuple[str, str, str]]:
    """(id, class, where) of each line of test-answers.csv: <id>;<class>."""
    entries = []
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        video_id, _, template = line.partition(";")
        if not video_id.isdecimal() or not template.strip():
            raise MdlError(f"expected '<id>;<class>', found '{line}'", where, "restore the file")
        entries.append((video_id, _plain(template.strip().strip('"')), where))
    return entries


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "").strip()
