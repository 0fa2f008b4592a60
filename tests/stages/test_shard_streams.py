"""Shards with modalities: what is stored, marked and counted, and the same bytes however they are made."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import webdataset

from mdltool.artifact import Artifact
from mdltool.data import shard_builder
from mdltool.data.encode import Encoding, Job
from mdltool.data.index import ShardIndex
from mdltool.data.modalities import Part
from mdltool.data.modalities.asked import asked
from mdltool.data.modalities.clip import prepare_with_streams, stored_stream
from mdltool.data.modalities.plan import Streams
from mdltool.data.modalities.sides import Sides
from mdltool.data.modalities.video import streams_of_video
from mdltool.data.sampling import Sampling
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec, load_views
from mdltool.stages.shard import Dataset, Effort, Writing, merge, outlook, run
from mdltool.types import Clip
from tests.conftest import Ran
from tests.data.test_formats import touch
from tests.data.tiny_sound import RATE, make_video, tone
from tests.stages.class_folders import contents

SMALL = 60_000
LOG_MEL = ("audio.bands=16", "audio.fft=512", "audio.bins=4")
BOTH = asked(("audio", "text"), (), (), LOG_MEL)
TEXT = asked(("text",), (), (), ())  # needs no torch, with which workers start slowly
SRT = "1\n00:00:00,200 --> 00:00:00,600\nhello there\n\n2\n00:00:01,000 --> 00:00:01,500\ngood ñora\n"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 videos; the last has no sound, the first four have subtitles."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        path = folder / ("wave", "box")[number % 2] / f"clip.{number}.mkv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_video(tone(1.6) if number < 5 else None, 1.6))
        if number < 4:
            path.with_suffix(".srt").write_text(SRT, "utf-8")
    return folder


def dataset(videos: Path) -> Dataset:
    return Dataset(videos, "folder", "d", "train")


def writing(streams: tuple[Any, ...] = BOTH, part: tuple[int, int] | None = None) -> Writing:
    return Writing(shard_bytes=SMALL, part=part, streams=streams)


def segments(videos: Path, tmp_path: Path, rows: str) -> Dataset:
    path = tmp_path / "list.csv"
    path.write_text(f"path,label,start,end\n{rows}")
    return Dataset(videos, "csv", "d", "train", path)


def streams_of(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """key -> the streams that the clip's JSON tells of."""
    index = ShardIndex.open(artifact)
    return {key: index.clip(i)[0]["streams"] for i, key in enumerate(index.keys)}


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(dataset(videos), tmp_path_factory.mktemp("made") / "out", writing())


class TestContent:
    def test_the_index_says_what_the_streams_are(self, made: Artifact) -> None:
        index = ShardIndex.open(made)
        assert list(index.streams) == ["audio", "text"]
        audio, text = index.streams.values()
        assert (audio.kind, audio.width, audio.extractor, audio.clips) == ("audio", 64, "log_mel", 5)
        assert audio.options["bands"] == 16
        assert audio.options["rate"] == RATE
        assert (text.kind, text.width, text.extractor, text.clips) == ("text", 512, "hashed_ngrams", 4)
        assert made.summary["streams"] == {"audio": 5, "text": 4}
        assert made.verify() == []

    def test_what_lacks_a_stream_is_marked_and_kept(self, made: Artifact) -> None:
        found = streams_of(made)
        assert found["wave/clip_0"]["audio"] == {"tokens": 3, "raw": "flac", "missing": None}
        assert found["wave/clip_0"]["text"] == {"tokens": 2, "raw": "json", "missing": None}
        assert found["wave/clip_4"]["text"]["missing"] == "there is no transcript of this video"
        assert found["box/clip_5"]["audio"] == {
            "tokens": 0,
            "raw": None,
            "missing": "the video has no audio track",
        }

    def test_plain_webdataset_reads_them(self, made: Artifact) -> None:
        urls = [str(path) for path in sorted(made.path.glob("*.tar"))]
        samples = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
        sample = samples["wave/clip_0"]
        assert {"mkv", "json", "audio.npy", "audio.json", "audio.flac", "text.npy", "text.json"} <= set(sample)
        tokens = np.load(io.BytesIO(sample["audio.npy"]))
        assert (tokens.shape, tokens.dtype) == ((3, 64), np.float16)
        about = json.loads(sample["audio.json"])
        assert about == {
            "t": [[0.0, 0.96], [0.48, 1.44], [0.96, 1.6]],
            "source": "clip.0.mkv",
            "version": "1",
        }
        said = json.loads(sample["text.json"].decode("utf-8"))
        assert said["utterances"][1] == {"start_s": 1.0, "end_s": 1.5, "text": "good ñora"}
        assert set(samples["box/clip_5"]) >= {"mkv", "json"}
        assert not any("." in name for name in samples["box/clip_5"])

    def test_reading_leaves_the_raw_streams_out(self, made: Artifact) -> None:
        index = ShardIndex.open(made)
        i = index.keys.index("wave/clip_0")
        _, _, streams = index.clip_and_streams(i, {"audio": 64, "text": 512})
        assert (streams["audio"].shape, streams["text"].shape) == ((3, 64), (2, 512))
        assert set(index.read(i, raw=True)) - set(index.read(i)) == {"audio.flac"}

    def test_segments_are_cut_in_seconds(self, videos: Path, tmp_path: Path) -> None:
        clip = Clip("k", videos / "wave" / "clip.0.mkv", 0, 0.8, 1.4)
        streams = Streams(BOTH, [clip], videos).of(clip)
        prepared = prepare_with_streams(Job(clip, Encoding(), False, tmp_path / "s", streams=streams))
        audio, text = prepared.streams
        assert json.loads(text.members["text.json"])["t"] == [[0.2, 0.7]]
        assert audio.raw is not None
        with av.open(io.BytesIO(audio.raw[1])) as container:
            samples = np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])
        assert np.array_equal(samples, tone(1.6)[round(0.8 * RATE) : round(1.4 * RATE)])


