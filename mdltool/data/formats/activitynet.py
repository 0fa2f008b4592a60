"""ActivityNet as published: one JSON file; annotated segments are cut into clips of 10 s."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdltool.data.formats.common import key_of, same_split
from mdltool.data.formats.gather import Gathering
from mdltool.data.formats.json_file import object_of, read_json
from mdltool.data.formats.query import Query
from mdltool.errors import MdlError
from mdltool.types import Listing

CLIP_MS = 10_000
SHORTEST_MS = 1_000  # of the piece that is left at a segment's end: less shows hardly any of an action
_LONGEST_S = 86_400.0
_FIX = "use the published file, e.g. activity_net.v1-3.min.json"


@dataclass(frozen=True)
class _Video:
    """video_id: without v_. pieces: (start_ms, end_ms, class name, where), each span once."""

    video_id: str
    subset: str | None
    pieces: tuple[tuple[int, int, str, str], ...]


@dataclass
class _Found:
    """What reading the file counted. labels: of all subsets."""

    labels: set[str] = field(default_factory=set)
    segments: int = 0
    too_short: int = 0
    repeated: int = 0


def read(query: Query) -> Listing:
    """List the annotated segments of a subset in pieces of 10 s.

    source: holds v_<id>.mp4 or <id>.mp4, flat or in folders. A rest below 1 s at a segment's end is left out. Of
    several labels of one span the first counts. The classes are the labels of the whole file, sorted, unless
    `classes` fixes them (needed for excerpts). Raises MdlError for what is wrong with the file, and for a subset
    without labels, as the published testing one.
    """
    source = query.folder()
    path = _json_file(query)
    found = _Found()
    videos = [_video(video_id, entry, path, query.split, found) for video_id, entry in _database(path).items()]
    names = query.classes or tuple(sorted(found.labels))
    gathering = Gathering(source, names)
    wanted = _of_split(videos, query.split, path)
    for video in wanted:
        stem = f"v_{video.video_id}"
        candidates = gathering.videos.get(stem) or gathering.videos.get(video.video_id)
        for start_ms, end_ms, name, where in video.pieces:
            span = (start_ms / 1000, end_ms / 1000)
            absent = (key_of(stem, *span), f"no file {stem}.* or {video.video_id}.*")
            gathering.take(candidates, name, where, absent, span)
    return gathering.listing(_notes(videos, wanted, found, query), path)


def _json_file(query: Query) -> Path:
    annotations = query.given("the ActivityNet JSON file", "--annotations activity_net.v1-3.min.json")
    if not annotations.is_dir():
        return annotations
    files = sorted(annotations.glob("activity_net*.json"))
    if len(files) != 1:
        raise MdlError(f"this folder holds {len(files)} files activity_net*.json", annotations, "give the file")
    return files[0]


def _database(path: Path) -> dict[str, Any]:
    content = object_of(read_json(path), path)
    videos = object_of(content.get("database", content), f"{path}, database")
    if not videos:
        raise MdlError("the file lists no videos", path, _FIX)
    return videos


def _video(video_id: str, entry: Any, path: Path, split: str, found: _Found) -> _Video:
    where = f"{path}, {video_id}"
    entry = object_of(entry, where)
    subset = entry.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise MdlError(f"the subset is {subset!r:.40}", where, _FIX)
    annotations = entry.get("annotations", [])
    if not isinstance(annotations, list):
        raise MdlError(f"'annotations' is {annotations!r:.40}, no list", where, _FIX)
    limit_ms = _limit_ms(entry, where)
    counted = found if subset is None or same_split(subset, split) else _Found(found.labels)
    pieces: dict[tuple[int, int], tuple[int, int, str, str]] = {}
    for number, annotation in enumerate(annotations):
        here = f"{where}, annotation {number}"
        start_ms, end_ms, label = _segment(object_of(annotation, here), here)
        found.labels.add(label)
        counted.segments += 1
        for span in _cut(start_ms, min(end_ms, limit_ms), counted):
            counted.repeated += span in pieces
            pieces.setdefault(span, (*span, label, here))
    return _Video(video_id.removeprefix("v_") or video_id, subset, tuple(pieces.values()))


def _limit_ms(entry: dict[str, Any], where: str) -> int:
    """The video's length; published segments end after it now and then."""
    duration_s = entry.get("duration", entry.get("duration_second"))
    return _ms(duration_s or _LONGEST_S, where)


def _segment(annotation: dict[str, Any], where: str) -> tuple[int, int, str]:
    segment, label = annotation.get("segment"), annotation.get("label")
    if isinstance(label, list) and label:
        label = label[0]
    if not isinstance(label, str) or not label.strip():
        raise MdlError(f"the label is {label!r:.40}", where, _FIX)
    if not isinstance(segment, list) or len(segment) != 2:
        raise MdlError(f"the segment is {segment!r:.60}, not [start, end]", where, _FIX)
    return _ms(segment[0], where), _ms(segment[1], where), label.strip()


def _ms(seconds: Any, where: str) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise MdlError(f"{seconds!r:.40} is no time in seconds", where, _FIX)
    if not 0 <= seconds <= _LONGEST_S:
        raise MdlError(f"{seconds:g} s is no time in a video", where, _FIX)
    return round(seconds * 1000)


def _cut(start_ms: int, end_ms: int, found: _Found) -> Iterator[tuple[int, int]]:
    """The segment in pieces of 10 s from its start, the last one shorter; a last one below 1 s is left out."""
    if end_ms - start_ms < SHORTEST_MS:
        found.too_short += 1
        return
    for start in range(start_ms, end_ms, CLIP_MS):
        end = min(start + CLIP_MS, end_ms)
        if end - start >= SHORTEST_MS:
            yield start, end
        else:
            found.too_short += 1


def _of_split(videos: Sequence[_Video], split: str, path: Path) -> list[_Video]:
    """The videos of a subset, or all where the file has no subsets. Raises MdlError when none has labels."""
    subsets = Counter(video.subset for video in videos if video.subset is not None)
    chosen = [v for v in videos if not subsets or (v.subset is not None and same_split(v.subset, split))]
    if not any(video.pieces for video in chosen):
        known = ", ".join(f"{name} {count}" for name, count in sorted(subsets.items())) or "no subsets"
        raise MdlError(f"no labelled video is of '{split}' (the file has: {known})", path, "--split train or val")
    return chosen


def _notes(videos: Sequence[_Video], wanted: Sequence[_Video], found: _Found, query: Query) -> list[str]:
    subsets = Counter(video.subset for video in videos if video.subset is not None)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(subsets.items()))
    pieces = sum(len(video.pieces) for video in wanted)
    notes = [
        f"videos: {counts}" if counts else f"videos: {len(videos)}, all taken: this file names no subsets",
        "labels: " + query.origin("those of the whole file, sorted (excerpt: give --classes)"),
        f"segments: {found.segments} cut into {pieces} clips of at most {CLIP_MS // 1000} s",
    ]
    if found.too_short:
        notes.append(f"left out: {found.too_short} pieces below {SHORTEST_MS // 1000} s")
    if found.repeated:
        notes.append(f"repeated: {found.repeated} spans are listed more than once, the first label counts")
    return notes
