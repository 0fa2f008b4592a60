"""Transcripts by time: CSV, JSON, SubRip (.srt) and WebVTT files to the utterances of a clip.

CSV: columns start,end,text and, where wanted, speaker and video. JSON: a list of such objects, {"segments": [...]}
or {video: [...]}. Times are seconds from the video's first frame, or [hours:]minutes:seconds.
"""

from __future__ import annotations

import csv
import functools
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from mdltool.data.formats.common import VIDEO_SUFFIXES
from mdltool.data.modalities import Absent, Part, Utterance
from mdltool.errors import MdlError

SUBTITLES = frozenset((".srt", ".vtt"))
TRANSCRIPTS = SUBTITLES | {".csv", ".json"}
_EVERY_VIDEO = ""
_ARROW = re.compile(r"^\s*([\d:.,]+)\s*-->\s*([\d:.,]+)")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d\d[\d:.]*>|\{\\[^}]*\}")
_VOICE = re.compile(r"<v(?:\.[^ >]*)? ([^>]*)>")
Lines = Mapping[str, list[Utterance]]  # video (empty: any) -> what is said in it


@dataclass(frozen=True)
class TextOptions:
    """speaker: whose utterances are taken; empty: everybody's. In .srt files an utterance names its speaker first,
    "NAME: ..."."""

    speaker: str = ""
    kind: ClassVar[str] = "text"

    def check(self, where: str) -> None:
        """Any speaker may be asked for."""


def read_text(part: Part, side: Path | None, names: Iterable[str], options: TextOptions) -> list[Utterance]:
    """The utterances that overlap the clip, in order, in seconds from its start. names: of the clip's video.

    Raises Absent where there are none, MdlError for a file that cannot be read.
    """
    if side is None:
        raise Absent("there is no transcript of this video")
    videos = read_transcript(side)
    said = next((videos[name] for name in (*names, _EVERY_VIDEO) if name in videos), [])
    said = [own for own in (_of_speaker(utterance, options.speaker) for utterance in said) if own is not None]
    if not said:
        who = f" of {options.speaker}" if options.speaker else ""
        raise Absent(f"the transcript {side.name} has no utterance{who} of this video")
    ends_s = max(utterance.end_s for utterance in said)
    stop_s = part.stop_s if part.duration_s else math.inf
    own = sorted((u for u in said if u.start_s < stop_s and u.end_s > part.start_s), key=lambda u: u.start_s)
    if not own and ends_s <= part.start_s:
        raise Absent(f"the transcript {side.name} ends at {ends_s:g} s, before the clip (from {part.start_s:g} s)")
    if not own:
        raise Absent("nothing is said in the clip")
    return [_shifted(utterance, part.start_s) for utterance in own]


def encode_text(utterances: Iterable[Utterance]) -> list[dict[str, Any]]:
    """As it stands in JSON."""
    return [{name: value for name, value in asdict(u).items() if value != ""} for u in utterances]


@functools.lru_cache(maxsize=64)
def read_transcript(path: Path) -> Lines:
    """The utterances of a file, by video. Raises MdlError that names the line."""
    readers = {".csv": _read_csv, ".json": _read_json, ".srt": _read_subtitles, ".vtt": _read_subtitles}
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise MdlError(f"the transcript cannot be read ({error.strerror})", path, "check --side") from None
    except UnicodeDecodeError:
        raise MdlError("the transcript is not UTF-8 text", path, "save it as UTF-8") from None
    return readers[path.suffix.lower()](text, path)


def _read_csv(text: str, path: Path) -> Lines:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        first, *rest = [(rows.line_num, row) for row in rows if row] or [(1, [])]
    except csv.Error as error:
        where = f"{path}, before line {rows.line_num + 1}"
        raise MdlError(f"the transcript is not CSV ({error})", where, "close what is quoted") from None
    header = [name.strip().lower() for name in first[1]]
    absent = [name for name in ("start", "end", "text") if name not in header]
    if absent:
        raise MdlError(
            f"the transcript has no column '{absent[0]}' (it has: {', '.join(header)})",
            path,
            "name the columns start,end,text[,speaker][,video] in the first line",
        )
    return _by_video((_cells(header, row, f"{path}, line {n}"), f"{path}, line {n}") for n, row in rest)


