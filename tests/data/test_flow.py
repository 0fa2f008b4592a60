"""Optical flow of clips: the data set's own frames, RAFT, DIS, and why a clip has none."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mdltool.data.modalities import Absent, Flow, Part
from mdltool.data.modalities import flow as module
from mdltool.data.modalities.flow import (
    FlowOptions,
    computed_flow,
    encode_flow,
    picked_pairs,
    published_flow,
    resolved,
)
from mdltool.errors import MdlError

SIDE, STEP = 128, 3


def video(path: Path, frames: int = 8) -> Path:
    """A picture that moves STEP pixels to the right from frame to frame."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 215, (16, 40)), np.ones((8, 8))).astype(np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(frames):
            left = 100 - STEP * number
            grey = np.ascontiguousarray(texture[:, left : left + SIDE])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([grey] * 3, 2), "rgb24")))
        out.mux(stream.encode())
    return path


def part(path: Path, start_s: float = 0.0, duration_s: float = 0.8) -> Part:
    return Part(path, start_s, duration_s, path)


def flow_frames(folder: Path, count: int = 40) -> Path:
    """EPIC-Kitchens' layout; the u of pair i is 100 + i, its v 200 - i."""
    for axis, start, sign in (("u", 100, 1), ("v", 200, -1)):
        (folder / axis).mkdir(parents=True)
        for number in range(1, count + 1):
            picture = Image.new("L", (24, 16), start + sign * number)
            picture.save(folder / axis / f"frame_{number:010d}.jpg", quality=95)
    return folder


