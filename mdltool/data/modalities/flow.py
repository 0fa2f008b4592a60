"""Optical flow of a clip, at the pairs of frames that stacks evenly over it need (spec cm3t 5.3).

RAFT (torchvision) where its weights are there, else OpenCV's DIS; or the data set's own flow frames, as
EPIC-Kitchens publishes them: folders or tars of a video, u/frame_0000000001.jpg and v/frame_0000000001.jpg.

Axes: P pairs, H W pixels, C channels.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange
from PIL import Image, UnidentifiedImageError

from mdltool.data.encode import REPRODUCIBLE_H264
from mdltool.data.modalities import Absent, Flow, Part
from mdltool.errors import MdlError
from mdltool.registry import did_you_mean

if TYPE_CHECKING:
    import torch

METHODS = ("auto", "raft_small", "raft_large", "dis")
_RAFTS = ("raft_large", "raft_small")
_FLOW_FRAME = re.compile(r"(?:^|/)(u|v)/frame_(\d{10})\.jpe?g$")
# Videos of 2018 (P01_01) have a pair of every second frame of 60 a second, those of 2020 (P01_101) of each of 50.
_EPIC_RATES = ((re.compile(r"P\d\d_\d\d"), 30.0), (re.compile(r"P\d\d_1\d\d"), 50.0))
_H264 = {"crf": "20", "preset": "fast", **REPRODUCIBLE_H264}
Dense = Callable[[Any], np.ndarray]  # uint8 [P + 1, 3, H, W] -> float32 [P, 2, H, W] pixels


@dataclass(frozen=True)
class FlowOptions:
    """How flow is found, and at which pairs.

    method: auto, raft_large, raft_small or dis. weights: RAFT's, a file; empty: where torch keeps its own.
    short_side: pixels of the shorter side of the frames compared. bound: the largest motion in pixels that 8 bits
    hold. stacks, pairs: that many stacks of so many consecutive pairs. pairs_per_s: of the data set's own flow
    frames; 0: EPIC-Kitchens's, by the video's name.
    """

    method: str = "auto"
    weights: str = ""
    short_side: int = 256
    bound: float = 20.0
    stacks: int = 8
    pairs: int = 5
    pairs_per_s: float = 0.0
    kind: ClassVar[str] = "flow"

    def check(self, where: str) -> None:
        """Raises MdlError for values without a meaning."""
        if self.method not in METHODS:
            what = f"there is no method '{self.method}' of optical flow"
            raise MdlError(what, f"{where}.method", did_you_mean(self.method, METHODS))
        if self.short_side < 128 or self.stacks < 1 or self.pairs < 1 or self.bound <= 0:
            raise MdlError(
                "flow wants a short side of at least 128 pixels, a stack, a pair and a bound above 0", where, None
            )


def picked_pairs(count: int, stacks: int, pairs: int) -> np.ndarray:
    """int64 [stacks, pairs]: which of `count` pairs stand in which stack; too few repeat the last."""
    starts = np.linspace(0, max(0, count - pairs), stacks).round().astype(np.int64)
    return np.minimum(starts[:, None] + np.arange(pairs), count - 1)


def resolved(options: FlowOptions, where: str) -> tuple[str, str]:
    """(method, path of its weights or empty) that are here. Raises MdlError where none is."""
    candidates = [options.method]
    if options.method == "auto":
        small = "small" in Path(options.weights).name
        candidates = (["raft_small"] if small else ["raft_large"]) if options.weights else [*_RAFTS, "dis"]
    for name in candidates:
        path = _weights(name, options.weights) if name in _RAFTS else None
        if path is not None and path.is_file():
            return name, str(path)
    if candidates[-1] in _RAFTS:
        raise MdlError(
            f"the weights of {candidates[-1]} are not there", path, f"--set {where}.weights=FILE, or dis"
        )
    if not _has_cv2():
        raise MdlError(
            "optical flow needs RAFT's weights or OpenCV, and neither is here",
            where,
            f"pip install 'mdltool[flow]', or --set {where}.weights=raft_large.pth, or --side {where}=FLOW_FRAMES",
        )
    return "dis", ""


def computed_flow(part: Part, method: str, weights: str, options: FlowOptions) -> Flow:
    """The flow of a clip's own frames. Raises Absent for a clip of one frame."""
    from mdltool.data.decode import Timeline, decode

    if part.is_image:
        raise Absent("an image has no motion")
    dense = _dense(method, weights)
    flows: list[np.ndarray] = []
    times: dict[int, tuple[float, float]] = {}  # of the pairs found so far, by number, ascending
    stacks: list[np.ndarray] = []
    for stack in range(options.stacks):
        wanted: list[int] = []

        def choose(
            timeline: Timeline, stack: int = stack, wanted: list[int] = wanted, known: Any = times
        ) -> list[int]:
            if len(timeline) < 2:
                raise Absent("one frame has no motion")
            own = picked_pairs(len(timeline) - 1, options.stacks, options.pairs)[stack]
            stacks[stack:] = [own]
            wanted[:] = [pair for pair in np.unique(own).tolist() if pair not in known]
            return [*wanted, wanted[-1] + 1] if wanted else [0]

        # One stack at a time: all frames of a large video at once would not fit into memory.
        decoded = decode(part.shown, choose, trim=part.trim)
        if wanted:
            flows.append(dense(_scaled(decoded.frames, options.short_side)))
        at = decoded.timeline.times_s
        times |= {pair: (float(at[pair]), float(at[pair + 1])) for pair in wanted}
    rows_SK = np.searchsorted(list(times), np.stack(stacks))
    return Flow(_quantised(np.concatenate(flows), options.bound), np.array(list(times.values())), rows_SK)


