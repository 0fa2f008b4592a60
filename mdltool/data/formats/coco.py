"""COCO-style JSON and a folder of images, as Visual Decathlon publishes its domains (spec residual_adapters 5).

An image's classes are the categories of its annotations; boxes and masks are not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mdltool.data.formats.common import SPLITS, finished, key_of, label_notes, label_of, relative_name, same_split
from mdltool.data.formats.json_file import object_of, read_json, text_of
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Clip, Listing

_SPLIT_IN_NAME = re.compile(
    rf"(?:^|_)({'|'.join(word for family in SPLITS for word in family)})(?:\d{{4}})?(?:_|$)"
)


def read(query: Query) -> Listing:
    """List the images of the file. Labels are the categories in the order of their ids, or `classes`.

    The task is multi_label where an image has several categories, else single_label. Raises MdlError for a file
    without images, annotations or categories, and for what contradicts itself in it.
    """
    return _read(query, None)


def read_multilabel(query: Query) -> Listing:
    """As `read`, and the task is multi_label whatever the file shows, so that splits agree."""
    return _read(query, True)


def _read(query: Query, several: bool | None) -> Listing:
    source = query.folder()
    annotations = query.given("the JSON file", "add --annotations FILE, e.g. dtd_train.json")
    content = object_of(read_json(annotations), annotations)
    images = _entries(content, "images", annotations, "give a COCO-style file")
    marks = _marks(content, annotations)
    names, notes = _class_names(content, query, annotations)
    listed = _unique_ids(images, annotations)
    marked = _categories_of(marks, names, annotations)
    categories = {number: found for number, found in marked.items() if number in listed}
    if not categories:
        what = f"no image has an annotation (image_id {next(iter(marked))!r:.40} is no id of images)"
        raise MdlError(what, annotations, "give the file that lists images and their annotations together")
    most = max((len(found) for found in categories.values()), default=0)
    task = "multi_label" if several or (several is None and most > 1) else "single_label"
    if several is None and task == "multi_label":
        crowded = sum(len(found) > 1 for found in categories.values())
        notes.append(f"task: multi_label, since {crowded} images have several categories")
    notes += _split_notes(annotations, query.split)
    index = {name: i for i, name in enumerate(query.classes or names.values())}
    stripped, note = _stripped(source, [_file_name(image, annotations) for image in images])
    clips: list[Clip] = []
    missing: list[tuple[str, str]] = []
    unlabelled = 0
    for image in images:
        found = categories.get(_id(image, annotations), [])
        if task == "single_label" and not found:
            unlabelled += 1
            continue
        where = f"{annotations}, image {image['id']}"
        labels = tuple(sorted({label_of(category, index, where) for category in found}))
        name = PurePosixPath(_file_name(image, annotations))
        path = source.joinpath(*name.parts[stripped:])
        key = key_of(relative_name(path, source))
        if path.is_file():
            clips.append(Clip(key, path, labels if task == "multi_label" else labels[0]))
        else:
            missing.append((key, f"no file {name}"))
    notes += [note] if note else []
    notes += [f"without a category: {unlabelled} images, left out"] if unlabelled else []
    return finished(tuple(index), clips, missing, [*notes, *label_notes(clips)], annotations, task)


def _unique_ids(images: Sequence[dict[str, Any]], where: Path) -> set[Any]:
    """The images' ids. Raises MdlError for one that stands twice, whose annotations nobody could tell apart."""
    found: set[Any] = set()
    for image in images:
        number = _id(image, where)
        if number in found:
            raise MdlError(f"the image id {number!r:.40} stands twice", where, "give every image an id of its own")
        found.add(number)
    return found


def _entries(content: dict[str, Any], name: str, where: Path, fix: str) -> list[dict[str, Any]]:
    """A list of objects that is not empty. Raises MdlError."""
    found = content.get(name)
    if not isinstance(found, list) or not found:
        raise MdlError(f"the file has no '{name}'", where, fix)
    return [object_of(entry, f"{where}, {name} {i}") for i, entry in enumerate(found)]


