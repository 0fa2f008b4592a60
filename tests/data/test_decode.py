"""decode() against frames that show their number, against plain sequential decoding, and on awkward files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from mdltool.data import decode_pyav, decode_torchcodec
from mdltool.data.decode import (
    DecodeStats,
    Timeline,
    VideoError,
    available_backends,
    check_video,
    decode,
)
from mdltool.errors import MdlError
from tests.data.tiny_shards import make_video, number_of, remux

BACKENDS = ("pyav", "torchcodec")
CODECS = [
    ("libx264", "mp4"),
    ("libx264", "mpegts"),
    ("libx264", "flv"),
    ("libx265", "mp4"),
    ("libvpx-vp9", "webm"),
    ("libsvtav1", "matroska"),
    ("libx264", "avi"),
    ("mpeg4", "avi"),
    ("mpeg4", "mp4"),
    ("mpeg2video", "mpeg"),
    ("mpeg2video", "avi"),
]


def needs(backend: str) -> None:
    if available_backends()[backend] is not None:
        pytest.skip(f"{backend}: {available_backends()[backend]}")


def every(step: int):
    return lambda timeline: range(0, len(timeline), step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("codec", "container"), CODECS)
def test_gives_the_frames_asked_for(codec: str, container: str, backend: str) -> None:
    needs(backend)
    video = make_video(codec=codec, container=container)
    for chosen in ([0], [39], [17], [12, 13], [3, 20, 38], list(range(40))):
        decoded = decode(video, lambda _, chosen=chosen: chosen, backend=backend)
        assert [number_of(frame) for frame in decoded.frames] == chosen
        assert decoded.indices.tolist() == chosen
    assert np.allclose(decoded.timeline.times_s, np.arange(40) / 25, atol=1e-3)
    assert decoded.timeline.duration_s == pytest.approx(1.6, abs=1e-3)
    assert decoded.frames.dtype == torch.uint8
    assert decoded.frames.shape == (40, 3, 48, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_and_order_are_the_callers(backend: str) -> None:
    needs(backend)
    decoded = decode(make_video(), lambda _: [30, 5, 5, 12], backend=backend)
    assert decoded.indices.tolist() == [5, 12, 30]
    frames = decoded.frames[torch.from_numpy(decoded.rows([[30, 5], [5, 12]]))]
    assert [[number_of(f) for f in row] for row in frames] == [[30, 5], [5, 12]]
    with pytest.raises(AssertionError):
        decoded.rows([6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_are_those_of_the_frames(backend: str) -> None:
    needs(backend)
    ticks = [50 + t for t in np.cumsum([0, 1, 1, 5, 2, 2, 9, 1, 1, 1, 3, 30]).tolist()]
    decoded = decode(make_video(12, times=ticks), every(1), backend=backend)
    assert np.allclose(decoded.timeline.times_s, (np.array(ticks) - 50) / 25, atol=1e-6)
    assert decoded.timeline.duration_s == pytest.approx((ticks[-1] - 50 + 2) / 25)  # the median step is 2
    assert [number_of(frame) for frame in decoded.frames] == list(range(12))


@pytest.mark.parametrize("backend", BACKENDS)
def test_trim_is_a_half_open_interval_from_the_first_frame(backend: str) -> None:
    needs(backend)
    video = make_video(times=[100 + n for n in range(40)])
    decoded = decode(video, every(1), trim=(0.6, 1.2), backend=backend)
    assert [number_of(frame) for frame in decoded.frames] == list(range(15, 30))
    assert decoded.indices.tolist() == list(range(15))
    assert decoded.timeline.times_s[0] == 0
    assert decoded.timeline.duration_s == pytest.approx(0.6)
    assert check_video(video, full=True, trim=(0.6, 1.2)).frames == 15
    with pytest.raises(VideoError, match=r"no frame lies between 7 and 8 s of a video of 1.600 s"):
        decode(video, every(1), trim=(7.0, 8.0), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decodes_only_from_the_keyframe_to_the_last_chosen(backend: str) -> None:
    needs(backend)
    video = make_video(200, gop=20)
    stats = DecodeStats()
    decode(video, lambda _: [103, 110], backend=backend, stats=stats)
    assert stats.opened == 1
    # 100 is a keyframe; torchcodec may start one earlier, and a few frames are on their way when 110 comes out.
    assert 2 <= stats.decoded <= {"pyav": 20, "torchcodec": 40}[backend]


def test_every_video_is_opened_once_and_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    video, opened, real_open = make_video(), [], av.open
    monkeypatch.setattr(decode_pyav.av, "open", lambda *a, **k: opened.append(a) or real_open(*a, **k))
    asked = []
    stats = DecodeStats()
    decode(video, lambda timeline: asked.append(1) or range(len(timeline)), stats=stats, backend="pyav")
    assert (len(opened), len(asked), stats.opened, stats.decoded) == (1, 1, 1, 40)


def test_torchcodec_opens_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torchcodec")
    import torchcodec.decoders

    opened = []
    real = torchcodec.decoders.Demuxer
    monkeypatch.setattr(torchcodec.decoders, "Demuxer", lambda *a, **k: opened.append(a) or real(*a, **k))
    stats = DecodeStats()
    decoded = decode(make_video(), every(3), stats=stats, backend="torchcodec")
    assert (decoded.backend, len(opened), stats.opened) == ("torchcodec", 1, 1)
    assert stats.decoded <= 40


SIZES = [(320, 240), (340, 256), (66, 50)]
COLOURS = [
    None,
    (Colorspace.ITU709, ColorRange.MPEG),
    (Colorspace.ITU601, ColorRange.JPEG),
    (Colorspace.BT2020, ColorRange.MPEG),
]


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", COLOURS)
def test_both_decoders_give_the_same_bits(pix_fmt: str, size: tuple[int, int], colour) -> None:
    needs("torchcodec")
    assert_same_bits(make_video(8, size=size, pix_fmt=pix_fmt, colour=colour, gop=4))


@pytest.mark.parametrize(("codec", "container"), [("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4")])
@pytest.mark.parametrize("size", SIZES)
def test_both_decoders_give_the_same_bits_for_other_codecs(
    codec: str, container: str, size: tuple[int, int]
) -> None:
    needs("torchcodec")
    assert_same_bits(make_video(8, size=size, codec=codec, container=container, gop=4))


def assert_same_bits(source: bytes | Path) -> None:
    ours, theirs = (decode(source, every(3), backend=backend) for backend in BACKENDS)
    assert (ours.backend, theirs.backend) == BACKENDS
    assert torch.equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.timeline.times_s, theirs.timeline.times_s)
    assert ours.timeline.duration_s == pytest.approx(theirs.timeline.duration_s)


def test_torchcodec_leaves_the_rest_to_pyav() -> None:
    needs("torchcodec")
    for video in (make_video(8, codec="mpeg4", container="avi"), make_video(8, pix_fmt="yuv420p10le")):
        assert decode(video, every(1), backend="torchcodec").backend == "pyav"


def test_a_damaged_frame_leaves_the_timeline() -> None:
    video = remux(make_video(20, codec="mjpeg", container="matroska", pix_fmt="yuvj420p"), "matroska", [7])
    asked: list[int] = []

    def choose(timeline: Timeline) -> Sequence[int]:
        asked.append(len(timeline))
        return range(len(timeline))

    decoded = decode(video, choose)
    assert asked == [20, 19]
    assert [number_of(frame) for frame in decoded.frames] == [n for n in range(20) if n != 7]
    assert decoded.timeline.times_s[7] == pytest.approx(8 / 25, abs=1e-3)
    assert check_video(video, full=True).frames == 19
    # where the damaged frame is not asked for, nothing is decoded twice
    asked.clear()
    stats = DecodeStats()
    decode(video, lambda timeline: asked.append(len(timeline)) or [2, 15], stats=stats)
    assert asked == [20]
    assert stats.decoded <= 20


def test_a_video_without_a_good_frame_says_so() -> None:
    video = make_video(6, codec="mjpeg", container="matroska", pix_fmt="yuvj420p")
    video = remux(video, "matroska", range(6))
    with pytest.raises(VideoError) as caught:
        decode(video, every(1))
    assert caught.value.reason == "none of its 6 frames decodes (mjpeg)"
    for full in (False, True):
        with pytest.raises(VideoError, match="none of its 6 frames decodes"):
            check_video(video, full=full)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_without_times_come_at_a_constant_rate(backend: str) -> None:
    needs(backend)
    decoded = decode(remux(make_video(30), "h264"), every(7), backend=backend)
    assert [number_of(frame) for frame in decoded.frames] == [0, 7, 14, 21, 28]
    assert np.allclose(decoded.timeline.times_s, np.arange(30) / 25)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_size_that_changes_is_scaled_to_the_first(backend: str) -> None:
    needs(backend)
    small, large = (remux(make_video(10, size=size), "h264") for size in ((64, 48), (128, 96)))
    decoded = decode(small + large, every(1), backend=backend)
    assert decoded.frames.shape == (20, 3, 48, 64)
    assert [number_of(frame) for frame in decoded.frames] == [*range(10), *range(10)]


def test_long_files_are_read_again_instead_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pyav, "_KEEP_PACKETS_BYTES", 0)
    stats = DecodeStats()
    decoded = decode(make_video(60), lambda _: [40, 45], stats=stats, backend="pyav")
    assert [number_of(frame) for frame in decoded.frames] == [40, 45]
    assert stats.opened == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["-dash.mp4", "http:colon.mp4", "späce %d ok.mp4", os.fsdecode(b"latin\xe9.mp4")])
def test_hostile_names(tmp_path: Path, name: str, backend: str) -> None:
    needs(backend)
    path = tmp_path / name
    path.write_bytes(make_video(10))
    assert number_of(decode(path, lambda _: [6], backend=backend).frames[0]) == 6
    assert check_video(path, full=False).frames == 10


def test_threads_change_nothing() -> None:
    video = make_video(60)
    one, four = (decode(video, every(5), backend="pyav", threads=threads).frames for threads in (1, 4))
    assert torch.equal(one, four)


def test_check_video_measures() -> None:
    info = check_video(make_video(times=[3 * n for n in range(40)], size=(80, 60)), full=False)
    assert (info.width, info.height, info.frames, info.codec) == (80, 60, 40, "h264")
    assert info.fps == pytest.approx(25 / 3)
    assert info.duration_s == pytest.approx(4.8)


def test_reasons_for_what_is_no_video(tmp_path: Path) -> None:
    cases = {
        b"": "the file is empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "a Git LFS pointer",
        b"<!DOCTYPE html><html></html>": "an HTML page",
        make_video()[:1500]: "cut off",
        b"hello" * 100: "FFmpeg cannot open the file",
    }
    for content, reason in cases.items():
        path = tmp_path / "video.mp4"
        path.write_bytes(content)
        for source in (content, path):
            with pytest.raises(VideoError, match=reason):
                check_video(source, full=False)
    with pytest.raises(VideoError, match="cannot be read \\(No such file"):
        decode(tmp_path / "gone.mp4", every(1))


def test_a_machine_without_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    decode_torchcodec.fault.cache_clear()
    try:
        reason = available_backends()["torchcodec"]
        assert reason is not None
        assert "not installed" in reason
        assert decode(make_video(4), every(1)).backend == "pyav"
        with pytest.raises(MdlError, match="torchcodec cannot be used here"):
            decode(make_video(4), every(1), backend="torchcodec")
    finally:
        decode_torchcodec.fault.cache_clear()


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("torchcodec")
    monkeypatch.setenv("MDLTOOL_DECODER", "torchcodec")
    assert decode(make_video(4), every(1)).backend == "torchcodec"
    monkeypatch.setenv("MDLTOOL_DECODER", "decord")
    with pytest.raises(MdlError, match="unknown decoder 'decord'"):
        decode(make_video(4), every(1))


def test_checking_needs_no_torch() -> None:
    code = "import sys, mdltool.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
