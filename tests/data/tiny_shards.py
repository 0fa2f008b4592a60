"""Small real videos whose frames show their own number, and shards of them, written by hand."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mdltool.artifact import Artifact, Draft, begin
from mdltool.files import sha256_file

_BITS = 8
_WITH_B_FRAMES = ("libx264", "libx265", "mpeg4", "mpeg2video")


def picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]: the upper half shows the number in black and white bars, the lower half moves."""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(_BITS):
        if number >> bit & 1:
            image[: height // 2, bit * width // _BITS : (bit + 1) * width // _BITS] = 235
    columns = (np.arange(width) * 5 + number * 7) % 256
    image[height // 2 :, :, 0] = columns
    image[height // 2 :, :, 1] = 255 - columns
    image[height // 2 :, :, 2] = np.linspace(0, 255, height - height // 2, dtype=np.uint8)[:, None]
    return image


def number_of(frame_3HW: Any) -> int:
    """The number that a decoded frame shows."""
    pixels = np.asarray(frame_3HW)
    height, width = pixels.shape[1:]
    row = pixels[0, height // 4]
    return sum((row[(2 * bit + 1) * width // (2 * _BITS)] > 127) << bit for bit in range(_BITS))


def make_video(
    frames: int = 40,
    *,
    times: Sequence[int] | None = None,
    rate: int = 25,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    colour: tuple[Colorspace, ColorRange] | None = None,
) -> bytes:
    """An encoded video of numbered frames. times: each frame's presentation time in units of 1 / rate."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames if codec in _WITH_B_FRAMES else 0
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, rate)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), "rgb24").reformat(format=pix_fmt)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            if colour is not None:
                frame.colorspace, frame.color_range = colour
                stream.codec_context.colorspace, stream.codec_context.color_range = colour
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return target.getvalue()


def remux(video: bytes, container: str, damaged: Sequence[int] = ()) -> bytes:
    """The same packets in another container, with the content of some of them, counted from 0, zeroed."""
    target = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(target, "w", format=container) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux() if p.size):
            if number in damaged:
                blank = av.Packet(bytes(packet.size))
                blank.pts, blank.dts, blank.time_base = packet.pts, packet.dts, packet.time_base
                packet = blank
            packet.stream = stream
            out.mux(packet)
    return target.getvalue()


def write_shards(
    out: Path,
    videos: Sequence[bytes],
    *,
    per_shard: int = 4,
    domain: str = "tiny",
    classes: Sequence[str] = ("a", "b", "c"),
    trims: dict[int, tuple[float, float]] | None = None,
    streams: dict[str, Sequence[np.ndarray | None]] | None = None,
) -> Artifact:
    """A shards artifact of these videos; clip i has the key clip/i and the label i modulo the classes.

    streams: audio streams by name, [M, D] of each clip, beside a raw stream of 5000 bytes; None: the clip has none.
    """
    draft = begin(out, kind="shards", stage="shard", inputs=[], request={"domain": domain})
    assert isinstance(draft, Draft)
    shards = []
    for first in range(0, len(videos), per_shard):
        path = draft.path / f"{domain}-{first // per_shard:06d}.tar"
        members = []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_shard, len(videos))):
                offset = tar.offset
                key, label = f"clip/{i:03d}", i % len(classes)
                metadata = {"key": key, "label": label}
                if trims and i in trims:
                    metadata["trim"] = list(trims[i])
                _add(tar, f"{key}.mp4", videos[i])
                _add(tar, f"{key}.json", json.dumps(metadata).encode())
                own = {name: arrays[i] for name, arrays in (streams or {}).items()}
                there = {name: array for name, array in own.items() if array is not None}
                for name, array in there.items():
                    _add(tar, f"{key}.{name}.npy", _npy(array))
                tokens = tar.offset
                for name in there:
                    _add(tar, f"{key}.{name}.flac", bytes(5000))
                entry = {"key": key, "offset": offset, "size": tar.offset - offset, "label": label}
                members.append({**entry, "raw": tar.offset - tokens} if streams else entry)
        about = {"file": path.name, "clips": len(members), "bytes": path.stat().st_size}
        shards.append({**about, "sha256": sha256_file(path), "members": members})
    index = {"domain": domain, "split": "train", "task": "single_label", "classes": list(classes)}
    index |= {"clips": len(videos), "quarantined": 0, "shards": shards}
    if streams:
        index["streams"] = {name: _stream(arrays) for name, arrays in streams.items()}
    (draft.path / "index.json").write_text(json.dumps(index))
    return draft.commit({})


def _stream(arrays: Sequence[np.ndarray | None]) -> dict[str, Any]:
    there = [array for array in arrays if array is not None]
    entry = {"kind": "audio", "extractor": "made_up", "options": {}, "version": "1"}
    return {**entry, "width": there[0].shape[1], "clips": len(there)}


def _npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
