"""EPIC-Kitchens-100 as published: lists of narrated segments, cut by their time stamps (spec cm3t 5.2)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mdltool.data.formats.common import choose_video, finished, in_order, same_split, videos_by_stem
from mdltool.data.formats.query import Query
from mdltool.data.formats.table import Row, read_rows
from mdltool.errors import MdlError
from mdltool.types import Clip, Listing

ACTIONS = 3806
_LISTS = {"train": "EPIC_100_train.csv", "val": "EPIC_100_validation.csv"}
_VERBS = "EPIC_100_verb_classes.csv"
_NOUNS = ("EPIC_100_noun_classes.csv", "EPIC_100_noun_classes_v2.csv")
_INFO = "EPIC_100_video_info.csv"
_UNSEEN = "EPIC_100_unseen_participant_ids_validation.csv"
_TAILS = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}
_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "verb_class",
    "noun_class",
)
_HINT = "use EPIC_100_train.csv or EPIC_100_validation.csv: EPIC-Kitchens-55 has other columns, test no labels"
_ID = re.compile(r"[A-Za-z0-9_-]+")
_TIME = re.compile(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)")


@dataclass(frozen=True)
class _Segment:
    """A row of a list. start_s, stop_s: seconds of the video. pair: verb and noun."""

    key: str
    participant: str
    video: str
    start_s: float
    stop_s: float
    pair: tuple[int, int]


@dataclass(frozen=True)
class _Lists:
    """What the files say. own: of the split; dropped: rows of no length; clamped: rows that end after their video.
    actions: the distinct pairs of the lists named in `of`. subsets: name -> keys.
    """

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    own: tuple[_Segment, ...]
    dropped: int
    clamped: int
    actions: tuple[tuple[int, int], ...]
    of: tuple[str, ...]
    subsets: Mapping[str, tuple[str, ...]]


def read(query: Query) -> Listing:
    """List the segments of a split, labelled with verb and noun.

    source: holds <participant>/videos/<video>.MP4, <participant>/<video>.* or the videos flat. annotations: the
    folder of the published CSV files, or one list in it; classes, pairs and subsets come from the files beside it.
    Raises MdlError for what is wrong with the files, for lists without labels, and for --classes.
    """
    lists, path = _read(query)
    clips, absent = _clips(query.source, lists.own, {pair: pair for pair in lists.actions})
    names, missing = (*lists.verbs, *lists.nouns), _missing(absent, query.source)
    listing = finished(names, clips, missing, _notes(lists), path, "verb_noun", absent)
    return replace(listing, verbs=len(lists.verbs), actions=lists.actions, subsets=lists.subsets)


def read_actions(query: Query) -> Listing:
    """As `read`, with the actions as the classes of one label space, in the order of the valid pairs."""
    lists, path = _read(query)
    clips, absent = _clips(query.source, lists.own, {pair: i for i, pair in enumerate(lists.actions)})
    names = [f"{lists.verbs[verb]} {lists.nouns[noun]}" for verb, noun in lists.actions]
    listing = finished(names, clips, _missing(absent, query.source), _notes(lists), path, absent=absent)
    return replace(listing, subsets=lists.subsets)


def _read(query: Query) -> tuple[_Lists, Path]:
    """(what the files say, the split's list)."""
    query.folder()
    if query.classes is not None:
        raise MdlError("the classes are those of the published files", "--classes", "leave it out")
    path = _list_file(query)
    rows = read_rows(path, _COLUMNS, _HINT)
    verbs, nouns = _class_list(path.parent, (_VERBS,)), _class_list(path.parent, _NOUNS)
    durations = _durations(path.parent / _INFO)
    found = [_segment(row, (len(verbs), len(nouns))) for row in rows]
    cut = [replace(s, stop_s=min(s.stop_s, durations.get(s.video, s.stop_s))) for s in found]
    own = tuple(s for s in cut if s.stop_s > s.start_s)
    clamped = sum(b.start_s < b.stop_s < a.stop_s for a, b in zip(found, cut, strict=True))
    lists = [path, *(p for name in _LISTS.values() if (p := path.parent / name).is_file() and p != path)]
    pairs = {s.pair for s in found} | {pair for other in lists[1:] for pair in _pairs(other)}
    _check_pairs(pairs, (len(verbs), len(nouns)), path)
    subsets = {} if same_split("train", query.split) else _subsets(path.parent, own)
    names, lost = tuple(sorted(p.name for p in lists)), len(cut) - len(own)
    return _Lists(verbs, nouns, own, lost, clamped, tuple(sorted(pairs)), names, subsets), path


def _list_file(query: Query) -> Path:
    annotations = query.given("the folder of the published CSV files", "--annotations FOLDER")
    if not annotations.is_dir():
        return annotations
    name = next((name for part, name in _LISTS.items() if same_split(part, query.split)), None)
    if name is None:
        what = f"no labelled list is of '{query.split}'"
        raise MdlError(what, annotations, "--split train or val: test has no labels")
    if not (annotations / name).is_file():
        raise MdlError(f"the folder has no {name}", annotations, "get it, or give another list as --annotations")
    return annotations / name


def _class_list(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise MdlError(f"there is no {names[0]} beside the list", folder, "put the published class files there")
    rows = read_rows(path, ("id", "key"), "restore the published file")
    found, first = in_order({row["key"]: row["id"] for row in rows}, path)
    if first != 0 or len(found) != len(rows):
        raise MdlError("the classes are not numbered from 0, each by its own key", path, "restore the file")
    return found


def _durations(path: Path) -> dict[str, float]:
    """Video -> its length in seconds, as far as the published file is there and says it."""
    if not path.is_file():
        return {}
    rows = read_rows(path, ("video_id", "duration"), "restore the published file")
    return {row["video_id"]: length for row in rows if (length := row.seconds("duration"))}


def _segment(row: Row, sizes: tuple[int, int]) -> _Segment:
    verb, noun = _pair(row)
    if not (verb < sizes[0] and noun < sizes[1]):
        what = f"verb {verb} and noun {noun} are not among {sizes[0]} verbs and {sizes[1]} nouns"
        raise MdlError(what, row.where, "take lists and class files of one release")
    start_s, stop_s = _seconds(row, "start_timestamp"), _seconds(row, "stop_timestamp")
    if not _ID.fullmatch(row["narration_id"]):
        raise MdlError(f"'{row['narration_id']}' is no narration_id", row.where, "e.g. P01_11_0: restore the file")
    return _Segment(row["narration_id"], row["participant_id"], row["video_id"], start_s, stop_s, (verb, noun))


def _pair(row: Row) -> tuple[int, int]:
    texts = row["verb_class"], row["noun_class"]
    if not all(text.isdecimal() for text in texts):
        raise MdlError(f"{texts!r} are no numbers of a verb and a noun", row.where, "restore the published file")
    return int(texts[0]), int(texts[1])


def _seconds(row: Row, column: str) -> float:
    match = _TIME.fullmatch(row[column])
    if match is None:
        raise MdlError(f"'{row[column]}' in column '{column}' is no time", row.where, "HH:MM:SS.ss")
    return round(3600 * int(match[1]) + 60 * int(match[2]) + float(match[3]), 6)


def _pairs(path: Path) -> set[tuple[int, int]]:
    return {_pair(row) for row in read_rows(path, ("verb_class", "noun_class"), _HINT)}


def _check_pairs(pairs: Iterable[tuple[int, int]], sizes: tuple[int, int], where: Path) -> None:
    """Raises MdlError for a pair of another list that the class files do not know."""
    bad = [pair for pair in pairs if pair[0] >= sizes[0] or pair[1] >= sizes[1]]
    if bad:
        what = f"a list beside it has verb {bad[0][0]} and noun {bad[0][1]}, which the class files have not"
        raise MdlError(what, where, "take lists and class files of one release")


def _subsets(folder: Path, segments: Sequence[_Segment]) -> dict[str, tuple[str, ...]]:
    """The published subsets of a validation list, as far as their files are there.

    unseen: participants that training has not; seen: the others. tail_verb, tail_noun: segments of the smallest
    classes; tail_action: of a tail verb or a tail noun (EPIC-Kitchens-100, action recognition challenge).
    """
    found: dict[str, tuple[str, ...]] = {}
    if (folder / _UNSEEN).is_file():
        unseen = {row["participant_id"] for row in read_rows(folder / _UNSEEN, ("participant_id",), "restore it")}
        found["unseen"] = tuple(s.key for s in segments if s.participant in unseen)
        found["seen"] = tuple(s.key for s in segments if s.participant not in unseen)
    for i, (name, file) in enumerate(_TAILS.items()):
        if (folder / file).is_file():
            tail = {row[name] for row in read_rows(folder / file, (name,), "restore it")}
            found[f"tail_{name}"] = tuple(s.key for s in segments if str(s.pair[i]) in tail)
    if "tail_verb" in found and "tail_noun" in found:
        either = {*found["tail_verb"], *found["tail_noun"]}
        found["tail_action"] = tuple(s.key for s in segments if s.key in either)
    return {name: keys for name, keys in found.items() if keys}


def _clips(
    source: Path, segments: Sequence[_Segment], labels: Mapping[tuple[int, int], int | tuple[int, int]]
) -> tuple[list[Clip], list[Clip]]:
    """(clips, those whose video is not there)."""
    videos = videos_by_stem(source)
    clips: list[Clip] = []
    absent: list[Clip] = []
    for segment in segments:
        there = videos.get(segment.video)
        expected = source / segment.participant / "videos" / f"{segment.video}.MP4"
        video = choose_video(there, "videos") if there else expected
        clip = Clip(segment.key, video, labels[segment.pair], segment.start_s, segment.stop_s)
        (clips if there else absent).append(clip)
    return clips, absent


def _missing(absent: Sequence[Clip], source: Path) -> list[tuple[str, str]]:
    return [(clip.key, f"no file {clip.video.relative_to(source).with_suffix('.*')}") for clip in absent]


def _notes(lists: _Lists) -> list[str]:
    count = len(lists.actions)
    notes = [
        f"segments: {len(lists.own)} of {len({s.video for s in lists.own})} videos",
        f"verbs: {len(lists.verbs)}; nouns: {len(lists.nouns)}",
        f"actions: {count} pairs of {' and '.join(lists.of)}",
    ]
    if count != ACTIONS:
        notes.append(f"warning: the published lists of training and validation have {ACTIONS} actions, not {count}")
    if lists.dropped:
        notes.append(f"left out: {lists.dropped} segments without length")
    if lists.clamped:
        notes.append(f"cut: {lists.clamped} segments end after their video")
    sizes = Counter({name: len(keys) for name, keys in lists.subsets.items()})
    if sizes:
        notes.append("subsets: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))
    return notes
