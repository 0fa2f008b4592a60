"""decode() on real files: against plain sequential decoding, in both decoders, and on awkward ones."""

from __future__ import annotations

import csv
import itertools
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mdltool.data.decode import DecodeStats, VideoError, check_video, decode
from tests.data.test_decode import BACKENDS, every, needs

UNUSABLE = {
    "afconvert-aac-0.5s.mp4": "no video stream",
    "audio_only_opus.mp4": "no video stream",
    "subtitles_only.mkv": "no video stream",
    "WrongFile.mp4": "cut off",
    "broken.mp4": "cut off",
    "chunk_out_of_range.mp4": "cannot open",
    "empty.flv": "cannot open",
    "git_lfs_pointer.mp4": "Git LFS pointer",
    "init_segment_only.mp4": "holds no frames",
    "invalid_userdata.mp4": "holds no frames",
    "sample_qt.mp4": "none of its 1 frames decodes",
    "vp9_invalid-bitstream.webm": "none of its 51 frames decodes",
    "zero_bytes.webm": "is empty",
    "fight_cut_at_80_percent.mp4": "cut off",
    "html_error_page.mp4": "HTML page",
    "zero_bytes.mp4": "is empty",
}


def in_order(path: Path) -> list[np.ndarray]:
    """What PyAV gives when it simply decodes the best stream from beginning to end."""
    with av.open(f"file:{path}", metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # how damage is concealed depends on it
        frames = container.decode(stream)
        return [upright(frame) for frame in frames]


def upright(frame: av.VideoFrame) -> np.ndarray:
    turns = round(frame.rotation / 90) if abs(frame.rotation) <= 360 else 0
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def manifest() -> list[dict[str, str]]:
    folder = os.environ.get("MDLTOOL_TEST_DATA")
    if not folder:
        return []
    with open(Path(folder) / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


AWKWARD = [row["file"] for row in manifest() if row["kind"] == "awkward"]
# One clip of each domain, and of the formats within it.
CLIPS = list({(row["domain"], row["label"]): row["file"] for row in manifest() if row["kind"] == "clips"}.values())


@pytest.mark.parametrize("file", AWKWARD or [""])
def test_awkward_files(test_data: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = test_data / file
    if path.name in UNUSABLE:
        for source in (path, path.read_bytes()):
            for attempt in (
                lambda source=source: decode(source, every(1)),
                lambda source=source: check_video(source, full=False),
                lambda source=source: check_video(source, full=True),
            ):
                with pytest.raises(VideoError, match=UNUSABLE[path.name]):
                    attempt()
    else:
        reference = in_order_tolerant(path)
        last = decode(path, lambda timeline: [0, len(timeline) // 2, len(timeline) - 1])
        assert 1 <= len(last.indices) <= 3
        assert last.frames.shape[2:] == reference[0].shape[:2]
        everything = decode(path.read_bytes(), every(1))
        assert len(everything.frames) == len(everything.timeline) == len(reference)
        assert all(
            np.array_equal(frame.permute(1, 2, 0), wanted)
            for frame, wanted in zip(everything.frames, reference, strict=True)
        )
        times = everything.timeline.times_s
        assert times[0] == 0
        assert (np.diff(times) > 0).all()
        assert times[-1] < everything.timeline.duration_s < 16
        assert check_video(path, full=True).frames == len(reference)
        assert check_video(path, full=False).codec == check_video(path, full=True).codec
    assert capfd.readouterr().err == ""  # FFmpeg's complaints are not the user's


def in_order_tolerant(path: Path) -> list[np.ndarray]:
    """in_order, past what does not decode, by time."""
    frames = []
    with av.open(f"file:{path}", metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                frames += packet.decode()
            except av.FFmpegError:
                continue
        if container.format.name != "avi":  # whose times are guesses
            frames.sort(key=lambda frame: frame.pts)
        return [upright(frame) for frame in frames]


@pytest.mark.parametrize("file", CLIPS or [""])
def test_clips_frame_by_frame(test_data: Path, file: str) -> None:
    path = test_data / file
    reference = in_order(path)
    for chosen in ([len(reference) // 2], [3, 4, len(reference) - 1]):
        stats = DecodeStats()
        asked = []
        decoded = decode(
            path, lambda timeline, c=chosen, a=asked: a.append(len(timeline)) or c, backend="pyav", stats=stats
        )
        assert asked == [len(reference)]  # undamaged files are decoded once
        assert stats.opened == 1
        assert all(
            np.array_equal(f.permute(1, 2, 0), reference[n]) for f, n in zip(decoded.frames, chosen, strict=True)
        )


@pytest.mark.parametrize("file", CLIPS or [""])
def test_clips_are_the_same_in_both_decoders(test_data: Path, file: str) -> None:
    needs("torchcodec")
    ours, theirs = (decode(test_data / file, every(9), backend=backend) for backend in BACKENDS)
    assert torch.equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.timeline.times_s, theirs.timeline.times_s)


UNDAMAGED = [f for f in AWKWARD if "/corrupt/" not in f and "/derived_damage/" not in f and "/audio_only/" not in f]


@pytest.mark.parametrize("file", UNDAMAGED or [""])
def test_awkward_files_are_the_same_in_both_decoders(test_data: Path, file: str) -> None:
    needs("torchcodec")
    ours, theirs = (decode(test_data / file, every(9), backend=backend) for backend in BACKENDS)
    assert torch.equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.timeline.times_s, theirs.timeline.times_s)


def test_burned_in_timestamps_tell_frames_apart(test_data: Path) -> None:
    path = test_data / "awkward/timestamps/burned_in_timestamps_1080p.mp4"
    reference = in_order(path)
    corner = [frame[:200].astype(int) for frame in reference]
    assert all(np.abs(a - b).max() > 50 for a, b in itertools.pairwise(corner))  # the clock moves
    for wanted in (0, 7, 13, 29):
        given = decode(path, lambda _, wanted=wanted: [wanted]).frames[0].permute(1, 2, 0).numpy()
        assert [np.array_equal(given, frame) for frame in reference].index(True) == wanted


def test_the_best_stream_is_ffmpegs(test_data: Path) -> None:
    info = check_video(test_data / "awkward/containers/nasa_13013.mp4", full=False)
    assert (info.width, info.height) == (480, 270)


def test_rotation_is_applied(test_data: Path) -> None:
    folder = test_data / "awkward/rotated"
    shapes = {name: decode(folder / name, every(1)).frames.shape[2:] for name in ("video_0.mov", "video_90.mov")}
    assert shapes == {"video_0.mov": (320, 568), "video_90.mov": (568, 320)}
    info = check_video(folder / "portrait.MOV", full=False)
    assert (info.width, info.height) == (320, 568)
