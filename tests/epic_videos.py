"""Generated videos in the place of a few EPIC-Kitchens-100 videos, for real rows of its published lists to cut.

The ids below are short ones: of each the rows that end by a time, so that a file is under 40 s.

    train  P02_05: all 5 rows, P01_08: 14 rows                         (EPIC_100_uda_source_train.csv)
    val    P03_26: all 4 rows, P18_04: 7 rows, unseen participant,
           one of them of a tail verb and a tail noun                  (EPIC_100_validation.csv)
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mdltool.data.synth import write_clip
from mdltool.data.synth_figures import APPEARANCE, MOVERS
from mdltool.data.synth_looks import LOOKS
from mdltool.data.synth_paint import play
from mdltool.data.synth_sound import RATE, SOUNDS, record
from tests.conftest import TINY

Rows = list[dict[str, str]]

# video id -> the time in seconds by which a row must end
TRAIN_UNTIL_S = {"P02_05": 17.0, "P01_08": 36.5}
VAL_UNTIL_S = {"P03_26": 10.0, "P18_04": 17.0}
SIDES = ("verb_classes", "noun_classes", "tail_verbs", "tail_nouns", "unseen_participant_ids_validation")
FPS = 10
WIDTH, HEIGHT = 96, 72
# What cm3t_ek100 asks of a GPU, of pretrained weights and of 67,000 clips, in small; all else is the recipe's own.
SMALL = (
    *TINY[1:],
    "backbone.name=swin3d_tiny",
    "backbone.weights=scratch",
    "data.batch=8",
    *(f"train.steps.{step}.{key}" for step in (0, 1) for key in ("epochs=1", "schedule.warmup=0")),
)


def write_kitchen(root: Path, lists: Path) -> dict[str, Rows]:
    """Lists and videos in root, in the published form, for the rows above; these by split. lists: the published."""
    annotations, found = root / "lists", {}
    annotations.mkdir(parents=True)
    for name in SIDES:
        shutil.copy(lists / f"EPIC_100_{name}.csv", annotations)
    for split, until_s, source, file in (
        ("train", TRAIN_UNTIL_S, "uda_source_train", "train"),
        ("val", VAL_UNTIL_S, "validation", "validation"),
    ):
        found[split] = rows_of(lists / f"EPIC_100_{source}.csv", until_s)
        write_rows(annotations / f"EPIC_100_{file}.csv", found[split])
        for video in until_s:
            own = [row for row in found[split] if row["video_id"] == video]
            path = root / "videos" / own[0]["participant_id"] / "videos" / f"{video}.MP4"
            path.parent.mkdir(parents=True)
            write_long_video(path, own)
    return found


def rows_of(annotations: Path, until_s: Mapping[str, float]) -> Rows:
    """The rows of these videos that end by their time, in the file's order and as it has them."""
    with open(annotations, newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [row for row in rows if seconds(row["stop_timestamp"]) <= until_s.get(row["video_id"], -1)]


def write_rows(path: Path, rows: Rows) -> None:
    """A list of the published form with these rows alone."""
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def seconds(timestamp: str) -> float:
    """HH:MM:SS.ss in seconds."""
    hours, minutes, rest = timestamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def write_long_video(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A video for the rows of one id, one second longer than the last: H.264 and FLAC.

    Within a row the verb decides what the figure is or does, and the sound; the noun decides the look. Where rows
    overlap, the later one is seen and heard; between them it is grey and silent.
    """
    assert len({row["video_id"] for row in rows}) == 1
    length = int(FPS * max(seconds(row["stop_timestamp"]) for row in rows)) + FPS
    frames = np.full((length, HEIGHT, WIDTH, 3), 90, np.uint8)
    samples = np.zeros(length * RATE // FPS, np.int16)
    for number, row in enumerate(sorted(rows, key=lambda row: seconds(row["start_timestamp"]))):
        first, last = (int(FPS * seconds(row[key])) for key in ("start_timestamp", "stop_timestamp"))
        verb, noun = int(row["verb_class"]), int(row["noun_class"])
        look = replace(list(LOOKS.values())[noun % len(LOOKS)], width=WIDTH, height=HEIGHT, fps=FPS)
        courses = (*APPEARANCE, *MOVERS)
        frames[first : last + 1] = play(look, "epic", courses[verb % len(courses)], number, last + 1 - first)
        sound = record(list(SOUNDS)[verb % len(SOUNDS)], (last + 1 - first) / FPS, np.random.default_rng(number))
        samples[first * RATE // FPS :][: len(sound)] = sound
    write_clip(path, frames, FPS, samples)
