"""Decoding through PyAV, which carries its own FFmpeg: takes every file, and any other backend's failures."""

from __future__ import annotations

import io
from collections.abc import Container, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from mdltool.data.video import DecodeStats, FramesMissing, VideoError, head, wrong_content

# Frames that no other frame needs are skipped unless wanted; only for codecs whose decoders leave the rest of the
# stream bit-exact when told so.
_SKIPS_UNREFERENCED = ("h264", "hevc")
_KEEP_PACKETS_BYTES = 256 << 20
Track = TypeVar("Track", av.VideoStream, av.AudioStream)


def readable(source: Path | bytes) -> str | BinaryIO:
    """What FFmpeg opens: the "file:" keeps a colon in a name from being taken for a protocol."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    name = f"file:{source}"
    try:
        name.encode()
    except UnicodeEncodeError:  # a name that is not UTF-8
        return open(source, "rb")
    return name


def packets_of(container: InputContainer, stream: Track) -> Iterator[av.Packet[Track]]:
    """The stream's packets from the current position, and the empty one that has a decoder give out all it holds.

    A container that breaks off keeps what came before.
    """
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None:
            return
        yield packet


def demux(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """As `packets_of`, without the empty one."""
    return (packet for packet in packets_of(container, stream) if packet.size)


class PyavReader:
    """One video opened by PyAV: the container is opened once and its packets are read once.

    Frames are known by their presentation times, or, where those mislead, by their number in the decoder's order.
    times_s: float64 [N] presentation times of the packets that show a frame; width, height: as displayed.
    Raises VideoError when there is nothing to decode.
    """

    backend = "pyav"

    def __init__(self, source: Path | bytes, threads: int, stats: DecodeStats) -> None:
        self._stats = stats
        self._container = _open(source)
        stats.opened += 1
        try:
            self._stream = _video_stream(self._container)
            self._context = self._stream.codec_context
            self._context.thread_count = threads
            self._context.thread_type = "AUTO" if threads != 1 else "SLICE"
            self._time_base = self._stream.time_base or Fraction(1)
            self._packets: list[av.Packet] | None = []
            self._pts, self._keys, self.step_s = self._scan()
        except BaseException:
            self.close()
            raise

    @property
    def times_s(self) -> np.ndarray:
        # In this order of operations torchcodec computes the same bits.
        return self._pts.astype(np.float64) * self._time_base.numerator / self._time_base.denominator

    @property
    def codec(self) -> str:
        return self._context.codec.canonical_name

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [U, H, W, 3], RGB, of the frames at ascending indices. Raises FramesMissing."""
        wanted = {int(self._pts[i]): row for row, i in enumerate(indices)}
        convert = _Converter(len(wanted))
        for frame in self._decode(self._key_before(min(wanted)), wanted):
            if frame.pts in wanted:
                convert(frame, wanted.pop(frame.pts))
            if not wanted:
                return convert.rows
        raise FramesMissing

    def rebuild(self) -> None:
        """Decode everything and keep the times of the frames that come out. Raises VideoError when none does."""
        times = [frame.dts if self._in_order else frame.pts for frame in self._decode(0, None)]
        decoded = np.unique(np.array([time for time in times if time is not None], np.int64))
        if not times:
            raise VideoError(f"none of its {len(self._pts)} frames decodes ({self.codec})")
        if self._in_order and len(decoded) != len(times):
            decoded = self._pts[: len(times)]
        self._pts = decoded
        self._keys = self._keys[:1]  # what stands between does not decode as it claims: read from the start

    def first_frame(self, index: int = 0) -> av.VideoFrame:
        """The first frame that decodes at or after an index. Raises VideoError when none does."""
        start = int(self._pts[index])
        for frame in self._decode(self._key_before(start), None):
            if frame.pts is not None and frame.pts >= start:
                return frame
        raise VideoError(f"none of its {len(self._pts) - index} frames decodes ({self.codec})")

    def close(self) -> None:
        self._packets = None
        self._container.close()

    def _scan(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Times of the frames, (pts, packet number) of the keyframes in packet order, and a frame's duration."""
        pts: list[int | None] = []
        keys, kept, step = [], 0, 0
        for number, packet in enumerate(demux(self._container, self._stream)):
            kept += packet.size
            if self._packets is not None:
                self._packets.append(packet)
            if kept > _KEEP_PACKETS_BYTES:
                self._packets = None
            if packet.size <= 1:  # DivX's placeholder for the delay of its B-frames
                continue
            shown = packet.pts if packet.pts is not None else packet.dts
            if packet.is_keyframe and shown is not None:
                keys.append((shown, number))
            if not packet.is_discard:
                pts.append(shown)
                step = packet.duration or step
        if not pts:
            raise VideoError("the video stream holds no frames")
        if not step and self._stream.average_rate:
            step = round(1 / self._stream.average_rate / self._time_base)
        known = [time for time in pts if time is not None]
        self._in_order = not known or self._times_mislead(known)
        if not known:  # a bare stream of pictures: at a constant rate
            known = [k * max(step, 1) for k in range(len(pts))]
        # Packets that share a time hold one shown frame (VP9's hidden reference frames).
        shown_at = np.unique(np.array(known, np.int64))
        return shown_at, np.array(keys, np.int64).reshape(-1, 2), float(step * self._time_base)

    def _times_mislead(self, pts: list[int]) -> bool:
        """Whether the packets' times name the wrong frames, so that only the decoder's order tells them apart.

        AVI stores no presentation times, and those that FFmpeg guesses swap frames around B-frames, packed ones
        (DivX, Xvid) above all, also after a copy into another container. They betray themselves by never stepping
        back although the codec reorders.
        """
        guessed = self._container.format.name == "avi" or self.codec == "mpeg4"
        return self._context.has_b_frames and (guessed or pts == sorted(pts))

    def _key_before(self, pts: int) -> int:
        """Number of the last packet from which everything at or after pts decodes."""
        before = self._keys[self._keys[:, 0] <= pts, 1]
        return 0 if self._in_order or not len(before) else int(before.max())

    def _decode(self, start: int, wanted: Container[int] | None) -> Iterator[av.VideoFrame]:
        """Frames in the decoder's order from packet `start` on; with `wanted`, others may be left out."""
        context = self._context
        context.flush_buffers()
        self._came_out = 0
        choosy = wanted is not None and self.codec in _SKIPS_UNREFERENCED and not self._in_order
        context.skip_frame = "DEFAULT"
        for packet in self._packets_from(start):
            if choosy:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"  # type: ignore[operator]
            yield from self._frames(packet)
        yield from self._frames(None)

    def _packets_from(self, start: int) -> Iterator[av.Packet]:
        if self._packets is not None:
            yield from self._packets[start:]
            return
        self._container.seek(int(self._pts[0]), stream=self._stream)
        for number, packet in enumerate(demux(self._container, self._stream)):
            if number >= start:
                yield packet

    def _frames(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError:  # a damaged packet costs its own frames only
            return []
        self._stats.decoded += len(frames)
        if self._in_order:
            for frame in frames:
                frame.pts = int(self._pts[self._came_out]) if self._came_out < len(self._pts) else None
                self._came_out += 1
        return frames


class _Converter:
    """Writes frames as upright RGB into rows of one array, of the first frame's size.

    rows: uint8 [U, H, W, 3]; there after the first call.
    """

    rows: np.ndarray

    def __init__(self, count: int) -> None:
        self._count = count
        self._reformat = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: av.VideoFrame, row: int) -> None:
        width, height = size = self._size or (frame.width, frame.height)
        rgb = self._reformat.reformat(frame, width=width, height=height, format="rgb24", threads=1)
        plane = rgb.planes[0]
        pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)[:, : 3 * width]
        upright = np.rot90(pixels.reshape(height, width, 3), quarter_turns(frame.rotation))
        if self._size is None:
            self._size = size
            self.rows = np.empty((self._count, *upright.shape), np.uint8)
        self.rows[row] = upright


def quarter_turns(rotation_degrees: float) -> int:
    """Counter-clockwise quarter turns that set a frame upright; nonsense in the header counts as none."""
    return round(rotation_degrees / 90) % 4 if abs(rotation_degrees) <= 360 else 0


def _open(source: Path | bytes) -> InputContainer:
    try:
        return av.open(readable(source), mode="r", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(_why_not_opened(source, error)) from None


def _video_stream(container: InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        if container.streams.video:
            raise VideoError("FFmpeg has no decoder for its video stream")
        raise VideoError("the file has no video stream")
    assert isinstance(stream, av.VideoStream)
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    return stream


def _why_not_opened(source: Path | bytes, error: Exception) -> str:
    known = wrong_content(source, "a video")
    if known is not None:
        return known
    if head(source)[4:8] == b"ftyp" and not _contains(source, b"moov"):
        return "cut off: the MP4's index (moov) is missing"
    detail = getattr(error, "strerror", None) or str(error)
    return f"FFmpeg cannot open the file ({detail})"


def _contains(source: Path | bytes, tag: bytes) -> bool:
    return tag in (source if isinstance(source, bytes) else source.read_bytes())
