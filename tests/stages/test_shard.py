"""The shard stage: equal bytes however it is run, resuming, parts, what is unusable and what is missing."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from mdltool.artifact import Artifact
from mdltool.data.decode import decode
from mdltool.data.encode import Encoding
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.stages.shard import Dataset, Effort, Writing, merge, outlook, run
from tests.conftest import Ran
from tests.data.tiny_shards import make_video
from tests.stages.class_folders import CLIPS, SMALL, contents, dataset, make_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def rows(artifact: Artifact, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (artifact.path / name).read_text().splitlines()]


class TestContent:
    def test_index_and_summary_count_what_is_there(self, videos: Path, tmp_path: Path) -> None:
        artifact = run(dataset(videos), tmp_path / "out", Writing(shard_bytes=SMALL))
        index = artifact.load_json("index.json")
        assert list(index) == ["domain", "split", "task", "classes", "clips", "quarantined", "shards"]
        assert (index["domain"], index["split"], index["task"]) == ("d", "train", "single_label")
        assert (index["classes"], index["clips"], index["quarantined"]) == (["box", "wave"], CLIPS, 0)
        assert len(index["shards"]) > 3
        for shard in index["shards"]:
            assert list(shard) == ["file", "clips", "bytes", "sha256", "members"]
            assert shard["clips"] == len(shard["members"])
            assert artifact.files[shard["file"]] == {"bytes": shard["bytes"], "sha256": shard["sha256"]}
        assert artifact.summary["clips"] == CLIPS
        assert artifact.verify() == []
        expected = {"index.json", "quarantine.jsonl", "missing.jsonl"} | {s["file"] for s in index["shards"]}
        assert {p.name for p in artifact.path.iterdir()} == expected | {"artifact.json"}

    def test_plain_webdataset_reads_the_files_as_they_were(self, videos: Path, tmp_path: Path) -> None:
        artifact = run(dataset(videos), tmp_path / "out", Writing(shard_bytes=SMALL))
        urls = [str(path) for path in sorted(artifact.path.glob("*.tar"))]
        samples = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
        sources = {f"{p.parent.name}/{p.stem.replace('.', '_')}": p for p in videos.rglob("*.MP4")}
        assert set(samples) == set(sources)
        for key, sample in samples.items():
            assert sample["mp4"] == sources[key].read_bytes()
            metadata = json.loads(sample["json"])
            assert (metadata["key"], metadata["class"]) == (key, key.split("/")[0])
            assert metadata["source"] == sources[key].relative_to(videos).as_posix()
            assert "trim" not in metadata

    def test_cut_segments_show_their_frames_to_every_reader(self, videos: Path, tmp_path: Path) -> None:
        clip = next(videos.rglob("clip.23.MP4"))
        path = tmp_path / "list.csv"
        path.write_text(f"path,label,start,end\n{clip.relative_to(videos)},x,0.6,0.8\n")
        artifact = run(Dataset(videos, "csv", "d", "train", path), tmp_path / "out")
        metadata, video = ShardIndex.open(artifact).clip(0)
        got = decode(video, lambda t: range(len(t)), trim=tuple(metadata["trim"]))
        expected = decode(clip, lambda t: range(15, 20))
        assert got.frames.shape[0] == metadata["frames"] == 5
        assert bool((got.frames == expected.frames).all())


class TestSameBytes:
    @pytest.mark.parametrize("mode", ["copy", "h264", "jpeg"])
    def test_with_one_two_and_four_workers_and_from_merged_parts(
        self, videos: Path, tmp_path: Path, mode: str
    ) -> None:
        writing = Writing(Encoding(mode, short_side=32), shard_bytes=SMALL)
        made = [run(dataset(videos), tmp_path / str(n), writing, Effort(workers=n)) for n in (1, 2, 4)]
        parts = []
        for i in (2, 0, 1):
            part = Writing(writing.encoding, SMALL, part=(i, 3))
            parts.append(run(dataset(videos), tmp_path / f"part{i}", part, Effort(workers=2)))
        assert all(0 < part.summary["shards"] < made[0].summary["shards"] for part in parts)
        made.append(merge(parts, tmp_path / "merged", tmp_path, max_bad=0.01))
        assert all(contents(artifact) == contents(made[0]) for artifact in made)
        assert {artifact.digest for artifact in made} == {made[0].digest}
        assert all(artifact.request == made[0].request for artifact in made)
        assert made[-1].verify() == []

    def test_wherever_the_videos_lie_and_whenever_they_were_written(self, videos: Path, tmp_path: Path) -> None:
        shutil.copytree(videos, tmp_path / "elsewhere", copy_function=shutil.copyfile)
        made = [run(dataset(v), tmp_path / v.name / "out") for v in (videos, tmp_path / "elsewhere")]
        assert contents(made[0]) == contents(made[1])
        assert (made[0].digest, made[0].request) == (made[1].digest, made[1].request)

    def test_a_second_run_takes_what_is_there_and_another_is_refused(
        self, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(dataset(videos), tmp_path / "out")
        before = (tmp_path / "out" / "artifact.json").stat().st_mtime_ns
        assert run(dataset(videos), tmp_path / "out").digest
        assert (tmp_path / "out" / "artifact.json").stat().st_mtime_ns == before
        assert "already there" in capsys.readouterr().err
        with pytest.raises(MdlError, match=r"another artifact .* shard_bytes"):
            run(dataset(videos), tmp_path / "out", Writing(shard_bytes=SMALL))


class TestParts:
    def make(self, videos: Path, folder: Path, i: int, n: int, shard_bytes: int = SMALL) -> Artifact:
        return run(dataset(videos), folder / f"part{i}of{n}", Writing(shard_bytes=shard_bytes, part=(i, n)))

    def test_more_parts_than_shards_leave_some_empty(self, videos: Path, tmp_path: Path) -> None:
        parts = [self.make(videos, tmp_path, i, 3, 10**9) for i in range(3)]
        assert [part.summary["clips"] for part in parts] == [CLIPS, 0, 0]
        assert merge(parts, None, tmp_path, 0.01).path == tmp_path / "shards" / "d-train"

    def test_parts_that_do_not_make_the_whole_are_refused(self, videos: Path, tmp_path: Path) -> None:
        first, second = (self.make(videos, tmp_path, i, 2) for i in range(2))
        third = self.make(videos, tmp_path, 1, 3)
        other = run(dataset(videos), tmp_path / "other", Writing(shard_bytes=SMALL * 2, part=(1, 2)))
        whole = run(dataset(videos), tmp_path / "whole")
        for parts, what in (
            ((first,), "1/2 is given 0 times"),
            ((first, first, second), "0/2 is given 2 times"),
            ((first, third), "made by another command"),
            ((first, other), "made by another command"),
            ((first, whole), "not a part"),
        ):
            with pytest.raises(MdlError, match=what):
                merge(parts, tmp_path / "merged", tmp_path, 0.01)
        assert not (tmp_path / "merged").exists()
        assert not (tmp_path / "merged.partial").exists()

    def test_parts_of_videos_that_changed_meanwhile_are_refused(self, videos: Path, tmp_path: Path) -> None:
        shutil.copytree(videos, tmp_path / "v")
        first = self.make(tmp_path / "v", tmp_path, 0, 2)
        changed = next((tmp_path / "v").rglob("*.MP4"))
        changed.write_bytes(make_video(39))
        second = self.make(tmp_path / "v", tmp_path, 1, 2)
        with pytest.raises(MdlError, match="source videos changed"):
            merge((first, second), tmp_path / "merged", tmp_path, 0.01)


class TestBadClips:
    @pytest.fixture
    def spoiled(self, videos: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(videos, folder)
        (folder / "box" / "empty.mp4").touch()
        (folder / "wave" / "page.mp4").write_text("<!DOCTYPE html><html></html>")
        return folder

    def test_are_quarantined_with_their_reasons(self, spoiled: Path, tmp_path: Path) -> None:
        artifact = run(dataset(spoiled), tmp_path / "out", Writing(shard_bytes=SMALL), Effort(max_bad=0.1))
        assert rows(artifact, "quarantine.jsonl") == [
            {"key": "box/empty", "video": "box/empty.mp4", "label": 0, "reason": "the file is empty"},
            {"key": "wave/page", "video": "wave/page.mp4", "label": 1, "reason": "an HTML page, not a video"},
        ]
        assert (artifact.summary["clips"], artifact.summary["quarantined"]) == (CLIPS, 2)
        assert not {"box/empty", "wave/page"} & set(ShardIndex.open(artifact).keys)

    def test_too_many_stop_the_run_and_a_mended_rerun_retries_only_them(
        self, spoiled: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out, writing = tmp_path / "out", Writing(shard_bytes=10**9)
        with pytest.raises(MdlError, match=r"2 of 26 clips cannot be used, more than --max-bad 1%") as fault:
            run(dataset(spoiled), out, writing)
        assert "box/empty.mp4: the file is empty" in fault.value.what
        assert "--max-bad 7.7%" in str(fault.value.fix)
        assert not out.exists()
        shard = tmp_path / "out.partial" / "shard-000000.tar"
        written = shard.stat().st_ino
        artifact = run(dataset(spoiled), out, writing, Effort(max_bad=0.077))
        assert (artifact.path / "shard-000000.tar").stat().st_ino == written
        assert artifact.summary["quarantined"] == 2
        assert "resuming: 1 of 1 shards are finished" in capsys.readouterr().err

    def test_a_mended_file_comes_in_on_the_next_run(self, spoiled: Path, tmp_path: Path) -> None:
        for mended in ("box/empty.mp4", "wave/page.mp4"):
            with pytest.raises(MdlError, match="cannot be used"):
                run(dataset(spoiled), tmp_path / "out", Writing(shard_bytes=SMALL), Effort(max_bad=0.0))
            (spoiled / mended).write_bytes(make_video(20))
        resumed = run(dataset(spoiled), tmp_path / "out", Writing(shard_bytes=SMALL), Effort(max_bad=0.0))
        fresh = run(dataset(spoiled), tmp_path / "fresh", Writing(shard_bytes=SMALL))
        assert contents(resumed) == contents(fresh)
        assert resumed.summary["clips"] == CLIPS + 2

    def test_parts_count_against_the_whole(self, spoiled: Path, tmp_path: Path) -> None:
        parts = [
            run(dataset(spoiled), tmp_path / str(i), Writing(shard_bytes=SMALL, part=(i, 2)), Effort(max_bad=0.077))
            for i in range(2)
        ]
        with pytest.raises(MdlError, match="2 of 26 clips cannot be used"):
            merge(parts, tmp_path / "merged", tmp_path, 0.05)
        assert merge(parts, tmp_path / "merged", tmp_path, 0.077).summary["quarantined"] == 2

    def test_nothing_usable_is_an_error_whatever_is_allowed(self, tmp_path: Path) -> None:
        (tmp_path / "videos" / "box").mkdir(parents=True)
        (tmp_path / "videos" / "box" / "empty.mp4").touch()
        with pytest.raises(MdlError, match="1 of 1 clips cannot be used"):
            run(dataset(tmp_path / "videos"), tmp_path / "out", effort=Effort(max_bad=1.0))

    def test_awkward_files_are_used_or_quarantined_with_the_true_reason(
        self, test_data: Path, tmp_path: Path
    ) -> None:
        with open(test_data / "MANIFEST.csv", newline="") as handle:
            listed = {r["file"]: r for r in csv.DictReader(handle) if r["kind"] != "clips"}
        source = Dataset(test_data / "awkward", "folder", "awkward", "test")
        artifact = run(source, tmp_path / "out", effort=Effort(workers=2, max_bad=0.5))
        bad = {f"awkward/{row['video']}": row["reason"] for row in rows(artifact, "quarantine.jsonl")}
        assert {name for name, row in listed.items() if int(row["frames_decoded"] or 0) == 0} == set(bad)
        assert artifact.summary["clips"] + len(bad) == len(listed)
        for name, words in {
            "audio_only/audio_only_opus.mp4": "no video stream",
            "corrupt/broken.mp4": "moov",
            "corrupt/git_lfs_pointer.mp4": "Git LFS pointer",
            "corrupt/sample_qt.mp4": "decodes",
            "corrupt/vp9_invalid-bitstream.webm": "none of its 51 frames decodes",
            "corrupt/zero_bytes.webm": "empty",
            "derived_damage/html_error_page.mp4": "HTML",
        }.items():
            assert words in bad[f"awkward/{name}"]


def test_missing_files_are_counted_and_listed_but_not_bad(test_data: Path, tmp_path: Path) -> None:
    annotations = test_data / "annotations" / "hmdb51"
    artifact = run(
        Dataset(test_data / "clips" / "hmdb51", "hmdb51", "hmdb51", "train", annotations), tmp_path / "out"
    )
    found = len(ShardIndex.open(artifact))
    assert (artifact.summary["classes"], artifact.summary["quarantined"]) == (51, 0)
    assert found == artifact.summary["clips"] > 0
    assert found + artifact.summary["missing"] == found + len(rows(artifact, "missing.jsonl")) == 3570


class TestExclude:
    def test_listed_clips_are_left_out_and_counted(self, videos: Path, tmp_path: Path) -> None:
        whole = run(dataset(videos), tmp_path / "whole", Writing(shard_bytes=SMALL))
        keys = ShardIndex.open(whole).keys
        drop = tmp_path / "drop.txt"
        drop.write_text(f"{keys[3]}\n\n{keys[20]}\nbox/elsewhere\n")
        made = run(dataset(videos), tmp_path / "made", Writing(shard_bytes=SMALL, exclude=drop))
        index = ShardIndex.open(made)
        assert index.keys == [key for i, key in enumerate(keys) if i not in (3, 20)]
        assert index.classes == ShardIndex.open(whole).classes
        assert (made.summary["clips"], made.summary["excluded"]) == (CLIPS - 2, 2)
        assert whole.summary["excluded"] == 0
        assert made.digest != whole.digest
        same = outlook(dataset(videos), Writing(shard_bytes=SMALL, exclude=drop))
        assert (same["clips"], same["excluded"]) == (CLIPS - 2, 2)
        assert same["notes"][-1] == "excluded: 2 clips of drop.txt (not found: 1 of its keys, e.g. box/elsewhere)"

    def test_it_is_what_is_made_without_these_files(self, videos: Path, tmp_path: Path) -> None:
        drop = tmp_path / "drop.txt"
        drop.write_text("box/clip_01\nwave/clip_10\n")
        less = shutil.copytree(videos, tmp_path / "less")
        (less / "box" / "clip.01.MP4").unlink()
        (less / "wave" / "clip.10.MP4").unlink()
        made = run(dataset(videos), tmp_path / "made", Writing(shard_bytes=SMALL, exclude=drop))
        assert made.digest == run(dataset(less), tmp_path / "other", Writing(shard_bytes=SMALL)).digest

    def test_parts_merge_to_the_whole(self, videos: Path, tmp_path: Path) -> None:
        drop = tmp_path / "drop.txt"
        drop.write_text("box/clip_01\n")
        writing = Writing(shard_bytes=SMALL, exclude=drop)
        whole = run(dataset(videos), tmp_path / "whole", writing)
        parts = [run(dataset(videos), tmp_path / f"p{i}", replace(writing, part=(i, 2))) for i in range(2)]
        merged = merge(parts, tmp_path / "merged", tmp_path, 0.01)
        assert merged.digest == whole.digest
        assert merged.summary == whole.summary
        assert merged.request == whole.request
        other = run(dataset(videos), tmp_path / "p1all", Writing(shard_bytes=SMALL, part=(1, 2)))
        with pytest.raises(MdlError, match="another command"):
            merge([parts[0], other], tmp_path / "never", tmp_path, 0.01)

    def test_another_list_is_another_artifact(self, videos: Path, tmp_path: Path) -> None:
        drop = tmp_path / "drop.txt"
        drop.write_text("")
        made = run(dataset(videos), tmp_path / "made", Writing(shard_bytes=SMALL))
        assert run(dataset(videos), tmp_path / "made", Writing(shard_bytes=SMALL, exclude=drop)) == made
        drop.write_text("box/clip_01\n")
        with pytest.raises(MdlError, match="different: excluded, listing"):
            run(dataset(videos), tmp_path / "made", Writing(shard_bytes=SMALL, exclude=drop))

    def test_missing_files_on_the_list_are_not_missed(self, videos: Path, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("path,label\nbox/clip.01.MP4,box\ngone.mp4,box\nlost.mp4,box\n")
        (tmp_path / "drop.txt").write_text("gone\n")
        source = Dataset(videos, "csv", "d", "train", tmp_path / "list.csv")
        made = run(source, tmp_path / "made", Writing(exclude=tmp_path / "drop.txt"))
        assert (made.summary["missing"], made.summary["excluded"]) == (1, 1)
        assert [row["key"] for row in rows(made, "missing.jsonl")] == ["lost"]

    def test_faults(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(MdlError, match="no such file") as caught:
            dataset(videos).read(tmp_path / "none.txt")
        assert caught.value.fix == "check --exclude"
        every = tmp_path / "all.txt"
        every.write_text("\n".join(clip.key for clip in dataset(videos).read().clips))
        with pytest.raises(MdlError, match="every clip is excluded"):
            dataset(videos).read(every)

    def test_what_overlap_lists_is_left_out(
        self, videos: Path, tmp_path: Path, mdltool: Callable[..., Ran]
    ) -> None:
        held_out = tmp_path / "held"
        (held_out / "box").mkdir(parents=True)
        shutil.copy(videos / "box" / "clip.05.MP4", held_out / "box")
        words = ("--format", "folder", "--domain", "d", "--work", tmp_path)
        train = mdltool("shard", videos, *words, "--split", "train").path
        val = mdltool("shard", held_out, *words, "--split", "val").path
        drop = tmp_path / "drop.txt"
        assert mdltool("overlap", train, val, "--list", drop).code == 0
        ran = mdltool("shard", videos, *words, "--split", "train", "--exclude", drop, "--out", tmp_path / "clean")
        assert "excluded: 1 clips of drop.txt" in ran.err
        assert mdltool("overlap", ran.path, val).out == "no overlap\n"


class TestCommandLine:
    def test_prints_the_path_alone_or_an_object(
        self, videos: Path, tmp_path: Path, mdltool: Callable[..., Ran]
    ) -> None:
        words = ("shard", videos, "--format", "folder", "--domain", "d", "--split", "val", "--work", tmp_path)
        ran = mdltool(*words)
        assert ran.path == tmp_path / "shards" / "d-val"
        assert "classes: 2 seen of 2 listed" in ran.err
        found = mdltool(*words, "--json").json
        assert (found["artifact"], found["kind"]) == (str(ran.path), "shards")
        assert found["summary"]["clips"] == CLIPS

    def test_parts_get_names_of_their_own_and_merge_takes_a_pipe(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mdltool: Callable[..., Ran]
    ) -> None:
        words = ("shard", videos, "--format", "folder", "--domain", "d", "--split", "val", "--work", tmp_path)
        parts = [mdltool(*words, "--part", f"{i}/2", "--shard-size", "12kB").path for i in range(2)]
        assert [path.name for path in parts] == ["d-val-part0of2", "d-val-part1of2"]
        monkeypatch.setattr("mdltool.cli.inputs.piped_paths", lambda: parts)
        merged = mdltool("shard", "--merge", "--work", tmp_path)
        assert merged.path == tmp_path / "shards" / "d-val"
        assert mdltool(*words, "--shard-size", "12kB").path == merged.path

    def test_a_dry_run_writes_nothing(self, videos: Path, tmp_path: Path, mdltool: Callable[..., Ran]) -> None:
        words = ("shard", videos, "--format", "folder", "--domain", "d", "--split", "val", "--work", tmp_path)
        found = mdltool(*words, "--dry-run", "--json", "--shard-size", "12kB").json
        assert found == outlook(Dataset(videos, "folder", "d", "val"), Writing(shard_bytes=SMALL))
        assert sum(shard["clips"] for shard in found["shards"]) == CLIPS
        assert "shard-000000.tar" in mdltool(*words, "--dry-run").out
        assert os.listdir(tmp_path) == []