class TestPublished:
    def test_the_clips_pairs_by_time(self, tmp_path: Path) -> None:
        """P01_01 has 30 pairs a second: 0.4 s to 1.2 s are the pairs 13 to 36."""
        side = flow_frames(tmp_path / "P01_01")
        options = FlowOptions(stacks=3, pairs=2)
        flow = published_flow(part(Path("P01_01.mp4"), 0.4, 0.8), side, options)
        assert flow.rows_SK.tolist() == [[0, 1], [2, 3], [4, 5]]
        middles = flow.pixels_P2HW[:, :, 8, 12].astype(int)
        wanted = 13 + picked_pairs(24, 3, 2).ravel()
        assert np.abs(middles - np.stack([100 + wanted, 200 - wanted], 1)).max() <= 1
        assert flow.times_P2[0].round(6).tolist() == [0.0, round(1 / 30, 6)]

    def test_tars_hold_the_same(self, tmp_path: Path) -> None:
        side = flow_frames(tmp_path / "P01_101")
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            tar.add(side, ".")
        (tmp_path / "t.tar").rename(tmp_path / "P01_101.tar")
        found = [
            published_flow(part(Path("x.mp4")), path, FlowOptions()) for path in (side, tmp_path / "P01_101.tar")
        ]
        assert np.array_equal(found[0].pixels_P2HW, found[1].pixels_P2HW)
        assert found[0].times_P2[0, 1] == 1 / 50, "videos of 2020 have 50 pairs a second"

    def test_agrees_with_the_published_frame_numbers(self) -> None:
        """RGB frame n of 60 a second belongs to the pair (n - 1) // 2 + 1 (of EPIC-Kitchens' own baselines)."""
        for start_s, frame in ((1.56, 93), (49.15, 2949), (61.07, 3664)):
            first = np.arange(1, 4000)[np.arange(1, 4000) > start_s * 30][0]
            assert abs(first - ((frame - 1) // 2 + 1)) <= 1

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        side = flow_frames(tmp_path / "P01_01", 3)
        with pytest.raises(Absent, match=r"flow frames of P01_01 end at 0\.10 s: none is of the clip"):
            published_flow(part(Path("x.mp4"), 5.0), side, FlowOptions())
        other = flow_frames(tmp_path / "session7", 3)
        with pytest.raises(MdlError, match="how many flow frames a second 'session7' has is not known") as told:
            published_flow(part(Path("x.mp4")), other, FlowOptions())
        assert "pairs_per_s" in str(told.value.fix)
        assert len(published_flow(part(Path("x.mp4")), other, FlowOptions(pairs_per_s=10)).pixels_P2HW) == 3
        (side / "u" / "frame_0000000001.jpg").write_bytes(b"no picture")
        with pytest.raises(Absent, match=r"u/frame_0000000001\.jpg of P01_01 cannot be read"):
            published_flow(part(Path("x.mp4")), side, FlowOptions())


class TestComputed:
    @pytest.fixture
    def clip(self, tmp_path: Path) -> Path:
        return video(tmp_path / "v.mkv")

    @pytest.mark.skipif(
        importlib.util.find_spec("cv2") is None, reason="the extra 'flow' (OpenCV) is not installed"
    )
    def test_dis_finds_the_motion(self, clip: Path) -> None:
        flow = computed_flow(part(clip), "dis", "", FlowOptions(short_side=128, stacks=2, pairs=3))
        assert flow.rows_SK.tolist() == [[0, 1, 2], [3, 4, 5]]
        u, v = np.median((flow.pixels_P2HW.astype(float) - 128) / 127 * 20, axis=(0, 2, 3))
        assert abs(u - STEP) < 0.3
        assert abs(v) < 0.3

    def test_pairs_are_of_the_frames_that_stacks_need(self, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []

        def dense(frames: torch.Tensor) -> np.ndarray:
            seen.append(len(frames))
            return np.full((len(frames) - 1, 2, SIDE, SIDE), -40.0, np.float32)

        monkeypatch.setattr(module, "_dense", lambda *_: dense)
        flow = computed_flow(part(clip), "dis", "", FlowOptions(stacks=3, pairs=4))
        assert picked_pairs(7, 3, 4).tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]
        assert flow.rows_SK.tolist() == picked_pairs(7, 3, 4).tolist()
        assert seen == [5, 3, 2], "each pair once"
        assert (flow.pixels_P2HW == 1).all(), "more motion than 8 bits hold"
        assert flow.times_P2[3].round(6).tolist() == [0.3, 0.4]

    def test_raft_with_weights_of_a_file(self, clip: Path, tmp_path: Path) -> None:
        from torchvision.models.optical_flow import raft_small

        torch.manual_seed(0)
        path = tmp_path / "raft_small.pth"
        torch.save(raft_small(weights=None).state_dict(), path)
        options = FlowOptions(weights=str(path), short_side=128, stacks=1, pairs=1)
        method, weights = resolved(options, "flow")
        assert (method, weights) == ("raft_small", str(path))
        flow = computed_flow(part(clip), method, weights, options)
        assert flow.pixels_P2HW.shape == (1, 2, SIDE, SIDE)
        with pytest.raises(MdlError, match="no weights of raft_large"):
            computed_flow(part(clip), "raft_large", weights, options)

    def test_one_frame_and_images_have_no_motion(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_dense", lambda *_: None)
        with pytest.raises(Absent, match="one frame has no motion"):
            computed_flow(part(video(tmp_path / "one.mkv", 1)), "dis", "", FlowOptions())
        with pytest.raises(Absent, match="an image has no motion"):
            computed_flow(Part(Path("x.png"), 0, 0, Path("x.png"), is_image=True), "dis", "", FlowOptions())


def test_without_raft_and_opencv_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "_has_cv2", lambda: False)
    with pytest.raises(MdlError, match="needs RAFT's weights or OpenCV") as told:
        resolved(FlowOptions(), "flow")
    assert "pip install 'mdltool[flow]'" in str(told.value.fix)
    with pytest.raises(MdlError, match="weights of raft_small are not there"):
        resolved(FlowOptions("raft_small"), "flow")
    monkeypatch.setattr(module, "_has_cv2", lambda: True)
    assert resolved(FlowOptions(), "flow") == ("dis", "")
    cached = tmp_path / "checkpoints" / "raft_small_C_T_V2-01064c6d.pth"
    cached.parent.mkdir()
    cached.touch()
    assert resolved(FlowOptions(), "flow") == ("raft_small", str(cached))


def test_stored_flow_is_one_grey_picture_a_pair() -> None:
    at = np.arange(32, dtype=np.float64)
    pixels = (128 + 60 * np.sin(at / 9 + np.arange(5)[:, None, None, None] + np.zeros((5, 2, 24, 32)))).astype(
        np.uint8
    )
    flow = Flow(pixels, np.zeros((5, 2)), np.zeros((1, 5), np.int64))
    content = encode_flow(flow)
    assert content == encode_flow(flow)
    with av.open(io.BytesIO(content)) as container:
        found = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    assert found.shape == (5, 48, 32)
    assert np.abs(found.astype(int) - pixels.reshape(5, 48, 32)).mean() < 3


@pytest.mark.parametrize(
    ("options", "what"), [(FlowOptions("rafft"), "no method 'rafft'"), (FlowOptions(short_side=64), "128 pixels")]
)
def test_options_that_mean_nothing(options: FlowOptions, what: str) -> None:
    with pytest.raises(MdlError, match=what):
        options.check("--set flow")