def published_flow(part: Part, side: Path, options: FlowOptions) -> Flow:
    """The data set's own flow frames of a clip. Raises Absent for none, MdlError where their rate is not known."""
    rate = options.pairs_per_s or _epic_rate(side)
    frames = _flow_frames(side)
    numbers = frames.numbers[(frames.numbers > part.start_s * rate) & (frames.numbers <= part.stop_s * rate)]
    if not len(numbers):
        last = frames.numbers[-1] / rate if len(frames.numbers) else 0.0
        raise Absent(f"the flow frames of {side.name} end at {last:.2f} s: none is of the clip")
    picked, rows_SK = np.unique(picked_pairs(len(numbers), options.stacks, options.pairs), return_inverse=True)
    own = numbers[picked]
    pixels = [[frames.read(axis, int(number), options.short_side) for axis in "uv"] for number in own]
    begins = (own - 1) / rate - part.start_s
    return Flow(np.array(pixels, np.uint8), np.stack([begins, begins + 1 / rate], 1), rows_SK)


def encode_flow(flow: Flow) -> bytes:
    """An H.264 file of grey frames, one a pair, u above v."""
    target = io.BytesIO()
    pixels = flow.pixels_P2HW.reshape(len(flow.pixels_P2HW), -1, flow.pixels_P2HW.shape[-1])
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(25), options=_H264)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pixels.shape[1:]
        stream.pix_fmt = "gray"
        stream.codec_context.color_range = ColorRange.JPEG
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "gray")
            frame.color_range = ColorRange.JPEG
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return target.getvalue()


@dataclass(frozen=True)
class _FlowFrames:
    """One video's flow frames. numbers: int64, ascending, those that have both u and v. members: in a tar, where
    each of u and v lies (offset, size)."""

    path: Path
    numbers: np.ndarray
    members: dict[tuple[str, int], tuple[int, int]] | None

    def read(self, axis: str, number: int, short_side: int) -> np.ndarray:
        """uint8 [H, W], even sides, the shorter at most `short_side`. Raises Absent for a damaged picture."""
        name = f"{axis}/frame_{number:010d}.jpg"
        try:
            if self.members is None:
                content = (self.path / name).read_bytes()
            else:
                offset, size = self.members[axis, number]
                with open(self.path, "rb") as handle:
                    handle.seek(offset)
                    content = handle.read(size)
            picture = Image.open(io.BytesIO(content)).convert("L")
        except (OSError, UnidentifiedImageError) as error:
            raise Absent(f"the flow frame {name} of {self.path.name} cannot be read ({error})") from None
        scale = min(1.0, short_side / min(picture.size))
        width, height = (max(2, round(length * scale / 2) * 2) for length in picture.size)
        return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


