"""HMDB51 as published: one <class>_test_splitN.txt per class and fold; 1 is training, 2 test, 0 neither."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from mdltool.data.formats.common import key_of, label_of, official_part, read_lines
from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing

_FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits", "splits")
_USE = {"train": "1", "eval": "2"}


def read(query: Query) -> Listing:
    """List one of the three official folds; val and test both mean the videos marked 2.

    source: holds <class>/<video>, or the videos flat. annotations: the folder of the split files; without it,
    testTrainMulti_7030_splits/ in or beside `source`. Raises MdlError for missing or malformed split files.
    """
    source = query.folder()
    files = _split_files(query)
    use = _USE[official_part(query.split, query.place)]
    names = query.classes or tuple(files)
    gathering = Gathering(source, names)
    counts: Counter[str] = Counter()
    for class_name, path in files.items():
        label_of(class_name, gathering.index, str(path))  # a list of an unlisted class is a fault, used or not
        for number, line in read_lines(path):
            name, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2") or not name:
                raise MdlError(
                    f"expected '<file> 0|1|2', found '{line}'", f"{path}, line {number}", "restore the file"
                )
            counts[mark] += 1
            if mark != use:
                continue
            file = name.strip()
            absent = (f"{class_name}/{key_of(file)}", f"no file {class_name}/{file}")
            gathering.take(gathering.videos.get(Path(file).stem), class_name, str(path), absent)
    marked = f"{counts['1']} train, {counts['2']} test, {counts['0']} unused"
    notes = [f"lists: {len(files)} files of fold {query.fold}: {marked}", "labels: class names, sorted"]
    return gathering.listing(notes, next(iter(files.values())).parent)


def _split_files(query: Query) -> dict[str, Path]:
    """Class name -> its split file, sorted by name."""
    roots = [query.annotations] if query.annotations else [query.source, query.source.parent]
    places = [place for root in roots for place in (root, *(root / name for name in _FOLDERS))]
    for place in places:
        found = {}
        for path in place.glob(f"*_test_split{query.fold}.txt"):
            found[re.sub(r"_test_split\d+\.txt$", "", path.name)] = path
        if found:
            return dict(sorted(found.items()))
    raise MdlError(
        f"there are no split files '<class>_test_split{query.fold}.txt'",
        roots[0],
        "--annotations FOLDER (the unpacked test_train_splits) and --fold 1, 2 or 3",
    )