class TestOfAVideo:
    def test_are_those_of_its_shards(self, made: Artifact, videos: Path) -> None:
        index = ShardIndex.open(made)
        for key, video in (("wave/clip_0", "wave/clip.0.mkv"), ("box/clip_5", "box/clip.5.mkv")):
            _, _, stored = index.clip_and_streams(index.keys.index(key), {"audio": 64, "text": 512})
            found = streams_of_video(videos / video, index.streams)
            for name, tokens in stored.items():
                assert np.array_equal(found[name].tokens_MD, tokens)
                assert (found[name].missing is None) == bool(len(tokens))

    def test_of_a_part_with_a_side_file(self, made: Artifact, videos: Path, tmp_path: Path) -> None:
        side = tmp_path / "said.csv"
        side.write_text("start,end,text\n0,0.4,no\n0.5,1,hello there\n")
        index = ShardIndex.open(made)
        found = streams_of_video(videos / "box/clip.5.mkv", index.streams, trim=(0.48, 1.2), sides={"text": side})
        _, _, stored = index.clip_and_streams(index.keys.index("wave/clip_0"), {"text": 512})
        assert np.array_equal(found["text"].tokens_MD, stored["text"][:1])
        assert found["audio"].missing == "the video has no audio track"

    def test_predict_reads_the_transcript_that_shard_reads(
        self, made: Artifact, videos: Path, tmp_path: Path
    ) -> None:
        """Subtitles alone, whatever else has the video's name; one file of all videos by its paths."""
        text = {"text": ShardIndex.open(made).streams["text"]}
        here = tmp_path / "wave"
        here.mkdir()
        video = here / "v.mkv"
        video.write_bytes((videos / "wave/clip.0.mkv").read_bytes())
        (here / "v.json").write_text('{"title": "no transcript"}')
        assert streams_of_video(video, text)["text"].missing == "there is no transcript of this video"
        (here / "v.SRT").write_text(SRT, "utf-8")
        assert len(streams_of_video(video, text)["text"].tokens_MD) == 2
        every = tmp_path / "all.csv"
        every.write_text("start,end,text,video\n0,1,hi,wave/v.mkv\n")
        assert len(streams_of_video(video, text, sides={"text": every})["text"].tokens_MD) == 1
        (here / "v.vtt").write_text("WEBVTT\n")
        with pytest.raises(MdlError, match="two files may be that of v"):
            streams_of_video(video, text)

    def test_another_version_of_the_extractor_is_refused(self, made: Artifact, videos: Path) -> None:
        info = replace(ShardIndex.open(made).streams["audio"], version="0")
        with pytest.raises(MdlError, match="'audio' comes from version 0 of log_mel, here is 1"):
            streams_of_video(videos / "wave/clip.0.mkv", {"audio": info})