@functools.lru_cache(maxsize=64)
def _flow_frames(path: Path) -> _FlowFrames:
    if path.is_dir():
        found = {axis: {f.name for f in (path / axis).glob("frame_*.jpg")} for axis in "uv"}
        numbers = sorted(int(name[6:16]) for name in found["u"] & found["v"] if _FLOW_FRAME.search(f"u/{name}"))
        return _FlowFrames(path, np.array(numbers, np.int64), None)
    members: dict[tuple[str, int], tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = _FLOW_FRAME.search(member.name)
                if match and member.isreg():
                    members[match[1], int(match[2])] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise Absent(f"the flow frames {path.name} cannot be read ({error})") from None
    numbers = sorted(number for axis, number in members if axis == "u" and ("v", number) in members)
    return _FlowFrames(path, np.array(numbers, np.int64), members)


def _epic_rate(side: Path) -> float:
    for pattern, rate in _EPIC_RATES:
        if pattern.fullmatch(side.stem):
            return rate
    raise MdlError(
        f"how many flow frames a second '{side.stem}' has is not known (it is no EPIC-Kitchens name)",
        side,
        "--set flow.pairs_per_s=RATE",
    )


def _weights(name: str, given: str) -> Path | None:
    """RAFT's weights: the file given, else torch's own in its hub cache."""
    if given:
        return Path(given)
    import torch
    from torchvision.models import optical_flow

    enum = {"raft_large": optical_flow.Raft_Large_Weights, "raft_small": optical_flow.Raft_Small_Weights}[name]
    return Path(torch.hub.get_dir()) / "checkpoints" / enum.DEFAULT.url.rpartition("/")[2]


def _has_cv2() -> bool:
    import importlib.util

    return importlib.util.find_spec("cv2") is not None


@functools.lru_cache(maxsize=2)
def _dense(method: str, weights: str) -> Dense:
    return _dis() if method == "dis" else _raft(method, weights)


def _dis() -> Dense:
    import cv2

    cv2.setNumThreads(1)
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def dense(frames: torch.Tensor) -> np.ndarray:
        grey = [cv2.cvtColor(frame.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY) for frame in frames]
        return np.stack([finder.calc(a, b, None).transpose(2, 0, 1) for a, b in itertools.pairwise(grey)])

    return dense


def _raft(name: str, weights: str) -> Dense:
    import torch
    from torch.nn import functional
    from torchvision.models import optical_flow

    network = getattr(optical_flow, name)(weights=None).eval()
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:
        raise MdlError(
            f"these are no weights of {name} ({str(error)[:100]})", weights, "give torchvision's"
        ) from None

    @torch.inference_mode()
    def dense(frames: torch.Tensor) -> np.ndarray:
        height, width = frames.shape[-2:]
        images = frames.float() / 127.5 - 1
        images = functional.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
        flow = network(images[:-1], images[1:])[-1]
        return flow[..., :height, :width].numpy()

    return dense


def _scaled(frames: torch.Tensor, short_side: int) -> torch.Tensor:
    """uint8, even sides, the shorter at most `short_side` and at least 128, below which RAFT does not work."""
    from torch.nn import functional

    height, width = frames.shape[-2:]
    side = min(height, width)
    scale = min(short_side, max(side, 128)) / side
    size = [max(128, round(length * scale / 2) * 2) for length in (height, width)]
    if size == [height, width]:
        return frames
    scaled = functional.interpolate(frames.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255).byte()


def _quantised(flow_P2HW: np.ndarray, bound: float) -> np.ndarray:
    return (np.clip(flow_P2HW / bound, -1, 1) * 127 + 128).round().astype(np.uint8)
