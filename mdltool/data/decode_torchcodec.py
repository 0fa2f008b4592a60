"""Decoding through torchcodec, on the machine's FFmpeg libraries, for the formats that it is tested on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mdltool.data.video import DecodeStats, FramesMissing, VideoError, head

_CODECS = {"h264", "hevc", "vp9", "av1"}
_8_BIT = {f"yuv{j}{sampling}p" for j in ("", "j") for sampling in ("420", "422", "444")}


@functools.cache
def fault() -> str | None:
    """None where torchcodec can be used, else the reason in one line."""
    try:
        import torchcodec
    except ImportError as error:
        return f"not installed ({error})"
    except (RuntimeError, OSError):
        return "FFmpeg's shared libraries do not load"
    try:
        from torchcodec.decoders import Demuxer  # noqa: F401
    except ImportError:
        return f"torchcodec {torchcodec.__version__} cannot list a video's packets; 0.17 can"
    except (RuntimeError, OSError) as error:
        return f"FFmpeg's shared libraries do not load ({str(error).strip().splitlines()[0]})"
    return None


class TorchcodecReader:
    """One video opened by torchcodec: scanned without decoding, then decoded from a keyframe on.

    times_s: float64 [N] presentation times. Raises VideoError when torchcodec cannot open it, or when it is outside
    the formats in which both decoders give bit-equal frames.
    """

    backend = "torchcodec"

    def __init__(self, source: Path | bytes, threads: int, stats: DecodeStats) -> None:
        from torchcodec.decoders import Demuxer

        if head(source)[:4] == b"RIFF":
            raise VideoError("AVI stores no presentation times")
        self._stats = stats
        stats.opened += 1
        try:
            self._demuxer = Demuxer(source if isinstance(source, bytes) else f"file:{source}")
            self._stream = self._demuxer.streams[0]
            if not _in_group(self._stream.metadata):
                raise VideoError("outside the formats that torchcodec is tested on")
            self._index = self._stream.scan()
            self._decoder = self._stream.make_decoder(device="cpu", num_ffmpeg_threads=threads)
        except (RuntimeError, ValueError) as error:
            raise VideoError(str(error).strip().splitlines()[0]) from None
        # Packets that share a time hold one shown frame.
        self.times_s = np.unique(self._index.pts_seconds.numpy())
        if len(self.times_s) == 1 < len(self._index):
            raise VideoError("its packets carry no times")
        self.step_s = float(self._index.duration_seconds[-1]) if len(self._index) else 0.0

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [U, H, W, 3], RGB, of the frames at ascending indices. Raises FramesMissing."""
        from torchcodec.decoders import ColorConverter

        wanted = {float(self.times_s[i]): row for row, i in enumerate(indices)}
        convert = ColorConverter(device="cpu")
        rows: np.ndarray | None = None
        try:
            for frame in self._decode(min(wanted)):
                if frame.pts_seconds in wanted:
                    pixels = convert.convert(frame).data.permute(1, 2, 0).numpy()
                    if rows is None:
                        rows = np.empty((len(indices), *pixels.shape), np.uint8)
                    rows[wanted.pop(frame.pts_seconds)] = pixels
                if rows is not None and not wanted:
                    return rows
        except (
            RuntimeError,
            ValueError,
        ) as error:  # ValueError: a size that changes in mid-stream; PyAV rescales it
            raise FramesMissing from error
        raise FramesMissing

    def close(self) -> None:
        """Nothing to do: torchcodec closes what nobody holds."""

    def _decode(self, time_s: float) -> Iterator[Any]:
        self._demuxer.seek(self._index.key_frame_seconds_for(time_s))
        self._decoder.reset()
        for packet in self._demuxer:
            frames = self._decoder.decode(packet)
            self._stats.decoded += len(frames)
            yield from frames
        frames = self._decoder.drain()
        self._stats.decoded += len(frames)
        yield from frames


def _in_group(header: Any) -> bool:
    even = header.width is not None and header.height is not None and header.width % 2 == header.height % 2 == 0
    return even and header.codec in _CODECS and header.pixel_format in _8_BIT