class TestSameBytes:
    def test_with_another_number_of_workers(self, made: Artifact, videos: Path, tmp_path: Path) -> None:
        again = run(dataset(videos), tmp_path / "out", writing(), Effort(workers=2))
        assert (again.digest, contents(again)) == (made.digest, contents(made))

    def test_from_merged_parts(self, videos: Path, tmp_path: Path) -> None:
        whole = run(dataset(videos), tmp_path / "whole", writing(TEXT))
        parts = [run(dataset(videos), tmp_path / f"p{i}", writing(TEXT, part=(i, 2))) for i in (1, 0)]
        assert all(0 < part.summary["streams"]["text"] < 4 for part in parts)
        merged = merge(parts, tmp_path / "merged", tmp_path, max_bad=0.01)
        assert (merged.digest, contents(merged)) == (whole.digest, contents(whole))

    def test_of_an_interrupted_run(self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = run(dataset(videos), tmp_path / "whole", writing(TEXT))
        write, left = shard_builder.write_shard, iter((True, True))

        def stopping(*given: Any) -> Any:
            if not next(left, False):
                raise KeyboardInterrupt
            return write(*given)

        monkeypatch.setattr(shard_builder, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(dataset(videos), tmp_path / "out", writing(TEXT))
        monkeypatch.undo()
        again = run(dataset(videos), tmp_path / "out", writing(TEXT))
        assert (again.digest, contents(again)) == (whole.digest, contents(whole))

    def test_without_modalities_nothing_speaks_of_them(self, videos: Path, tmp_path: Path) -> None:
        plain = run(dataset(videos), tmp_path / "plain", writing(()))
        index = plain.load_json("index.json")
        assert "streams" not in index
        assert list(index["shards"][0]["members"][0]) == ["key", "offset", "size", "label"]
        assert "streams" not in plain.request
        assert "streams" not in plain.summary
        assert "streams" not in ShardIndex.open(plain).clip(0)[0]

    def test_other_side_files_make_other_shards(self, videos: Path, tmp_path: Path) -> None:
        side = tmp_path / "said.csv"
        side.write_text("start,end,text\n0,1,one\n")
        streams = asked(("text",), (f"text={side}",), (), ())
        run(dataset(videos), tmp_path / "out", writing(streams))
        side.write_text("start,end,text\n0,1,other\n")
        with pytest.raises(MdlError, match=r"another artifact .* streams\.text\.sources"):
            run(dataset(videos), tmp_path / "out", writing(streams))


class TestFeatures:
    def features(self, folder: Path, arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
        for name, array in arrays.items():
            path = folder / "own" / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        return asked(("flow",), (), (f"flow={folder / 'own'}",), ())

    def test_the_data_sets_own_are_stored_as_they_are(self, videos: Path, tmp_path: Path) -> None:
        given = np.arange(12, dtype=np.float32).reshape(4, 3)
        streams = self.features(tmp_path, {"wave/clip.0": given, "clip.1": given[:2].astype(np.float16)})
        index = ShardIndex.open(run(dataset(videos), tmp_path / "out", writing(streams)))
        assert (index.streams["flow"].extractor, index.streams["flow"].width) == ("files", 3)
        assert index.streams["flow"].clips == 2
        found = {k: index.clip_and_streams(i, {"flow": 3})[2]["flow"] for i, k in enumerate(index.keys)}
        assert np.array_equal(found["wave/clip_0"], given)
        assert np.array_equal(found["box/clip_1"], given[:2])
        assert len(found["wave/clip_2"]) == 0

    def test_of_whole_videos_segments_take_what_overlaps(self, videos: Path, tmp_path: Path) -> None:
        streams = self.features(tmp_path, {"clip.0": np.eye(3, dtype=np.float32), "clip.1": np.eye(3)})
        (tmp_path / "own" / "clip.0.json").write_text(json.dumps({"t": [[0, 0.5], [0.5, 1.0], [1.0, 1.5]]}))
        data = segments(videos, tmp_path, "wave/clip.0.mkv,x,0.6,1.4\nbox/clip.1.mkv,x,0.6,1.4\n")
        artifact = run(data, tmp_path / "out", writing(streams))
        index = ShardIndex.open(artifact)
        i = index.keys.index("wave/clip_0_00000600_00001400")
        assert np.array_equal(index.clip_and_streams(i, {"flow": 3})[2]["flow"], np.eye(3)[1:])
        assert json.loads(index.read(i)["flow.json"])["t"] == [[-0.1, 0.4], [0.4, 0.9]]
        reason = streams_of(artifact)["box/clip_1_00000600_00001400"]["flow"]["missing"]
        assert reason == "clip.1.npy is of the whole video, and clip.1.json has no times 't'"

    @pytest.mark.parametrize(
        ("second", "what"),
        [
            (np.zeros((2, 4), np.float32), "the features are 4 wide, those of other clips 3"),
            (np.zeros(3, np.float32), r"features are floating-point \[M, D\], this is float32 \[3\]"),
            (np.zeros((2, 3), np.int64), "this is int64"),
            (np.full((2, 3), np.nan), "not finite"),
        ],
    )
    def test_wrong_ones_stop_the_run(self, second: np.ndarray, what: str, videos: Path, tmp_path: Path) -> None:
        streams = self.features(tmp_path, {"clip.1": np.zeros((2, 3), np.float32), "clip.2": second})
        with pytest.raises(MdlError, match=what) as told:
            run(dataset(videos), tmp_path / "out", writing(streams))
        assert "clip.2.npy" in str(told.value.where)
        assert not (tmp_path / "out").exists()

    def test_none_at_all(self, videos: Path, tmp_path: Path) -> None:
        streams = self.features(tmp_path, {"other": np.zeros((2, 3), np.float32)})
        with pytest.raises(MdlError, match=r"no clip has a feature file there .e\.g\. box/clip_1\.npy"):
            run(dataset(videos), tmp_path / "out", writing(streams))


class TestCommand:
    def shard(self, mdltool: Callable[..., Ran], videos: Path, *words: object) -> Ran:
        return mdltool("shard", videos, "--format", "folder", "--domain", "d", "--split", "train", *words)

    def test_says_how_many_clips_have_each(self, mdltool: Callable[..., Ran], videos: Path, tmp_path: Path) -> None:
        settings = [word for setting in LOG_MEL for word in ("--set", setting)]
        words = ("--modality", "audio", "--modality", "text", *settings, "--out", tmp_path / "out")
        ran = self.shard(mdltool, videos, *words)
        assert ran.path == tmp_path / "out"
        assert "audio: 5 clips have it, 1 lack it, e.g. box/clip_5: the video has no audio track" in ran.err
        assert "text: files for 4 of 6 clips" in ran.err
        assert "text: 4 clips have it" in ran.err
        shown = mdltool("inspect", tmp_path / "out")
        assert "audio 5, text 4" in " ".join(shown.out.split())

    def test_a_dry_run_names_the_streams(self, mdltool: Callable[..., Ran], videos: Path, tmp_path: Path) -> None:
        ran = self.shard(mdltool, videos, "--modality", "mic0=audio", "--dry-run", "--json")
        assert ran.json["streams"]["mic0"]["extractor"] == "log_mel"
        assert "streams" not in self.shard(mdltool, videos, "--dry-run", "--json").json

    @pytest.mark.parametrize(
        ("words", "what"),
        [
            (("--modality", "sound"), "'sound' does not say its kind"),
            (("--modality", "mic=smell"), "'smell' is no kind of modality"),
            (("--modality", "audio", "--modality", "audio"), "the stream 'audio' is given twice"),
            (("--modality", "audio.x=audio"), "'audio.x' cannot name a stream"),
            (("--side", "audio=."), "'audio' is not among the streams of --modality"),
            (("--modality", "audio", "--side", "audio=/nowhere"), "there is no such file or folder"),
            (("--modality", "audio", "--side", "audio"), "'audio' names no path"),
            (("--modality", "audio", "--set", "audio.bandz=3"), "have no option 'bandz'"),
            (("--modality", "audio", "--set", "rate=3"), "'rate=3' is no option of a stream"),
            (("--modality", "audio", "--features", "audio=.", "--set", "audio.rate=8000"), "taken as they are"),
            (("--modality", "audio", "--set", "audio.rate=1"), "1 samples a second is no rate of sound"),
        ],
    )
    def test_faults_are_named(
        self, words: tuple[str, ...], what: str, mdltool: Callable[..., Ran], videos: Path, tmp_path: Path
    ) -> None:
        ran = self.shard(mdltool, videos, *words, "--out", tmp_path / "out")
        assert ran.code == 1
        assert what in ran.err
        assert not (tmp_path / "out").exists()


def test_no_clip_with_the_stream_is_an_error(videos: Path, tmp_path: Path) -> None:
    side = tmp_path / "said.srt"
    side.write_text("1\n00:00:00,000 --> 00:00:00,200\nshort\n")
    data = segments(videos, tmp_path, "wave/clip.0.mkv,x,0.8,1.4\n")
    streams = asked(("text",), (f"text={side}",), (), ())
    with pytest.raises(
        MdlError, match=r"no clip has the stream 'text'.* ends at 0\.2 s, before the clip \(from 0\.8"
    ):
        run(data, tmp_path / "out", writing(streams))
    assert run(data, tmp_path / "out", writing(())).verify() == []  # the other request is not in its way
    parts = [run(data, tmp_path / f"p{i}", writing(streams, part=(i, 2))) for i in range(2)]
    with pytest.raises(MdlError, match="no clip has the stream 'text'"):
        merge(parts, tmp_path / "merged", tmp_path, max_bad=0.01)


def test_a_mended_side_file_is_read_by_the_same_command(videos: Path, tmp_path: Path) -> None:
    side = tmp_path / "said.csv"
    side.write_text("start,end,text\n1,0,ends early\n")
    whole = Writing(streams=asked(("text",), (f"text={side}",), (), ()))
    with pytest.raises(MdlError, match="before it starts"):
        run(dataset(videos), tmp_path / "out", whole)
    assert not (tmp_path / "out.partial").exists()
    side.write_text("start,end,text\n0,10,as it should be\n")
    assert run(dataset(videos), tmp_path / "out", whole).summary["streams"]["text"] > 0


def test_a_video_whose_name_is_no_utf_8_has_its_streams(videos: Path, tmp_path: Path) -> None:
    odd = tmp_path / "videos" / "wave" / os.fsdecode(b"clip\xff.mkv")
    odd.parent.mkdir(parents=True)
    shutil.copy(videos / "wave" / "clip.0.mkv", odd)
    shutil.copy(videos / "wave" / "clip.0.srt", odd.with_suffix(".srt"))
    made = run(dataset(tmp_path / "videos"), tmp_path / "out", writing(TEXT))
    assert streams_of(made)["wave/clip?"]["text"]["missing"] is None
    spec = ViewSpec(1, 1, Sampling(4, 0.8), 32, 32)
    assert load_views(odd, spec, key=odd.stem).frames is not None


def test_text_without_any_transcript(tmp_path: Path) -> None:
    (tmp_path / "v" / "a").mkdir(parents=True)
    (tmp_path / "v" / "a" / "x.mkv").write_bytes(make_video(None, 0.2))
    with pytest.raises(MdlError, match="no transcripts beside the videos") as told:
        outlook(dataset(tmp_path / "v"), writing(asked(("text",), (), (), ())))
    assert "--side text=" in str(told.value.fix)


def test_two_side_files_of_one_name(videos: Path, tmp_path: Path) -> None:
    for folder in ("m", "n"):
        (tmp_path / "side" / folder).mkdir(parents=True)
        (tmp_path / "side" / folder / "clip.0.wav").write_bytes(b"")
    streams = asked(("audio",), (f"audio={tmp_path / 'side'}",), (), ())
    with pytest.raises(MdlError, match=r"two files may be that of wave/clip\.0"):
        run(dataset(videos), tmp_path / "out", writing(streams))


def test_two_side_files_of_one_name_in_one_folder(tmp_path: Path) -> None:
    """The video itself, in the same folder, is none."""
    touch(tmp_path, "v.mkv", "v.wav")
    sides = Sides(tmp_path, "audio", tmp_path, "--side audio")
    assert sides.of(tmp_path / "v.mkv") == tmp_path / "v.wav"
    touch(tmp_path, "v.mp3")
    with pytest.raises(MdlError, match=r"two files may be that of v: .*v\.mp3 and .*v\.wav"):
        Sides(tmp_path, "audio", tmp_path, "--side audio").of(tmp_path / "v.mkv")


@pytest.mark.parametrize("fault", [ValueError("odd"), RecursionError("deep"), OSError(5, "read error", "/secret")])
def test_a_fault_costs_the_stream_and_not_the_clip(
    fault: Exception, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk and a file that is wrong for every clip stop the run, though."""

    def failing(*_: object) -> None:
        raise fault

    clip = Clip("k", videos / "wave" / "clip.0.mkv", 0)
    (audio,) = Streams(BOTH[:1], [clip], videos).of(clip)
    own = Part(clip.video, 0.0, 1.0, clip.video)
    monkeypatch.setattr("mdltool.data.modalities.clip.read_raw", failing)
    found = stored_stream(audio, own)
    assert (found.tokens, found.members) == (0, {})
    assert found.missing == f"{type(fault).__name__}: {getattr(fault, 'strerror', None) or fault}"
    for fault in (OSError(errno.ENOSPC, "full"), MdlError("wrong", None, None)):
        with pytest.raises(type(fault)):
            stored_stream(audio, own)


def test_a_folder_without_side_files(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for modality, what in (("audio", r"no \.aac, .* file in the folder"), ("flow", "nor a folder with u and v")):
        streams = asked((modality,), (f"{modality}={tmp_path / 'empty'}",), (), ())
        with pytest.raises(MdlError, match=what):
            run(dataset(videos), tmp_path / "out", writing(streams))