def _cells(header: Sequence[str], row: Sequence[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        what = f"the row has {len(row)} cells, the first line {len(header)}"
        raise MdlError(what, where, 'quote text that has a comma ("well, yes"), write 1.5 for 1,5')
    return dict(zip(header, row, strict=True))


def _read_json(text: str, path: Path) -> Lines:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MdlError(f"the transcript is not JSON ({error})", path, "correct the file") from None
    if isinstance(content, dict) and isinstance(content.get("segments"), list):
        content = content["segments"]
    if isinstance(content, list):
        return _by_video((entry, f"{path}, entry {number}") for number, entry in enumerate(content))
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise MdlError(
            "the transcript is no list of utterances",
            path,
            'write [{"start": 0.0, "end": 1.5, "text": "..."}, ...]',
        )
    entries = ((name, i, entry) for name, own in content.items() for i, entry in enumerate(own))
    return _by_video(
        ({**entry, "video": name} if isinstance(entry, dict) else entry, f"{path}, {name}, entry {i}")
        for name, i, entry in entries
    )


def _read_subtitles(text: str, path: Path) -> Lines:
    found: list[Utterance] = []
    for lines in _cues(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        match = _ARROW.match(lines[0])
        where = f"{path}: {lines[0].strip()}"
        if match is None:
            raise MdlError("this line has no times", where, "write 00:00:01,000 --> 00:00:02,500")
        body = " ".join(line.strip() for line in lines[1:])
        voice = _VOICE.search(body)
        said = html.unescape(_TAG.sub("", body)).strip()
        row = {"start": match[1], "end": match[2], "text": said, "speaker": voice[1].strip() if voice else ""}
        found += _utterances(row, where)
    return {_EVERY_VIDEO: found}


def _cues(lines: Iterable[str]) -> list[list[str]]:
    """The line of times of each cue, and what is said.

    A cue ends at a blank line, or where the next one's times follow, with or without a number above them.
    """
    cues: list[list[str]] = []
    inside = False
    for line in lines:
        if "-->" in line and (not inside or _ARROW.match(line)):
            if inside and len(cues[-1]) > 1 and cues[-1][-1].strip().isdecimal():
                cues[-1].pop()
            cues.append([line])
            inside = True
        elif inside and line.strip():
            cues[-1].append(line)
        else:
            inside = False
    return cues


def _by_video(rows: Iterable[tuple[Any, str]]) -> Lines:
    videos: dict[str, list[Utterance]] = {}
    for row, where in rows:
        if not isinstance(row, dict):
            raise MdlError("this is no utterance", where, 'write {"start": 0.0, "end": 1.5, "text": "..."}')
        name, suffix = os.path.splitext(str(row.get("video") or _EVERY_VIDEO).strip())
        video = name if suffix.lower() in VIDEO_SUFFIXES else name + suffix
        videos.setdefault(video, []).extend(_utterances(row, where))
    return videos


def _utterances(row: Mapping[str, Any], where: str) -> list[Utterance]:
    """The row's utterance; none where nothing is said."""
    start_s, end_s = (_seconds(row.get(name), name, where) for name in ("start", "end"))
    if end_s < start_s:
        raise MdlError(f"the utterance ends at {end_s:g} s, before it starts", where, "correct its times")
    text = " ".join(str(row.get("text") or "").split())
    return [Utterance(start_s, end_s, text, str(row.get("speaker") or "").strip())] if text else []


def _seconds(value: Any, name: str, where: str) -> float:
    """A time as a number of seconds or as [hours:]minutes:seconds."""
    try:
        parts = [float(part) for part in str(value).replace(",", ".").split(":")]
    except ValueError:
        parts = [math.nan]
    seconds = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    if not (math.isfinite(seconds) and seconds >= 0 and len(parts) <= 3):
        raise MdlError(f"'{value}' in '{name}' is no time", where, "write seconds, or 00:01:02.500")
    return seconds


def _of_speaker(utterance: Utterance, speaker: str) -> Utterance | None:
    if not speaker or utterance.speaker == speaker:
        return utterance
    before, colon, text = utterance.text.partition(":")
    if not utterance.speaker and colon and before.strip() == speaker and text.strip():
        return Utterance(utterance.start_s, utterance.end_s, text.strip(), speaker)
    return None


def _shifted(utterance: Utterance, by_s: float) -> Utterance:
    start_s, end_s = (round(time - by_s, 6) for time in (utterance.start_s, utterance.end_s))
    return Utterance(start_s, end_s, utterance.text, utterance.speaker)
