"""T x S views against the same views taken one at a time, and what they cost."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mdltool.data import decode_pyav
from mdltool.data.decode import DecodeStats, VideoError, available_backends, decode
from mdltool.data.sampling import Sampling, clip_indices, view_starts
from mdltool.data.transforms import crop_corners, resized
from mdltool.errors import MdlError
from mdltool.evaluate.views import ViewSpec, load_views, parse_views
from tests.data.tiny_shards import make_video

SAMPLING = Sampling(4, 0.8)


@pytest.fixture(scope="module")
def video() -> bytes:
    return make_video(90, size=(80, 48), gop=12)


def one_by_one(video: bytes, spec: ViewSpec) -> torch.Tensor:
    """The views, each decoded by itself."""
    timeline = decode(video, lambda _: [0]).timeline
    starts = view_starts(timeline.duration_s, spec.sampling.span_s(timeline), spec.temporal, spec.starts)
    views = []
    for start_s in starts:
        wanted = clip_indices(timeline, start_s, spec.sampling)
        decoded = decode(video, lambda _, wanted=wanted: wanted.tolist())
        frames = resized(decoded.frames[torch.from_numpy(decoded.rows(wanted))], spec.short_side)
        height, width = frames.shape[-2:]
        for y, x in crop_corners(height, width, spec.crop, spec.spatial, spec.axis, spec.rounding):
            views.append(frames[..., y : y + spec.crop, x : x + spec.crop].transpose(0, 1))
    return torch.stack(views)


@pytest.mark.parametrize(
    "spec",
    [
        ViewSpec(10, 3, SAMPLING, 48, 32),
        ViewSpec(10, 3, SAMPLING, 40, 32, starts="spaced_inclusive", rounding="ceil"),
        ViewSpec(1, 1, SAMPLING, 64, 56, starts="centre"),
        ViewSpec(3, 1, SAMPLING, 48, 48),
        ViewSpec(2, 3, Sampling(1, 0.8), 48, 32, axis="long_side"),
    ],
)
def test_views_are_what_each_would_be_alone(video: bytes, spec: ViewSpec) -> None:
    views = load_views(video, spec)
    assert views.frames.shape == (spec.temporal * spec.spatial, 3, spec.sampling.num_frames, spec.crop, spec.crop)
    assert views.frames.dtype == torch.uint8
    assert views.frames.is_contiguous()
    assert torch.equal(views.frames, one_by_one(video, spec))
    assert views.distinct == spec.temporal * spec.spatial
    assert views.backend == "pyav"


def test_portrait_views_go_along_the_long_side() -> None:
    video = make_video(30, size=(48, 80))
    spec = ViewSpec(1, 3, SAMPLING, 48, 48, axis="long_side")
    views = load_views(video, spec)
    assert torch.equal(views.frames, one_by_one(video, spec))
    assert views.distinct == 3
    assert load_views(video, ViewSpec(1, 3, SAMPLING, 48, 48)).distinct == 1  # no room to the sides


def test_a_video_is_opened_once_and_decoded_once(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, out = [], []
    real_open, real_frames = av.open, decode_pyav.PyavReader._frames
    monkeypatch.setattr(decode_pyav.av, "open", lambda *a, **k: opened.append(a) or real_open(*a, **k))

    def count(reader: decode_pyav.PyavReader, packet: av.Packet | None) -> list[av.VideoFrame]:
        frames = real_frames(reader, packet)
        out.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(decode_pyav.PyavReader, "_frames", count)
    stats = DecodeStats()
    load_views(video, ViewSpec(10, 3, SAMPLING, 48, 32), stats=stats)
    assert len(opened) == stats.opened == 1
    assert len(out) == len(set(out)) == stats.decoded <= 90


def test_torchcodec_opens_and_decodes_once_too(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    if available_backends()["torchcodec"] is not None:
        pytest.skip(str(available_backends()["torchcodec"]))
    from torchcodec.decoders import VideoPacketDecoder

    decoders, out = [], []
    real_decoder, real_ready = VideoPacketDecoder._from_stream, VideoPacketDecoder._receive_ready_frames
    monkeypatch.setattr(
        VideoPacketDecoder, "_from_stream", lambda *a, **k: decoders.append(a) or real_decoder(*a, **k)
    )

    def count(decoder: VideoPacketDecoder) -> list:
        frames = real_ready(decoder)
        out.extend(frame.pts_seconds for frame in frames)
        return frames

    monkeypatch.setattr(VideoPacketDecoder, "_receive_ready_frames", count)
    spec = ViewSpec(10, 3, SAMPLING, 48, 32)
    wanted = load_views(video, spec).frames
    monkeypatch.setenv("MDLTOOL_DECODER", "torchcodec")
    stats = DecodeStats()
    views = load_views(video, spec, stats=stats)
    assert views.backend == "torchcodec"
    assert torch.equal(views.frames, wanted)
    assert len(decoders) == stats.opened == 1
    assert len(out) == len(set(out)) == stats.decoded <= 90


def test_one_view_needs_only_its_part_of_the_video(video: bytes) -> None:
    stats = DecodeStats()
    load_views(video, ViewSpec(1, 1, SAMPLING, 48, 32), stats=stats)
    assert stats.decoded <= 24  # of 90: 0.8 s are 20 frames


def test_short_videos_collapse(video: bytes) -> None:
    views = load_views(make_video(15, size=(80, 48)), ViewSpec(10, 3, SAMPLING, 48, 32))
    assert views.distinct == 3
    assert all(torch.equal(views.frames[3 * t + s], views.frames[s]) for t in range(10) for s in range(3))
    square = load_views(video, ViewSpec(2, 3, SAMPLING, 48, 48))
    assert square.distinct == 6


def test_trim_moves_the_views(video: bytes) -> None:
    spec = ViewSpec(1, 1, Sampling(2, 0.8), 48, 48)
    whole, trimmed = load_views(video, spec), load_views(video, spec, trim=(1.2, 2.0))
    assert [_number(whole.frames[0, :, i], video) for i in (0, 1)] == [0, 19]
    assert [_number(trimmed.frames[0, :, i], video) for i in (0, 1)] == [30, 49]


def _number(frame: torch.Tensor, video: bytes) -> int:
    """Which frame of the video a centre crop shows."""
    whole = decode(video, lambda timeline: range(len(timeline))).frames[..., 16:64]
    return int(np.argmax([torch.equal(candidate, frame) for candidate in whole]))


def test_random_views_depend_on_seed_and_key(video: bytes) -> None:
    def frames(seed: int, key: str) -> torch.Tensor:
        return load_views(video, ViewSpec(4, 1, SAMPLING, 48, 32, starts="random", seed=seed), key=key).frames

    assert torch.equal(frames(0, "a"), frames(0, "a"))
    assert not torch.equal(frames(0, "a"), frames(1, "a"))
    assert not torch.equal(frames(0, "a"), frames(0, "b"))


def test_paths_and_bytes_agree(video: bytes, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    spec = ViewSpec(2, 1, SAMPLING, 48, 32)
    assert torch.equal(load_views(path, spec).frames, load_views(video, spec).frames)


def test_what_cannot_be_decoded_says_why() -> None:
    with pytest.raises(VideoError, match="the file is empty"):
        load_views(b"", ViewSpec(2, 1, SAMPLING, 48, 32))


def test_reading_views() -> None:
    assert parse_views("10x3") == (10, 3)
    assert parse_views("1x1") == (1, 1)
    for text in ("10", "10x2", "0x3", "x3", "10x3 ", "10X3", "-1x3", "10x3x1", "٣x1", "100000x1"):
        with pytest.raises(MdlError, match="no choice of views"):
            parse_views(text)


def test_crops_must_fit() -> None:
    with pytest.raises(MdlError, match="do not fit"):
        ViewSpec(10, 3, SAMPLING, 200, 224)


def test_real_clips(test_data: Path) -> None:
    spec = ViewSpec(10, 3, Sampling(16, 80 / 30), 128, 112)
    for file in ("ucf101/Archery/v_Archery_g03_c01.avi", "kth/boxing/person01_boxing_d2_s1.mp4"):
        stats = DecodeStats()
        content = (test_data / "clips" / file).read_bytes()
        views = load_views(content, spec, stats=stats)
        assert stats.opened == 1
        assert torch.equal(views.frames, one_by_one(content, spec))
