"""The plan, the tar and the records of shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from mdltool.data import tar as tar_module
from mdltool.data.encode import Prepared
from mdltool.data.shards import (
    Naming,
    PlannedShard,
    plan,
    read_record,
    write_shard,
)
from mdltool.data.tar import ReadFault, TarWriter
from mdltool.data.workers import Failed
from mdltool.types import Clip, Label, LabelSpace

LONG = "folder/" + "x" * 180 + "/" + "y" * 120 + "é.mp4"


def make_clips(folder: Path, sizes: list[int]) -> list[Clip]:
    clips = []
    for number, size in enumerate(sizes):
        video = folder / f"{number}.MP4"
        video.write_bytes(random.Random(number).randbytes(size))
        clips.append(Clip(f"c/{number}", video, number % 2))
    return clips


def naming(folder: Path) -> Naming:
    return Naming("d", "train", LabelSpace("single_label", ("a", "b")), folder)


def whole(clip: Clip) -> Prepared:
    return Prepared(clip.video, False, {"width": 8, "height": 6, "frames": 2, "duration_s": 0.5})


class TestPlan:
    def test_fills_shards_greedily_in_the_order_of_the_keys_hashes(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400, 300, 500, 200, 900, 100, 2500, 600])
        shards = plan(clips, 1000)
        ordered = [clip for shard in shards for clip in shard.clips]
        assert ordered == sorted(clips, key=lambda clip: hashlib.sha256(clip.key.encode()).hexdigest())
        sizes = [[source.size for source in shard.sources] for shard in shards]
        assert all(sum(group) <= 1000 or len(group) == 1 for group in sizes)
        assert all(sum(a) + b[0] > 1000 for a, b in itertools.pairwise(sizes))
        assert [shard.file for shard in shards] == [f"shard-{i:06d}.tar" for i in range(len(shards))]

    def test_does_not_depend_on_the_order_of_the_list(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400, 300, 500, 200, 900, 100])
        assert plan(clips, 1000) == plan(clips[::-1], 1000)

    def test_a_file_counts_once_over_its_segments(self, tmp_path: Path) -> None:
        (clip,) = make_clips(tmp_path, [1000])
        segments = [replace(clip, key=f"s{i}", start_s=float(i), end_s=i + 1.0) for i in range(10)]
        assert [len(shard.clips) for shard in plan(segments, 500)] == [5, 5]


class TestTar:
    def test_members_carry_no_owner_date_or_mode(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"v" * 1000)
        source.chmod(0o600)
        tar = TarWriter(tmp_path / "t.tar")
        with open(source, "rb", buffering=0) as handle:
            tar.add_file("a/b.mp4", handle, 1000)
        tar.add(LONG, b"{}")
        tar.close()
        data = (tmp_path / "t.tar").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (tar.size, tar.sha256)
        assert len(data) % tarfile.RECORDSIZE == 0
        with tarfile.open(tmp_path / "t.tar") as opened:
            members = opened.getmembers()
            assert [(m.name, m.size) for m in members] == [("a/b.mp4", 1000), (LONG, 2)]
            for member in members:
                assert member.isreg()
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert (member.uname, member.gname) == ("", "")

    def test_the_system_tar_reads_it(self, tmp_path: Path) -> None:
        tar = TarWriter(tmp_path / "t.tar")
        tar.add("a/b.mp4", b"v" * 700)
        tar.add(LONG, b"{}")
        tar.close()
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        command = ["tar", "-tf", tmp_path / "t.tar", "--quoting-style=literal"]
        listed = subprocess.run(command, check=True, capture_output=True, env=environment)
        assert listed.stdout.decode().splitlines() == ["a/b.mp4", LONG]
        assert listed.stderr == b""

    @pytest.mark.parametrize("past_cache", [True, False])
    @pytest.mark.parametrize("buffer_bytes", [tar_module._BUFFER_BYTES, 4096])
    def test_what_fails_half_way_leaves_no_trace(
        self, buffer_bytes: int, past_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In one buffer, or over several that are on the disk already; on file systems of both kinds."""
        monkeypatch.setattr(tar_module, "_BUFFER_BYTES", buffer_bytes)
        if not past_cache:
            monkeypatch.setattr(tar_module, "_DIRECT", 0)

        def add_too_much(tar: TarWriter) -> None:
            with tar.whole(), open(tmp_path / "short", "rb", buffering=0) as handle:
                tar.add("second", b"2" * 5000)
                tar.add_file("third", handle, 10_000)

        def write(path: Path, broken: bool) -> tuple[bytes, str]:
            tar = TarWriter(path)
            tar.add("first", b"1" * 600)
            if broken:
                with pytest.raises(ReadFault, match="changed while it was being read"):
                    add_too_much(tar)
            tar.add("fourth", b"4" * 600)
            tar.close()
            assert hashlib.sha256(path.read_bytes()).hexdigest() == tar.sha256
            return path.read_bytes(), tar.sha256

        (tmp_path / "short").write_bytes(b"3" * 9000)
        assert write(tmp_path / "a", True) == write(tmp_path / "b", False)


