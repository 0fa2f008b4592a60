"""overlap: what counts as one source video, and what is printed and written about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mdltool.artifact import Artifact, open_artifact
from mdltool.data.encode import Encoding
from mdltool.errors import MdlError
from mdltool.stages.overlap import Overlap, Side, run, source_of
from mdltool.stages.shard import Dataset, Writing
from mdltool.stages.shard import run as shard
from tests.conftest import Ran, World
from tests.data.tiny_shards import make_video, write_shards

VIDEO = make_video(30, rate=10, size=(32, 32))
OTHER = make_video(31, rate=10, size=(32, 32))
A, B, C = "0wR5jVB-WPk", "bYUmtLBL7W4", "--6bJUbfpnQ"


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        (f"abseiling/{A}_000417_000427.mp4", "kinetics", A),
        (f"abseiling/{A}_000417_000427.mp4", "folder", A),
        (f"{A}.mp4", "kinetics", A),
        (f"{A}.webm", "csv", A),
        (f"{C}.mp4", "activitynet", C),
        (f"deep/v_{B}.mkv", "activitynet", B),
        (f"v_{B}.mp4", "folder", B),
        ("abcdefghijk.mp4", "kinetics", "abcdefghijk"),
        (f"clapping/yt-{B}_205.mp4", "mit", B),
        ("clapping/getty-karate-video-id635808620_4.mp4", "mit", None),
        (f"clapping/{B}.mp4", "mit", None),
        ("YoYo/v_YoYo_g01_c01.avi", "ucf101", None),
        ("v_swing_01_01.mpg", "folder", None),
        (f"{A}.avi", "hmdb51", None),
        ("166766.webm", "ssv2", None),
        ("box/video_00004.mp4", "folder", None),
        ("IMG_1234560.MP4", "csv", None),
        ("box/0001.mp4", "", None),
    ],
)
def test_source_ids(name: str, form: str, expected: str | None) -> None:
    found = source_of(name, "here", form)
    assert found == source_of(f"other/{name}", "there", form) if expected else found[0] == "here"
    assert found[1] == (expected or Path(name).stem)


def make(
    folder: Path, domain: str, split: str, files: Sequence[str], form: str = "kinetics", **words: object
) -> Artifact:
    """Shards of one video under these names (OTHER where the name is <name>!); csv: name@start-end."""
    source = folder / f"{domain}-{split}-videos"
    rows = []
    for file in files:
        name, _, segment = file.rstrip("!").partition("@")
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(OTHER if file.endswith("!") else VIDEO)
        start, _, end = segment.partition("-")
        rows.append((name, start, end))
    annotations = None
    if form != "folder":
        annotations = folder / f"{domain}-{split}.csv"
        head, line = ("path,label,start,end", "{0},x,{1},{2}")
        if form == "kinetics":
            head, line = ("label,youtube_id", "x,{3}")
        text = [line.format(*row, Path(row[0]).stem) for row in rows]
        annotations.write_text("\n".join([head, *text]) + "\n")
    out = folder / "shards" / f"{domain}-{split}"
    return shard(Dataset(source, form, domain, split, annotations), out, Writing(**words))  # type: ignore[arg-type]


def only(overlaps: Sequence[Overlap]) -> Overlap:
    (found,) = overlaps
    return found


class TestYoutube:
    def test_one_domains_training_and_anothers_held_out_list(self, tmp_path: Path) -> None:
        k400 = make(tmp_path, "k400", "train", [f"{A}.mp4", f"{B}.mp4"])
        files = [f"v_{B}.mp4@0-1", f"v_{B}.mp4@1-2", f"v_{C}.mp4@0-1"]
        anet = make(tmp_path, "anet", "val", files, "csv")
        found = run([k400, anet])
        train, test = Side("k400", "train"), Side("anet", "val")
        keys = (f"v_{B}_00000000_00001000", f"v_{B}_00001000_00002000")
        assert found.overlaps == (Overlap(train, test, (B,), (B,), keys),)
        assert (found.train, found.test) == (((train, 2),), ((test, 3),))

    def test_training_lists_are_not_compared_with_each_other(self, tmp_path: Path) -> None:
        lists = [make(tmp_path, d, "train", [f"{A}.mp4"]) for d in ("k400", "k700")]
        test = make(tmp_path, "k700", "test", [f"{A}.mp4", f"{C}.mp4"])
        found = run([*lists, test])
        assert [(o.train.domain, o.test.domain, o.videos) for o in found.overlaps] == [
            ("k400", "k700", (A,)),
            ("k700", "k700", (A,)),
        ]
        assert run([*lists, make(tmp_path, "k600", "val", [f"{B}.mp4"])]).overlaps == ()

    def test_parts_count_as_one_list(self, tmp_path: Path) -> None:
        files = [f"{A[:-2]}{letter}k.mp4" for letter in "abcdef"]
        make(tmp_path, "k400", "train", files)
        source, path = tmp_path / "k400-train-videos", tmp_path / "k400-train.csv"
        parts = [
            shard(
                Dataset(source, "kinetics", "k400", "train", path),
                tmp_path / f"part{i}",
                Writing(shard_bytes=1, part=(i, 2)),
            )
            for i in range(2)
        ]
        test = make(tmp_path, "k400", "val", files)
        found = only(run([*parts, parts[0], test]).overlaps)
        assert list(found.train_keys) == list(found.test_keys) == sorted(Path(f).stem for f in files)
        assert sum(len(p.load_json("index.json")["shards"]) for p in parts) == 6


class TestNames:
    def test_count_within_their_domain_only(self, tmp_path: Path) -> None:
        train = make(tmp_path, "kitchen", "train", ["a/cut.mp4", "a/stir.mp4"], "folder")
        val = make(tmp_path, "kitchen", "val", ["b/cut.mp4"], "folder")
        other = make(tmp_path, "garden", "val", ["a/stir.mp4"], "folder")
        found = only(run([train, val, other]).overlaps)
        assert (found.test, found.videos, found.test_keys) == (Side("kitchen", "val"), ("a/cut",), ("b/cut",))

    def test_files_of_one_name_and_other_bytes_are_two_videos(self, tmp_path: Path) -> None:
        train = make(tmp_path, "kitchen", "train", ["a/0001.mp4", "a/0002.mp4"], "folder")
        val = make(tmp_path, "kitchen", "val", ["a/0001.mp4!", "a/0002.mp4"], "folder")
        assert only(run([train, val]).overlaps).videos == ("a/0002",)

    def test_the_name_decides_where_bytes_cannot(self, tmp_path: Path) -> None:
        train = make(tmp_path, "kitchen", "train", ["0001.mp4@0-1"], "csv")
        val = make(tmp_path, "kitchen", "val", ["0001.mp4@1-2", "0002.mp4@1-2"], "csv")
        assert only(run([train, val]).overlaps).test_keys == ("0001_00001000_00002000",)
        small = make(tmp_path, "kitchen", "test", ["0001.mp4"], "csv", encoding=Encoding("jpeg", 16))
        assert only(run([train, small]).overlaps).videos == ("0001",)

    def test_a_name_that_ends_like_a_segment_is_not_taken_for_one(self, tmp_path: Path) -> None:
        name = "cam_20200101_12345678"
        train = make(tmp_path, "street", "train", [f"{name}.mp4@0-1", "cam_20200102_00000000.mp4"], "csv")
        val = make(tmp_path, "street", "val", [f"{name}.mp4", "cam.mp4"], "csv")
        found = only(run([train, val]).overlaps)
        assert (found.train_keys, found.test_keys) == ((f"{name}_00000000_00001000",), (name,))

    def test_shards_that_others_wrote_go_by_their_keys(self, tmp_path: Path) -> None:
        train = write_shards(tmp_path / "a", [VIDEO, OTHER])
        val = make(tmp_path, "tiny", "val", ["001.mp4"], "csv")
        assert only(run([train, val]).overlaps).train_keys == ("clip/001",)

    def test_the_generated_domains_share_nothing(self, world: World) -> None:
        # their class folders hold files of equal names in every split
        lists = [open_artifact(world.shards(d, s)) for d in ("chalk", "neon") for s in ("train", "val")]
        assert run(lists).overlaps == ()


class TestCommand:
    def test_table_list_and_json(self, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
        train = make(tmp_path, "k400", "train", [f"{A}.mp4", f"{B}_000001_000011.mp4"]).path
        val = make(tmp_path, "anet", "val", [f"v_{B}.mp4"], "csv").path
        ran = mdltool("overlap", train, val, "--list", tmp_path / "drop.txt")
        assert ran.code == 0, ran.err
        row = next(line for line in ran.out.splitlines() if B in line)
        assert [cell.strip() for cell in row.split("│")[1:-1]] == ["k400-train", "anet-val", "1", "1", "1", B]
        assert (tmp_path / "drop.txt").read_text() == f"{B}_000001_000011\n"
        found = mdltool("overlap", train, val, "--json").json
        assert found["compared"]["train"] == [{"domain": "k400", "split": "train", "clips": 2}]
        assert found["overlaps"] == [
            {
                "train": {"domain": "k400", "split": "train"},
                "test": {"domain": "anet", "split": "val"},
                "videos": [B],
                "train_keys": [f"{B}_000001_000011"],
                "test_keys": [f"v_{B}"],
            }
        ]

    def test_no_overlap(self, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
        train, val = (make(tmp_path, "k", s, [f"{i}.mp4"]).path for s, i in (("train", A), ("val", B)))
        ran = mdltool("overlap", train, val, "--list", tmp_path / "drop.txt")
        assert (ran.code, ran.out) == (0, "no overlap\n")
        assert (tmp_path / "drop.txt").read_text() == ""
        assert mdltool("overlap", train, val, "--json").json["overlaps"] == []

    def test_a_list_of_several_domains_is_warned_of(self, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
        lists = [make(tmp_path, d, s, [f"{A}.mp4"]).path for d, s in (("a", "train"), ("b", "train"), ("b", "val"))]
        ran = mdltool("overlap", *lists, "--list", tmp_path / "drop.txt")
        assert "the keys are of several domains (a, b)" in ran.err

    def test_faults(self, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
        train = make(tmp_path, "k", "train", [f"{A}.mp4"])
        with pytest.raises(MdlError, match=r"no held-out \(val, test\) shards are given \(given: k-train\)"):
            run([train])
        with pytest.raises(MdlError, match=r"no training shards are given \(given: k-val\)"):
            run([make(tmp_path, "k", "val", [f"{A}.mp4"])])
        assert "no shards are given" in mdltool("overlap").err
        ran = mdltool("overlap", train.path, "--list", tmp_path / "none" / "drop.txt")
        assert (ran.code, "there is no such directory" in ran.err) == (1, True)
