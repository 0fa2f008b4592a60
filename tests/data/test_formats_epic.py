"""EPIC-Kitchens-100: the published lists against an independent reading, and shards cut by their rows."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdltool.artifact import open_artifact
from mdltool.data.dataset import Dataset
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.stages.shard import Writing, outlook, run
from mdltool.types import Listing
from tests import epic_videos
from tests.conftest import Ran
from tests.data.test_formats import read, touch

FILES = (
    "EPIC_100_validation.csv",
    "EPIC_100_verb_classes.csv",
    "EPIC_100_noun_classes.csv",
    "EPIC_100_tail_verbs.csv",
    "EPIC_100_tail_nouns.csv",
    "EPIC_100_unseen_participant_ids_validation.csv",
)


@pytest.fixture(scope="session")
def lists(test_data: Path) -> Path:
    return test_data / "annotations" / "epic_kitchens_100"


@pytest.fixture(scope="module")
def validation(lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """The published validation list, without one of its videos."""
    return read("epic_kitchens", tmp_path_factory.mktemp("none"), lists, "val")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def milliseconds(text: str) -> int:
    """HH:MM:SS.ff, without floats."""
    hours, minutes, rest = text.split(":")
    seconds, _, hundredths = rest.partition(".")
    return 3_600_000 * int(hours) + 60_000 * int(minutes) + 1000 * int(seconds) + 10 * int(hundredths or 0)


def names_of(path: Path) -> list[str]:
    return [row["key"] for row in sorted(rows_of(path), key=lambda row: int(row["id"]))]


@pytest.mark.parametrize(
    ("split", "file"), [("val", "EPIC_100_validation.csv"), ("train", "EPIC_100_uda_source_train.csv")]
)
def test_a_dry_run_plans_every_published_row(lists: Path, tmp_path: Path, split: str, file: str) -> None:
    """Ids, times, verbs, nouns and actions of all rows, without one of the videos."""
    dataset = Dataset(tmp_path, "epic_kitchens", "ek100", split, lists / file)
    found = json.loads(json.dumps(outlook(dataset, Writing())))
    published = {row["narration_id"]: row for row in rows_of(lists / file)}
    planned = {row["key"]: row for row in found["rows"]}
    verbs, nouns = (names_of(lists / f"EPIC_100_{kind}_classes.csv") for kind in ("verb", "noun"))
    assert planned.keys() == published.keys()
    assert (found["clips"], found["missing"], found["shards"]) == (0, len(published), [])
    assert found["classes"] == verbs + nouns
    assert (found["verbs"], len(found["classes"])) == (97, 397)
    every = [*rows_of(lists / "EPIC_100_validation.csv"), *rows_of(lists / file)]
    pairs = sorted({(int(row["verb_class"]), int(row["noun_class"])) for row in every})
    assert [tuple(pair) for pair in found["actions"]] == pairs
    for key, row in published.items():
        plan = planned[key]
        assert round(1000 * plan["start_s"]) == milliseconds(row["start_timestamp"])
        assert round(1000 * plan["end_s"]) == milliseconds(row["stop_timestamp"])
        label = [int(row["verb_class"]), int(row["noun_class"])]
        assert (plan["label"], plan["there"]) == (label, False)
        assert (plan["verb"], plan["noun"]) == (verbs[label[0]], nouns[label[1]])
        assert tuple(label) in pairs
        assert plan["source"] == f"{row['participant_id']}/videos/{row['video_id']}.MP4"
    (warning,) = [note for note in found["notes"] if note.startswith("warning")]
    assert f"have 3806 actions, not {len(pairs)}" in warning


def test_actions_as_one_label_space(lists: Path, validation: Listing, tmp_path: Path) -> None:
    listing, pairs = read("epic_kitchens_actions", tmp_path, lists, "val"), validation
    assert (listing.task, len(listing.classes), len(set(listing.classes))) == ("single_label",) + (
        len(pairs.actions),
    ) * 2
    for action, both in zip(listing.absent, pairs.absent, strict=True):
        verb, noun = pairs.actions[action.label]
        assert (verb, noun) == both.label
        assert listing.classes[action.label] == f"{pairs.classes[verb]} {pairs.classes[97 + noun]}"


def test_the_published_subsets(lists: Path, validation: Listing, tmp_path: Path) -> None:
    listing = validation
    rows = rows_of(lists / "EPIC_100_validation.csv")
    unseen = {row["participant_id"] for row in rows_of(lists / FILES[-1])}
    tails = {
        kind: {row[kind] for row in rows_of(lists / f"EPIC_100_tail_{kind}s.csv")} for kind in ("verb", "noun")
    }
    expected = {
        "unseen": [row["narration_id"] for row in rows if row["participant_id"] in unseen],
        "seen": [row["narration_id"] for row in rows if row["participant_id"] not in unseen],
        "tail_verb": [row["narration_id"] for row in rows if row["verb_class"] in tails["verb"]],
        "tail_noun": [row["narration_id"] for row in rows if row["noun_class"] in tails["noun"]],
        "tail_action": [
            row["narration_id"]
            for row in rows
            if row["verb_class"] in tails["verb"] or row["noun_class"] in tails["noun"]
        ],
    }
    assert {name: list(keys) for name, keys in listing.subsets.items()} == expected
    assert read("epic_kitchens", tmp_path, lists / "EPIC_100_uda_source_train.csv", "train").subsets == {}


@pytest.mark.parametrize("place", ["P01/P01_11.mkv", "P01_11.avi", "old/P01_11.mp4 P01/videos/P01_11.MP4"])
def test_videos_are_found_where_they_are_published_and_elsewhere(lists: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "lists").mkdir()
    touch(tmp_path, *place.split())
    listing = read("epic_kitchens", tmp_path, copied(lists, tmp_path / "lists"), "val")
    clips = [clip for clip in listing.clips if clip.key.startswith("P01_11_")]
    assert clips == list(listing.clips)
    assert {clip.video for clip in clips} == {tmp_path / place.split()[-1]}
    assert (len(clips), listing.missing, listing.absent) == (4, (), ())


def copied(lists: Path, folder: Path, **changed: str) -> Path:
    for name in FILES:
        shutil.copy(lists / name, folder)
    rows = rows_of(folder / FILES[0])[:4]
    rows[2] |= changed
    epic_videos.write_rows(folder / FILES[0], rows)
    return folder


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"start_timestamp": "1.5"}, "'1.5' in column 'start_timestamp' is no time"),
        ({"stop_timestamp": "00:61:00.00"}, "'00:61:00.00' in column 'stop_timestamp' is no time"),
        ({"verb_class": "97"}, "verb 97 and noun 49 are not among 97 verbs and 300 nouns"),
        ({"noun_class": "plate"}, "are no numbers of a verb and a noun"),
        ({"narration_id": "../P01.11/2"}, "'../P01.11/2' is no narration_id"),
        ({"narration_id": "P01_11_0"}, "two clips have the key 'P01_11_0'"),
    ],
)
def test_faults_of_a_row(lists: Path, tmp_path: Path, changed: dict[str, str], what: str) -> None:
    with pytest.raises(MdlError, match=what):
        read("epic_kitchens", tmp_path, copied(lists, tmp_path, **changed), "val")


def test_faults_of_the_files(lists: Path, tmp_path: Path) -> None:
    for file, split, what in (
        (lists / "EPIC_100_test_timestamps.csv", "test", "no column 'verb_class'"),
        (lists.parent / "epic_kitchens_55" / "EPIC_train_action_labels.csv", "train", "no column 'narration_id'"),
        (lists, "test", "no labelled list is of 'test'"),
        (lists, "train", "the folder has no EPIC_100_train.csv"),
        (None, "val", "the folder of the published CSV files is not given"),
    ):
        with pytest.raises(MdlError, match=what):
            read("epic_kitchens", tmp_path, file, split)
    with pytest.raises(MdlError, match="the classes are those of the published files"):
        read("epic_kitchens", tmp_path, lists, "val", classes=["take"])
    (tmp_path / "l").mkdir()
    shutil.copy(lists / FILES[0], tmp_path / "l")
    with pytest.raises(MdlError, match=r"no EPIC_100_verb_classes\.csv beside the list"):
        read("epic_kitchens", tmp_path, tmp_path / "l", "val")
    with pytest.raises(MdlError, match=r"none of the 5999 listed files is there, the first: no file P01/videos"):
        run(Dataset(tmp_path, "epic_kitchens", "ek100", "val", lists), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_without_length_and_beyond_the_video(lists: Path, tmp_path: Path) -> None:
    folder = copied(lists, tmp_path, stop_timestamp="00:00:00.00")
    rows = rows_of(folder / FILES[0])
    end_s = milliseconds(rows[3]["stop_timestamp"]) / 1000 - 0.25
    (folder / "EPIC_100_video_info.csv").write_text(f"video_id,duration,fps,resolution\nP01_11,{end_s},50,1x1\n")
    listing = read("epic_kitchens", tmp_path, folder, "val")
    assert [clip.key for clip in listing.absent] == [row["narration_id"] for i, row in enumerate(rows) if i != 2]
    assert listing.absent[2].end_s == end_s
    assert {"left out: 1 segments without length", "cut: 1 segments end after their video"} <= set(listing.notes)


def test_unknown_lengths_of_videos_and_rows_behind_the_end(lists: Path, tmp_path: Path) -> None:
    folder = copied(lists, tmp_path)
    rows = rows_of(folder / FILES[0])
    starts_s, ends_s = ([milliseconds(row[f"{at}_timestamp"]) / 1000 for row in rows] for at in ("start", "stop"))
    info = folder / "EPIC_100_video_info.csv"
    info.write_text("video_id,duration,fps,resolution\nP01_11,,50,1x1\n")
    assert [clip.end_s for clip in read("epic_kitchens", tmp_path, folder, "val").absent] == ends_s
    end_s = ends_s[0] - 0.01
    info.write_text(f"video_id,duration,fps,resolution\nP01_11,{end_s},50,1x1\n")
    found = read("epic_kitchens", tmp_path, folder, "val")
    begun = sum(start_s < end_s for start_s in starts_s)
    assert [clip.end_s for clip in found.absent] == [end_s] * begun
    assert f"left out: {len(rows) - begun} segments without length" in found.notes
    assert f"cut: {begun} segments end after their video" in found.notes


def test_shards_of_generated_videos(lists: Path, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
    """The real rows of two videos: what is stored, and what the index says of it."""
    folder = copied(lists, tmp_path)
    rows = epic_videos.rows_of(lists / FILES[0], epic_videos.VAL_UNTIL_S)
    epic_videos.write_rows(folder / FILES[0], rows)
    for video in epic_videos.VAL_UNTIL_S:
        own = [row for row in rows if row["video_id"] == video]
        path = tmp_path / "videos" / own[0]["participant_id"] / "videos" / f"{video}.MP4"
        path.parent.mkdir(parents=True)
        epic_videos.write_long_video(path, own)
    words = ("--format", "epic_kitchens", "--annotations", folder, "--domain", "ek100", "--split", "val")
    ran = mdltool("shard", tmp_path / "videos", *words, "--out", tmp_path / "shards")
    assert ran.code == 0, ran.err
    assert "have 3806 actions, not" in ran.err
    index = ShardIndex.open(open_artifact(tmp_path / "shards"))
    assert sorted(index.keys) == sorted(row["narration_id"] for row in rows)
    by_id = {row["narration_id"]: row for row in rows}
    for i, key in enumerate(index.keys):
        metadata, _ = index.clip(i)
        row: dict[str, Any] = by_id[key]
        assert index.labels[i].tolist() == metadata["label"] == [int(row["verb_class"]), int(row["noun_class"])]
        length_ms = milliseconds(row["stop_timestamp"]) - milliseconds(row["start_timestamp"])
        assert abs(1000 * metadata["duration_s"] - length_ms) <= 2 * 1000 / epic_videos.FPS
    assert index.subsets["unseen"] == {key for key in by_id if key.startswith("P18")}
    assert len(index.subsets["tail_action"]) >= 1
