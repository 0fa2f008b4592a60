"""Image arrays: .npz or .npy files of images uint8 [N, H, W, 3] or [N, H, W] and labels [N], or a folder of them.

An array's role is told by its name, without the words of a split that may stand around it: `x_train` and `y_train`,
`val_images` and `val_labels`, `images` and `labels`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdltool.data.formats.common import (
    SPLITS,
    clip_name,
    finished,
    key_of,
    label_of,
    number_base,
    relative_name,
    same_split,
)
from mdltool.data.formats.query import Query
from mdltool.data.image_arrays import ARRAY_SUFFIXES, ArrayFault, ArrayHeader, headers_of, open_array
from mdltool.errors import MdlError
from mdltool.types import Clip, Listing

_ROLES = {
    "images": ("images", "image", "imgs", "x", "data", "pixels"),
    "labels": ("labels", "label", "y", "targets", "target"),
    "classes": ("classes", "class_names", "label_names", "names"),
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}
_SPLIT_WORDS = frozenset(word for family in SPLITS for word in family)
_SORTED = "of these arrays, sorted (give --classes where other splits are elsewhere)"
_EXPECTED = "name the arrays images and labels, or x_train and y_train, val_images and val_labels, ..."


@dataclass(frozen=True)
class _Array:
    """An array in a file. group: what images and their labels have in common. split: the split's word, or ""."""

    path: Path
    name: str
    role: str
    split: str
    group: str
    header: ArrayHeader

    @property
    def where(self) -> str:
        return f"{self.path}, array '{self.name}'" if self.name else str(self.path)

    def where_in(self, source: Path) -> str:
        return " ".join(part for part in (relative_name(self.path, source), self.name) if part)

    def values(self) -> np.ndarray:
        try:
            return open_array(self.path, self.name)
        except ArrayFault as fault:
            raise MdlError(str(fault), self.path, "write the file again") from None


def read(query: Query) -> Listing:
    """List the images of one split in a file or folder of arrays; where no name tells a split, all of them.

    The classes are `classes`, an array `classes` of names beside the labels, or the labels of all splits, sorted.
    Raises MdlError for files and arrays that are not as above.
    """
    if query.annotations is not None:
        raise MdlError("image arrays need no annotations", query.annotations, "leave --annotations out")
    source = query.source
    arrays = _arrays(source)
    pairs = _pairs(arrays, source)
    values = {labels.where: _labels(labels, images) for images, labels in pairs}
    names, label, note = _classes_of(arrays, list(values.values()), query.classes, source)
    own = _of_split(pairs, query.split, source)
    clips = []
    for images, labels in own:
        _check_images(images)
        for row, value in enumerate(values[labels.where].tolist()):
            clip = Clip("", images.path, label(value, f"{labels.where}, row {row}"), item=(images.name, row))
            clips.append(replace(clip, key=key_of(clip_name(clip, source))))
    listed = ", ".join(images.where_in(source) for images, _ in own)
    return finished(names, clips, (), [f"arrays: {listed}", f"labels: {note}"], source)


def _arrays(source: Path) -> list[_Array]:
    """Every array with a role below the source. Raises MdlError where there is none."""
    if not source.exists():
        raise MdlError("there is no such directory or file", source, "give an .npz file, or a folder of arrays")
    files = (
        sorted(p for p in source.rglob("*") if p.suffix.lower() in ARRAY_SUFFIXES) if source.is_dir() else [source]
    )
    found = []
    for path in files:
        try:
            headers = headers_of(path)
        except ArrayFault as fault:
            raise MdlError(str(fault), path, "give .npz or .npy files of plain numbers") from None
        found += [a for name, header in headers.items() if (a := _told(path, name, header)) is not None]
    if not found:
        what = "holds no array of images" if files else "holds no .npz or .npy file"
        raise MdlError(f"this {what}", source, _EXPECTED)
    return found


def _told(path: Path, name: str, header: ArrayHeader) -> _Array | None:
    """The array's role by its name, or None where it has none."""
    words = [word for word in re.split(r"[_\-. ]+", (name or path.stem).lower()) if word]
    outer = [word for word in re.split(r"[_\-. ]+", path.stem.lower()) if word] if name else []
    split = next((word for word in (*words, *outer) if word in _SPLIT_WORDS), "")
    rest = [word for word in words if word not in _SPLIT_WORDS]
    role = _ROLE_OF.get("_".join(rest)) or next((_ROLE_OF[word] for word in rest if word in _ROLE_OF), None)
    if role is None:
        return None
    place = str(path) if name else str(path.parent)
    group = "_".join(word for word in rest if word not in _ROLE_OF)
    return _Array(path, name, role, split, f"{place}:{group}:{split}", header)