def _marks(content: dict[str, Any], where: Path) -> list[dict[str, Any]]:
    """The annotations. Raises MdlError where they name no categories."""
    marks = _entries(
        content, "annotations", where, "a challenge's test list comes without labels: take its train or val list"
    )
    bare = next((mark for mark in marks if not isinstance(mark.get("category_id"), int)), None)
    if bare is not None:
        kind = "captions" if "caption" in bare else "annotations without a category"
        raise MdlError(f"the file has {kind}, which are no labels", where, "give the file of instances")
    return marks


def _class_names(content: dict[str, Any], query: Query, where: Path) -> tuple[dict[int, str], list[str]]:
    """(category id -> class name in the order of the ids, notes). Raises MdlError for an id that stands twice.

    Names that stand twice, as Omniglot's characters of several alphabets, are told apart by their supercategory.
    """
    entries = _entries(content, "categories", where, "give the file of instances")
    by_id: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry.get("id"), int) or entry["id"] in by_id:
            raise MdlError(
                f"the category id {entry.get('id')!r:.40} is no number, or stands twice", where, "mend it"
            )
        by_id[entry["id"]] = entry
    order = sorted(by_id)
    plain = {i: text_of(by_id[i], "name", f"{where}, category {i}") for i in order}
    names = _distinct(plain, {i: str(by_id[i].get("supercategory", "")) for i in order})
    origin = "names from --classes" if query.classes else "in the order of their ids"
    return names, [f"labels: {len(order)} categories, ids {order[0]} to {order[-1]}, {origin}"]


def _distinct(names: dict[int, str], parents: dict[int, str]) -> dict[int, str]:
    counts = Counter(names.values())
    longer = {i: f"{parents[i]}/{name}" if counts[name] > 1 and parents[i] else name for i, name in names.items()}
    counts = Counter(longer.values())
    return {i: f"{name} ({i})" if counts[name] > 1 else name for i, name in longer.items()}


def _categories_of(marks: Sequence[dict[str, Any]], names: dict[int, str], where: Path) -> dict[Any, list[str]]:
    """Image id -> the names of its categories, each once."""
    found: dict[Any, list[str]] = {}
    for mark in marks:
        if mark["category_id"] not in names:
            raise MdlError(
                f"the annotation {mark.get('id')} is of the category {mark['category_id']}, which is not listed",
                where,
                "use the published file",
            )
        own = found.setdefault(_id(mark, where, "image_id"), [])
        if names[mark["category_id"]] not in own:
            own.append(names[mark["category_id"]])
    return found


def _id(entry: dict[str, Any], where: Path, name: str = "id") -> int | str:
    value = entry.get(name)
    if not isinstance(value, int | str):
        raise MdlError(f"'{name}' is {value!r:.40}, no id", where, "use the published file")
    return value


def _file_name(image: dict[str, Any], where: Path) -> str:
    """Inside SOURCE: a file from elsewhere shall not choose what of this machine goes into shards."""
    at = f"{where}, image {image.get('id')}"
    name = PurePosixPath(text_of(image, "file_name", at))
    if name.is_absolute() or ".." in name.parts:
        raise MdlError(f"file_name '{name}' leaves the folder of the images", at, "make it relative to SOURCE")
    return str(name)


def _split_notes(annotations: Path, split: str) -> list[str]:
    told = _SPLIT_IN_NAME.search(annotations.stem.lower())
    if told is None or same_split(told[1], split):
        return []
    return [f"split: {annotations.name} is named after '{told[1]}', stored as '{split}'"]


def _stripped(source: Path, names: Sequence[str]) -> tuple[int, str | None]:
    """How many leading folders of the file names to leave out, so that the files are found, and a note.

    The folder next to the file stays, since other splits count their images from 1 too; unless SOURCE is called so.
    """
    depth = max(len(PurePosixPath(name).parts) for name in names) - 1
    for stripped in range(depth + 1):
        for name in names:
            parts = PurePosixPath(name).parts
            left = parts[stripped:]
            apart = stripped == 0 or len(left) > 1 or (left and parts[stripped - 1] == source.name)
            if left and apart and source.joinpath(*left).is_file():
                prefix = "/".join(parts[:stripped])
                return stripped, f"paths: without their '{prefix}/'" if stripped else None
    return 0, None
