"""MPIIGroupInteraction, bodily behaviours, as the public challenge distributes it: snippets and a CSV of 0 and 1.

Of the layout, what is publicly described: snippets `clips_<split>/00001-video.mp4`, one column a behaviour. The
names of the microphones' files are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mdltool.data.formats.common import finished, key_of, label_notes, relative_name, same_split, walk_videos
from mdltool.data.formats.multilabel import is_one
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import Row, read_rows
from mdltool.errors import MdlError
from mdltool.registry import did_you_mean
from mdltool.types import Clip, Listing

SOUNDS = frozenset((".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"))
MICROPHONES = tuple(f"audio_mic{number}" for number in range(4))
_CLIP = re.compile(r"(\d+)(?:-video)?")
_MICROPHONE = re.compile(r"(\d+)-(?:audio|mic)([0-3])")
_HINT = "the first column names the snippet (00001 or 00001-video.mp4), each other one is a behaviour, 0 or 1"


def read(query: Query) -> Listing:
    """List the snippets of a split.

    source: holds clips_<split>/, where need be further inside, or is it. annotations: the split's CSV file, or a
    folder with one whose name has the split. The classes are its columns, or those that `classes` chooses. Beside a
    snippet, 00001-audio0.wav (or mic0; 0..3) are its microphones: the sides audio_mic0..3. Raises MdlError for what
    is wrong with the files.
    """
    source = query.folder()
    path = _list_file(query.place, query.split)
    rows = read_rows(path, (), _HINT)
    names = _names(rows[0], query.classes, path)
    folder = _folder(source, query.split)
    videos = {m[1].lstrip("0"): v for v in walk_videos(folder) if (m := _CLIP.fullmatch(v.stem))}
    sounds = _microphones(folder)
    clips: list[Clip] = []
    missing: list[tuple[str, str]] = []
    for row in rows:
        number = _number(row)
        label = tuple(i for i, name in enumerate(names) if is_one(row, name))
        video = videos.get(number.lstrip("0"))
        if video is None:
            missing.append((key_of(f"clips_{query.split}/{number}"), f"no file {number}-video.*"))
            continue
        key = key_of(relative_name(video, source))
        clips.append(Clip(key, video, label, sides=sounds.get(number.lstrip("0"), {})))
    heard = sum(bool(clip.sides) for clip in clips)
    notes = [f"list: {path.name}, {len(rows)} snippets, {len(names)} behaviours", *label_notes(clips)]
    notes += [f"microphones: beside {heard} snippets"] if heard else []
    return replace(finished(names, clips, missing, notes, path, "multi_label"), sides=MICROPHONES)


def _folder(source: Path, split: str) -> Path:
    """Where the split's snippets lie; the source itself where nothing there is called clips_... .

    Snippets of every split count from 1: those of another would be taken for this one's.
    """
    found = [f for f in (source, *sorted(source.rglob("clips_*"))) if f.is_dir() and f.name.startswith("clips_")]
    own = [f for f in found if same_split(f.name.removeprefix("clips_"), split)]
    if found and not own:
        names = ", ".join(dict.fromkeys(f.name for f in found))
        raise MdlError(f"no folder has the snippets of '{split}' (there is: {names})", source, f"clips_{split}/")
    return own[0] if own else source


def _list_file(place: Path, split: str) -> Path:
    if not place.is_dir():
        return place
    found = [path for path in sorted(place.glob("*.csv")) if split in re.split(r"[\W_]+", path.stem.lower())]
    if len(found) != 1:
        what = f"the folder has {len(found)} CSV files with '{split}' in their names"
        raise MdlError(what, place, "give the split's list as --annotations FILE")
    return found[0]


def _names(row: Row, classes: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    own = row.header[1:]
    for name in classes or ():
        if name not in own:
            raise MdlError(f"the CSV file has no column '{name}'", path, did_you_mean(name, own))
    if not own:
        raise MdlError("the CSV file has no behaviours", path, _HINT)
    return tuple(classes or own)


def _number(row: Row) -> str:
    text = row[row.header[0].lower()]
    match = _CLIP.fullmatch(Path(text).stem)
    if match is None:
        raise MdlError(f"'{text}' is no snippet", row.where, _HINT)
    return match[1]


def _microphones(folder: Path) -> dict[str, dict[str, Path]]:
    """Snippet -> audio_mic0 ... -> file."""
    found: dict[str, dict[str, Path]] = {}
    for file in walk_videos(folder, SOUNDS):
        if match := _MICROPHONE.fullmatch(file.stem):
            found.setdefault(match[1].lstrip("0"), {})[f"audio_mic{match[2]}"] = file
    return found