def _pairs(arrays: Iterable[_Array], source: Path) -> list[tuple[_Array, _Array]]:
    """(images, labels) of each group. Raises MdlError for groups without one of them, or with several."""
    groups: dict[str, dict[str, list[_Array]]] = defaultdict(lambda: defaultdict(list))
    for array in arrays:
        if array.role != "classes":
            groups[array.group][array.role].append(array)
    pairs = []
    for roles in groups.values():
        counts = Counter({role: len(roles[role]) for role in ("images", "labels")})
        if counts != {"images": 1, "labels": 1}:
            first = next(array for found in roles.values() for array in found)
            what = " and ".join(f"{counts[role]} of {role}" for role in ("images", "labels"))
            raise MdlError(f"images and labels do not pair: {what} belong together", first.where, _EXPECTED)
        pairs.append((roles["images"][0], roles["labels"][0]))
    if not pairs:
        raise MdlError("there is no array of images", source, _EXPECTED)
    return pairs


def _of_split(pairs: Sequence[tuple[_Array, _Array]], split: str, source: Path) -> list[tuple[_Array, _Array]]:
    named = sorted({images.split for images, _ in pairs if images.split})
    if not named:
        return list(pairs)
    chosen = [pair for pair in pairs if pair[0].split and same_split(pair[0].split, split)]
    if not chosen:
        raise MdlError(
            f"no array is of the split '{split}' (there are: {', '.join(named)})", source, "check --split"
        )
    return chosen


def _labels(labels: _Array, images: _Array) -> np.ndarray:
    """[N] integers or texts, one for each image. Raises MdlError."""
    shape, kind = labels.header.shape, labels.header.dtype.kind
    count = images.header.shape[0] if images.header.shape else 0
    if shape not in ((count,), (count, 1)):
        raise MdlError(f"labels of shape {list(shape)} for {count} images", labels.where, "give one label an image")
    if kind not in "iuUS":
        raise MdlError(
            f"labels are {labels.header.dtype}, not whole numbers or names", labels.where, "convert them"
        )
    return _texts(labels) if kind == "S" else labels.values().reshape(-1)


def _texts(array: _Array) -> np.ndarray:
    """An array of texts or bytes as texts, [N]. Raises MdlError for bytes that are no UTF-8."""
    values = array.values().reshape(-1)
    if values.dtype.kind == "U":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise MdlError(f"the {array.role} are no UTF-8 ({error})", array.where, "convert them") from None


def _classes_of(
    arrays: Sequence[_Array], values: Sequence[np.ndarray], classes: Sequence[str] | None, source: Path
) -> tuple[tuple[str, ...], Callable[[Any, str], int], str]:
    """(classes, from a value and where it stands to its label, note). values: of every split."""
    numbers = all(part.dtype.kind in "iu" for part in values)
    seen = sorted({value for part in values for value in np.unique(part).tolist()}, key=None if numbers else str)
    listed = next((array for array in arrays if array.role == "classes"), None)
    names, origin = classes, "from --classes"
    if names is None and listed is not None and listed.header.dtype.kind in "US":
        names, origin = _texts(listed).tolist(), f"from the array {listed.name}"
    if names is None:
        names, origin = [str(value) for value in seen], _SORTED
    elif numbers:
        base = number_base(seen, len(names), source)
        return tuple(names), lambda value, _: value - base, f"numbers from {base}, names {origin}"
    index = {name: i for i, name in enumerate(names)}
    return tuple(names), lambda value, where: label_of(str(value), index, where), origin


def _check_images(images: _Array) -> None:
    shape, dtype = images.header.shape, images.header.dtype
    if dtype != np.uint8:
        raise MdlError(f"the images are {dtype}, not uint8 of 0 to 255", images.where, "scale and convert them")
    if len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise MdlError(f"the images are {list(shape)}, channels first", images.where, "x.transpose(0, 2, 3, 1)")
    if not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))) or 0 in shape:
        raise MdlError(
            f"the images are {list(shape)}, not [N, H, W, 3] or [N, H, W]", images.where, "reshape the array"
        )
