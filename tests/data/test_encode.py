"""Cutting segments and encoding frames: what is shown stays the same, and the bytes too."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import av
import numpy as np
import pytest

from mdltool.data.decode import Decoded, VideoError, check_video, decode
from mdltool.data.encode import Encoding, Job, encode, prepare
from mdltool.data.remux import cut_segment
from mdltool.types import Clip
from tests.data.tiny_shards import make_video, number_of


def all_frames(path: Path, trim: tuple[float, float] | None = None) -> Decoded:
    return decode(path, lambda timeline: range(len(timeline)), trim=trim, backend="pyav")


def numbers(path: Path, trim: tuple[float, float] | None = None) -> list[int]:
    return [number_of(frame) for frame in all_frames(path, trim).frames]


def packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """40 numbered frames, 25 a second, a key frame every 12, B-frames."""
    path = tmp_path / "video.mp4"
    path.write_bytes(make_video())
    return path


class TestCut:
    @pytest.mark.parametrize(
        ("codec", "container", "suffix"),
        [
            ("libx264", "mp4", ".mp4"),
            ("libx264", "matroska", ".mp4"),
            ("libx264", "mpegts", ".mp4"),
            ("libx265", "mp4", ".mp4"),
            ("libvpx-vp9", "webm", ".mp4"),
            ("mpeg4", "avi", ".mkv"),
            ("mpeg2video", "mpegts", ".mkv"),
            ("mjpeg", "mov", ".mkv"),
        ],
    )
    @pytest.mark.parametrize(
        ("start_s", "end_s", "frames"),
        [(0.6, 1.0, range(15, 25)), (0.0, 0.2, range(5)), (1.3, None, range(33, 40)), (None, 0.08, range(2))],
    )
    def test_shows_the_same_frames_as_the_source(
        self,
        tmp_path: Path,
        codec: str,
        container: str,
        suffix: str,
        start_s: float | None,
        end_s: float | None,
        frames: range,
    ) -> None:
        source = tmp_path / "source"
        source.write_bytes(make_video(codec=codec, container=container, pix_fmt=_format_of(codec)))
        cut = cut_segment(source, start_s, end_s, tmp_path / "cut")
        assert cut.path.suffix == suffix
        whole = all_frames(source).frames
        got = all_frames(cut.path, cut.trim)
        assert np.array_equal(got.frames, whole[list(frames)])
        np.testing.assert_allclose(np.diff(got.timeline.times_s), 1 / 25, atol=0.0011)

    def test_begins_at_the_key_frame_before_and_ends_with_the_last_frame_needed(
        self, video: Path, tmp_path: Path
    ) -> None:
        cut = cut_segment(video, 0.6, 0.8, tmp_path / "cut")
        kept = packets(cut.path)
        assert kept[0].is_keyframe
        assert sum(packet.is_keyframe for packet in kept) == 1
        content = [bytes(packet) for packet in packets(video)]
        assert [bytes(packet) for packet in kept] == content[12 : 12 + len(kept)]
        assert len(kept) < 12
        assert cut.trim == pytest.approx((0.12, 0.32))

    def test_the_same_bytes_every_time(self, video: Path, tmp_path: Path) -> None:
        made = {cut_segment(video, 0.6, 1.0, tmp_path / name).path.read_bytes() for name in ("a", "b")}
        assert len(made) == 1

    def test_a_segment_after_the_end_is_refused_with_its_times(self, video: Path, tmp_path: Path) -> None:
        with pytest.raises(VideoError, match="no frame lies in the segment from 7 s to 9 s"):
            cut_segment(video, 7.0, 9.0, tmp_path / "cut")

    def test_a_codec_that_no_container_takes_is_refused_with_the_way_out(
        self, test_data: Path, tmp_path: Path
    ) -> None:
        gif = test_data / "awkward" / "containers" / "action_basketball_demo.gif"
        with pytest.raises(VideoError, match="use --encode h264"):
            cut_segment(gif, 1.0, 2.0, tmp_path / "cut")

    def test_real_files_of_all_kinds(self, test_data: Path, tmp_path: Path) -> None:
        refused, cut_files = {}, 0
        for path in _usable(test_data):
            duration_s = check_video(path, full=False).duration_s
            segment = (0.4 * duration_s, 0.8 * duration_s)
            try:
                cut = cut_segment(path, *segment, tmp_path / "cut")
            except VideoError as error:
                refused[path.name] = error.reason
                continue
            expected, got = all_frames(path, segment), all_frames(cut.path, cut.trim)
            assert np.array_equal(expected.frames, got.frames), path
            assert np.abs(expected.timeline.times_s - got.timeline.times_s).max() < 0.002, path
            cut_files += 1
        assert all("--encode h264" in reason or "no frame lies" in reason for reason in refused.values()), refused
        assert cut_files >= 35


class TestEncode:
    @pytest.mark.parametrize(("mode", "suffix"), [("h264", ".mp4"), ("jpeg", ".mov")])
    def test_keeps_every_frame_at_its_time(self, tmp_path: Path, mode: str, suffix: str) -> None:
        times = [0, 1, 2, 5, 6, 9, 10, 11, 20, 21, 22, 24, 30, 31, 40, 41, 42, 43, 60, 61]
        source = tmp_path / "vfr.mp4"
        source.write_bytes(make_video(len(times), times=times, rate=50))
        path = encode(source, None, None, Encoding(mode), tmp_path / "out")
        got = all_frames(path)
        assert path.suffix == suffix
        assert [number_of(frame) for frame in got.frames] == list(range(len(times)))
        np.testing.assert_allclose(got.timeline.times_s, np.array(times) / 50, atol=1e-6)

    @pytest.mark.parametrize("mode", ["h264", "jpeg"])
    @pytest.mark.parametrize(
        ("start_s", "end_s", "frames"), [(0.6, 1.0, range(15, 25)), (1.3, None, range(33, 40))]
    )
    def test_a_segment_holds_its_frames_only(
        self, video: Path, tmp_path: Path, mode: str, start_s: float, end_s: float | None, frames: range
    ) -> None:
        path = encode(video, start_s, end_s, Encoding(mode), tmp_path / "out")
        assert numbers(path) == list(frames)

    @pytest.mark.parametrize(
        ("size", "short_side", "stored"),
        [
            ((64, 48), 320, (64, 48)),
            ((64, 48), 24, (32, 24)),
            ((48, 64), 24, (24, 32)),
            ((66, 50), 25, (32, 24)),
            ((70, 50), 320, (70, 50)),
        ],
    )
    def test_sizes_are_even_and_never_enlarged(
        self, tmp_path: Path, size: tuple[int, int], short_side: int, stored: tuple[int, int]
    ) -> None:
        source = tmp_path / "source.mp4"
        source.write_bytes(make_video(5, size=size))
        for mode in ("h264", "jpeg"):
            info = check_video(encode(source, None, None, Encoding(mode, short_side), tmp_path / mode), full=True)
            assert (info.width, info.height, info.frames) == (*stored, 5)

    def test_odd_sizes_lose_a_row(self, test_data: Path, tmp_path: Path) -> None:
        odd = test_data / "awkward" / "odd_size" / "testsrc2_odd_height_and_width_mpeg2.mp4"
        info = check_video(encode(odd, None, None, Encoding("h264"), tmp_path / "out"), full=True)
        assert (info.width, info.height, info.frames) == (120, 80, 10)

    def test_h264_groups_are_closed_and_no_longer_than_asked(self, video: Path, tmp_path: Path) -> None:
        kept = packets(encode(video, None, None, Encoding("h264", gop=7), tmp_path / "out"))
        keys = [number for number, packet in enumerate(kept) if packet.is_keyframe]
        assert max(np.diff([*keys, len(kept)])) <= 7
        for key in keys:  # closed: nothing after a key frame is shown before it
            assert all((packet.pts or 0) >= (kept[key].pts or 0) for packet in kept[key:])

    def test_jpeg_has_key_frames_only(self, video: Path, tmp_path: Path) -> None:
        kept = packets(encode(video, None, None, Encoding("jpeg"), tmp_path / "out"))
        assert len(kept) == 40
        assert all(packet.is_keyframe for packet in kept)

    @pytest.mark.parametrize("mode", ["h264", "jpeg"])
    def test_rotated_video_is_stored_upright_without_sound(
        self, test_data: Path, tmp_path: Path, mode: str
    ) -> None:
        for name in ("portrait.MOV", "video_90.mov", "video_180.mov"):
            source = test_data / "awkward" / "rotated" / name
            path = encode(source, None, None, Encoding(mode), tmp_path / "out")
            with av.open(str(path)) as container:
                assert [stream.type for stream in container.streams] == ["video"]
                assert next(container.decode(video=0)).rotation == 0
            expected, got = all_frames(source).frames, all_frames(path).frames
            assert got.shape == expected.shape
            assert np.abs(expected.float() - got.float()).mean() < 4, name

    @pytest.mark.parametrize("mode", ["h264", "jpeg"])
    @pytest.mark.parametrize(
        "name", ["codecs/rawvideo_bend_002.avi", "codecs/mjpeg_boxing_d7.avi", "hdr_10bit/h265_10bits.mp4"]
    )
    def test_colours_stay_what_they_were(self, test_data: Path, tmp_path: Path, mode: str, name: str) -> None:
        source = test_data / "awkward" / name
        path = encode(source, None, None, Encoding(mode), tmp_path / "out")
        expected, got = (all_frames(p).frames.float().mean((0, 2, 3)) for p in (source, path))
        assert np.abs(expected - got).max() < 2.5

    @pytest.mark.full
    @pytest.mark.parametrize("mode", ["h264", "jpeg"])
    def test_real_files_of_all_kinds(self, test_data: Path, tmp_path: Path, mode: str) -> None:
        for path in _usable(test_data):
            made = [encode(path, None, None, Encoding(mode, 120), tmp_path / name) for name in ("a", "b")]
            assert made[0].read_bytes() == made[1].read_bytes(), path
            expected, got = all_frames(path).timeline.times_s, all_frames(made[0]).timeline.times_s
            assert len(expected) == len(got), path
            np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=str(path))


class TestPrepare:
    def test_a_whole_copy_is_the_file_itself(self, video: Path, tmp_path: Path) -> None:
        made = prepare(Job(Clip("k", video, 0), Encoding(), False, tmp_path / "new"))
        assert (made.path, made.temporary) == (video, False)
        assert made.meta == {"width": 64, "height": 48, "frames": 40, "duration_s": 1.6}

    def test_a_cut_says_what_to_show(self, video: Path, tmp_path: Path) -> None:
        made = prepare(Job(Clip("k", video, 0, 0.6, 0.8), Encoding(), True, tmp_path / "new"))
        assert made.temporary
        assert made.meta["frames"] == 5
        assert made.meta["trim"] == pytest.approx([0.12, 0.32])

    @pytest.mark.parametrize("mode", ["copy", "h264", "jpeg"])
    @pytest.mark.parametrize("segment", [(None, None), (0.1, 0.2)])
    def test_files_that_show_nothing_are_refused_with_a_reason(
        self, test_data: Path, tmp_path: Path, mode: str, segment: tuple[float | None, float | None]
    ) -> None:
        for path, reason in (
            ("corrupt/zero_bytes.webm", "the file is empty"),
            ("audio_only/audio_only_opus.mp4", "no video stream"),
            ("derived_damage/html_error_page.mp4", "HTML"),
        ):
            job = Job(Clip("k", test_data / "awkward" / path, 0, *segment), Encoding(mode), False, tmp_path / "new")
            with pytest.raises(VideoError, match=reason):
                prepare(job)
        assert os.listdir(tmp_path) == []


def _format_of(codec: str) -> str:
    return "yuvj420p" if codec == "mjpeg" else "yuv420p"


# What they show depends on where decoding begins: their packets are damaged.
_DAMAGED = ("no_timescale.mp4", "ucf_noise_in_the_middle.avi", "fight_noise_in_the_middle.mp4", "corrupted.mp4")


def _usable(test_data: Path) -> list[Path]:
    with open(test_data / "MANIFEST.csv", newline="") as handle:
        files = [Path(row["file"]) for row in csv.DictReader(handle) if row["kind"] != "clips"]
    usable = []
    for path in files:
        try:
            check_video(test_data / path, full=True)
        except VideoError:
            continue
        if path.name not in _DAMAGED:
            usable.append(test_data / path)
    return usable
