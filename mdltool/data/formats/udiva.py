"""UDIVA v0.5: two participants a session, both filmed from the front in four tasks, with Big Five scores.

Of the layout, what public descriptions and code agree on: metadata CSV files of sessions and participants, and
recordings <task>_recordings_<split>/<session>/FC1_T.mp4, FC1 of the first participant, T the task's letter. Where
sound and transcripts lie is taken from their names alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mdltool.data.decode import check_video
from mdltool.data.formats.common import finished, key_of, relative_name, walk_videos
from mdltool.data.formats.gather import Span
from mdltool.data.formats.query import Query
from mdltool.data.formats.regression import number_of, spread_notes
from mdltool.data.formats.table import Row, read_rows
from mdltool.data.video import VideoError
from mdltool.errors import MdlError
from mdltool.types import Clip, Listing

WINDOW_MS = 2560  # 32 frames at 12.5 fps (spec cm3t 5.2)
TRAITS = (
    "OPENMINDEDNESS_Z",
    "CONSCIENTIOUSNESS_Z",
    "EXTRAVERSION_Z",
    "AGREEABLENESS_Z",
    "NEGATIVEEMOTIONALITY_Z",
)
SIDES = ("audio_self", "audio_other", "text_self", "text_other", "text")
_CAMERA = re.compile(r"FC([12])_([A-Z])")
_SOUNDS = frozenset((".flac", ".wav"))
_TRANSCRIPTS = frozenset((".srt",))
_HINT = "use the published metadata: sessions_<split>.csv and parts_<split>.csv (or parts_<split>_unmasked.csv)"
Recording = tuple[str, str, int]
"""Session, the task's letter, and the participant: 1 or 2."""


def read(query: Query) -> Listing:
    """List windows of 2.56 s, one after the other, of every recording of a split.

    source: the folder of the recordings. annotations: that of the metadata (default: the source). The targets are
    the five standardised traits, or the columns that `classes` chooses. Sides: audio_self and audio_other, the
    sound file beside a recording or the recording itself; text_self and text_other, transcripts of one participant,
    or text, one of both. Without any sound file audio_self is no side, but every recording's own track. Raises
    MdlError for what is wrong with the files.
    """
    source = query.folder()
    names = query.classes or TRAITS
    sessions, where = _sessions(query.place, query.split)
    labels = _labels(query.place, query.split, names)
    files = _files(source, sessions)
    clips: list[Clip] = []
    missing: list[tuple[str, str]] = []
    people: dict[str, list[str]] = {}
    for session, pair in sorted(sessions.items()):
        own = [recording for recording in files["video"] if recording[0] == session]
        if not own:
            missing.append((key_of(session), f"no recording FC1_*.* or FC2_*.* in a folder {session}"))
        for recording in sorted(own):
            person = pair[recording[2] - 1]
            if person not in labels:
                raise MdlError(f"the participant {person} of session {session} has no scores", where, _HINT)
            try:
                found = _windows(recording, files, labels[person], source)
            except VideoError as error:
                missing.append((key_of(relative_name(files["video"][recording], source)), error.reason))
                continue
            clips += found
            people.setdefault(person, []).extend(clip.key for clip in found)
    notes = [f"sessions: {len(sessions)}; participants: {len(people)}", f"windows: of {WINDOW_MS / 1000} s"]
    notes += spread_notes(names, clips)
    listing = finished(names, clips, missing, notes, where, "regression")
    participants = {person: tuple(keys) for person, keys in people.items()}
    return replace(listing, participants=participants, sides=SIDES if files["sound"] else SIDES[1:])


def _metadata(place: Path, names: Sequence[str]) -> Path:
    found = [path for name in names for path in sorted(place.rglob(name))]
    if not found:
        raise MdlError(f"there is no {names[-1]}", place, _HINT)
    return found[0]


def _sessions(place: Path, split: str) -> tuple[dict[str, tuple[str, str]], Path]:
    """(session -> its two participants, the file)."""
    path = _metadata(place, (f"sessions_{split}.csv",))
    rows = read_rows(path, ("id", "part.1", "part.2"), _HINT)
    return {row["id"].zfill(6): (_id(row, "part.1"), _id(row, "part.2")) for row in rows}, path


def _labels(place: Path, split: str, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    path = _metadata(place, (f"parts_{split}_unmasked.csv", f"parts_{split}.csv"))
    rows = read_rows(path, ("id", *(name.lower() for name in names)), f"{_HINT}; masked files have no scores")
    return {_id(row, "id"): tuple(number_of(row, name) for name in names) for row in rows}


def _id(row: Row, column: str) -> str:
    return row[column].lstrip("0") or "0"


def _files(source: Path, sessions: Mapping[str, object]) -> dict[str, dict[Recording, Path]]:
    """video, sound, transcript -> recording -> file; a transcript of both participants is that of participant 0."""
    found: dict[str, dict[Recording, Path]] = {"video": {}, "sound": {}, "transcript": {}}
    for noun, suffixes in (("video", None), ("sound", _SOUNDS), ("transcript", _TRANSCRIPTS)):
        walk = walk_videos(source) if suffixes is None else walk_videos(source, suffixes)
        for path in walk:
            recording = _recording(path, sessions)
            if recording is not None and (recording[2] or noun == "transcript"):
                found[noun].setdefault(recording, path)
    return found


def _recording(path: Path, sessions: Mapping[str, object]) -> Recording | None:
    """What a file is of: its name has the camera and the task, its folder or name the session."""
    session = next((part for part in (path.parent.name, *path.stem.split("_")) if part in sessions), None)
    if session is None:
        return None
    if match := _CAMERA.search(path.stem):
        return session, match[2], int(match[1])
    letters = [part for part in path.stem.split("_") if part in ("T", "A", "L", "G")]
    return (session, letters[0], 0) if letters else None


def _windows(
    recording: Recording, files: Mapping[str, Mapping[Recording, Path]], label: tuple[float, ...], source: Path
) -> list[Clip]:
    """The windows of one recording; a rest is left out, and of a shorter recording all is one window."""
    video = files["video"][recording]
    sides = _sides(recording, files)
    count = int(1000 * check_video(video, full=False).duration_s) // WINDOW_MS
    spans: list[Span] = [(i * WINDOW_MS / 1000, (i + 1) * WINDOW_MS / 1000) for i in range(count)]
    name = relative_name(video, source)
    return [Clip(key_of(name, *span), video, label, *span, sides=sides) for span in spans or [(None, None)]]


def _sides(recording: Recording, files: Mapping[str, Mapping[Recording, Path]]) -> dict[str, Path]:
    session, task, person = recording
    sides = {}
    for name, number in (("self", person), ("other", 3 - person)):
        own = (session, task, number)
        sound = files["sound"].get(own)
        if sound is None and (name == "other" or files["sound"]):
            sound = files["video"].get(own)
        for kind, path in (("audio", sound), ("text", files["transcript"].get(own))):
            if path is not None:
                sides[f"{kind}_{name}"] = path
    both = files["transcript"].get((session, task, 0))
    return sides if both is None else {**sides, "text": both}