class TestShard:
    def write(self, folder: Path, shard: PlannedShard, bad: tuple[str, ...] = ()) -> dict[str, Path]:
        out = folder / "out"
        out.mkdir(exist_ok=True)
        outcomes = [Failed("it is broken") if clip.key in bad else whole(clip) for clip in shard.clips]
        self.record = write_shard(out, shard, iter(outcomes), naming(folder))
        return {path.name: path for path in out.iterdir()}

    def test_index_ranges_are_readable_tars_of_their_own(self, tmp_path: Path) -> None:
        (shard,) = plan(make_clips(tmp_path, [400, 5000, 1]), 10**9)
        files = self.write(tmp_path, shard)
        data = files["shard-000000.tar"].read_bytes()
        assert self.record.sha256 == hashlib.sha256(data).hexdigest()
        for clip, member in zip(shard.clips, self.record.members, strict=True):
            with tarfile.open(fileobj=io.BytesIO(data[member.offset : member.offset + member.size])) as tar:
                video, metadata = tar.getmembers()
                assert [video.name, metadata.name] == [f"{clip.key}.mp4", f"{clip.key}.json"]
                handles = [tar.extractfile(m) for m in (video, metadata)]
                content = [handle.read() for handle in handles if handle is not None]
            assert content[0] == clip.video.read_bytes()
            assert json.loads(content[1]) == {
                "key": clip.key,
                "domain": "d",
                "split": "train",
                "label": clip.label,
                "class": "ab"[clip.label],
                "source": clip.video.name,
                "width": 8,
                "height": 6,
                "frames": 2,
                "duration_s": 0.5,
            }

    def test_unusable_clips_are_listed_and_leave_no_bytes(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400, 5000, 1])
        (shard,) = plan(clips, 10**9)
        self.write(tmp_path, shard, bad=(clips[1].key,))
        assert {member.key for member in self.record.members} == {clips[0].key, clips[2].key}
        (unusable,) = self.record.unusable
        assert (unusable.key, unusable.video, unusable.reason) == (clips[1].key, "1.MP4", "it is broken")

    def test_a_source_that_changed_or_went_is_unusable(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400, 500, 600])
        (shard,) = plan(clips, 10**9)
        clips[0].video.write_bytes(b"longer" * 1000)
        clips[2].video.unlink()
        self.write(tmp_path, shard)
        reasons = {clip.key: clip.reason for clip in self.record.unusable}
        assert reasons == {
            clips[0].key: "the file changed while it was being read",
            clips[2].key: "the file cannot be read (No such file or directory)",
        }

    def test_a_shard_of_nothing_is_no_file(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400])
        (shard,) = plan(clips, 10**9)
        files = self.write(tmp_path, shard, bad=(clips[0].key,))
        assert list(files) == [shard.record_file]
        assert read_record(tmp_path / "out", shard) == self.record


class TestMetadata:
    """The JSON text of a clip, which decides the shard's bytes."""

    @pytest.mark.parametrize(
        ("task", "label", "text"),
        [
            ("single_label", 1, '"label": 1, "class": "b", '),
            ("multi_label", (0, 1), '"label": [0, 1], "class": ["a", "b"], '),
            ("multi_label", (), '"label": [], "class": [], '),
            ("regression", (0.25, -1.0), '"label": [0.25, -1.0], '),
            ("verb_noun", (0, 0), '"label": [0, 0], "verb": "a", "noun": "b", '),
        ],
    )
    def test_of_every_task(self, tmp_path: Path, task: str, label: Label, text: str) -> None:
        clip, verbs = Clip("c/0", tmp_path / "0.MP4", label), int(task == "verb_noun")
        found = Naming("d", "train", LabelSpace(task, ("a", "b"), verbs), tmp_path).metadata(clip)
        expected = f'{{"key": "c/0", "domain": "d", "split": "train", {text}"source": "0.MP4"}}'
        assert json.dumps(found) == expected


class TestRecord:
    def test_is_valid_for_the_same_files_only(self, tmp_path: Path) -> None:
        clips = make_clips(tmp_path, [400, 500])
        (shard,) = plan(clips, 10**9)
        record = write_shard(tmp_path, shard, map(whole, shard.clips), naming(tmp_path))
        assert read_record(tmp_path, shard) == record
        os.utime(clips[1].video, ns=(1, 1))
        (touched,) = plan(clips, 10**9)
        assert read_record(tmp_path, touched) is None
        (fewer,) = plan(clips[:1], 10**9)
        assert read_record(tmp_path, fewer) is None

    @pytest.mark.parametrize("damage", ["shard missing", "shard short", "record cut", "record missing"])
    def test_is_not_believed_when_damaged(self, tmp_path: Path, damage: str) -> None:
        (shard,) = plan(make_clips(tmp_path, [400, 500]), 10**9)
        write_shard(tmp_path, shard, map(whole, shard.clips), naming(tmp_path))
        tar, record = tmp_path / shard.file, tmp_path / shard.record_file
        if damage == "shard missing":
            tar.unlink()
        elif damage == "shard short":
            tar.write_bytes(tar.read_bytes()[:-512])
        elif damage == "record cut":
            record.write_bytes(record.read_bytes()[:100])
        else:
            record.unlink()
        assert read_record(tmp_path, shard) is None
