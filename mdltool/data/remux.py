"""Segments of a video: the packets that a segment needs, and a file of its own that holds them untouched."""

from __future__ import annotations

import itertools
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer

from mdltool.data.decode import check_video
from mdltool.data.decode_pyav import PyavReader, demux, readable
from mdltool.data.video import SAME_INSTANT_S, DecodeStats, VideoError

# What torchcodec takes goes into MP4; Matroska holds nearly everything else, at a resolution of 1 ms.
_MP4_CODECS = ("h264", "hevc", "av1", "vp9")
_ROUNDING_S = 0.0006
# No codec lets a packet stand further than this from its place in the order of presentation.
_REORDERED_PACKETS = 32
_SEEK_BACK_S = (0, 2, 10, 60)


@dataclass(frozen=True)
class Cut:
    """A segment in a file of its own. trim: [start, stop) in seconds from that file's first frame."""

    path: Path
    trim: tuple[float, float]


@dataclass(frozen=True)
class Span:
    """A segment in ticks of its stream: the frames wanted have first <= pts < stop."""

    first: int
    stop: float
    text: str

    def __contains__(self, pts: int | None) -> bool:
        return pts is not None and self.first <= pts < self.stop


def open_video(video: Path) -> tuple[InputContainer, av.VideoStream]:
    """An open container and its best video stream, decoding on one thread. Raises VideoError with the reason."""
    try:
        container = av.open(readable(video), mode="r", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        check_video(video, full=False)  # knows the true reason and raises it
        raise VideoError(f"FFmpeg cannot open the file ({error})") from None
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        container.close()
        raise VideoError("the file has no video stream")
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    stream.codec_context.thread_count = 1
    return container, stream


def find_span(
    container: InputContainer, stream: av.VideoStream, start_s: float | None, end_s: float | None
) -> Span:
    """A segment, given in seconds from the first frame, in ticks. Moves the container's position."""
    shown = (_shown(packet) for packet in demux(container, stream) if not packet.is_discard)
    first_shown = list(itertools.islice((time for time in shown if time is not None), _REORDERED_PACKETS))
    if not first_shown:
        raise VideoError("the video stream holds no frames")
    lowest = min(first_shown)
    ticks = float(1 / stream.time_base) if stream.time_base else 1.0

    def at(seconds: float) -> int:
        return lowest + math.ceil((seconds - SAME_INSTANT_S) * ticks)

    text = f"{start_s or 0:g} s to {'the end' if end_s is None else f'{end_s:g} s'}"
    return Span(at(start_s) if start_s else lowest, math.inf if end_s is None else at(end_s), text)


def segment_packets(container: InputContainer, stream: av.VideoStream, span: Span) -> list[av.Packet]:
    """The packets that a decoder needs to show a span, in decoding order, from the last keyframe before it.

    Raises VideoError when the video ends before the span begins.
    """
    _seek_before(container, stream, span.first)
    packets: list[av.Packet] = []
    key, needed, past = None, 0, 0
    for packet in demux(container, stream):
        shown = _shown(packet)
        if _is_key(packet) and (key is None or (shown is not None and shown <= span.first)):
            packets, key, needed = [], shown, 0
        # frames shown before their keyframe need the ones before it
        if key is not None and shown is not None and shown >= key:
            packets.append(packet)
            needed = len(packets) if _wanted(packet, span) else needed
            past = 0 if shown < span.stop else past + 1
        if past > _REORDERED_PACKETS:
            break
    if not needed:
        raise VideoError(f"no frame lies in the segment from {span.text}")
    return packets[:needed]


def cut_segment(video: Path, start_s: float | None, end_s: float | None, out: Path) -> Cut:
    """Copy the packets of a segment, from the keyframe at or before its start, into `out` plus a suffix.

    start_s, end_s: seconds from the video's first frame. Frames before the start are in the file, because others
    need them; `trim` leaves them out. Raises VideoError when no frame lies in the segment or the codec's packets
    cannot be cut.
    """
    container, stream = open_video(video)
    with container:
        codec = stream.codec_context.codec.canonical_name
        span = find_span(container, stream, start_s, end_s)
        packets = segment_packets(container, stream, span)
        # a packet of one byte is DivX's placeholder: it shows nothing
        shown = {_shown(packet) or 0: _wanted(packet, span) for packet in packets if packet.size > 1}
        times = np.array(sorted(shown), np.int64)
        times_s = (times - times[0]) * float(stream.time_base or 1)
        suffix = ".mp4" if codec in _MP4_CODECS and len(shown) == len(packets) else ".mkv"
        path = out.with_name(out.name + suffix)
        try:
            _mux(packets, stream, path)
        except ValueError as error:
            raise VideoError(f"{codec} cannot be cut without re-encoding ({error}): use --encode h264") from None
    ranks = np.flatnonzero([shown[time] for time in times])
    return Cut(path, _trim(times_s, int(ranks[0]), int(ranks[-1]) + 1, path))


def _mux(packets: list[av.Packet], stream: av.VideoStream, path: Path) -> None:
    """Write packets, shifted to begin at 0; decoding times are made anew, since containers differ in theirs."""
    shown = [_shown(packet) or 0 for packet in packets]
    order = sorted(shown)
    delay = max(later - time for later, time in zip(order, shown, strict=True))
    with av.open(f"file:{path}", mode="w", options={"fflags": "+bitexact"}) as container:
        target = container.add_stream_from_template(stream, opaque=True)
        for packet, time, decoded in zip(packets, shown, order, strict=True):
            packet.pts, packet.dts = time - order[0], decoded - order[0] - delay
            packet.stream = target
            container.mux(packet)


def _trim(times_s: np.ndarray, first: int, stop: int, path: Path) -> tuple[float, float]:
    """Frames first to stop in the times that the new container gives them, which may be rounded."""
    with closing(PyavReader(path, 1, DecodeStats())) as reader:
        written_s = reader.times_s - reader.times_s[0]
        after_s = float(written_s[-1]) + (reader.step_s or 1.0)

    def written(time_s: float) -> float:
        at = np.searchsorted(written_s, time_s - _ROUNDING_S)
        return float(written_s[min(at, len(written_s) - 1)])

    return written(times_s[first]), written(times_s[stop]) if stop < len(times_s) else after_s


def _seek_before(container: InputContainer, stream: av.VideoStream, pts: int) -> None:
    """Move to a keyframe at or before `pts`, or to the beginning."""
    for back_s in _SEEK_BACK_S:
        target = pts - round(back_s / (stream.time_base or 1))
        try:
            container.seek(target, stream=stream)
            key = next((packet for packet in demux(container, stream) if _is_key(packet)), None)
            if key is not None and (_shown(key) or 0) <= pts:
                container.seek(target, stream=stream)
                return
        except av.FFmpegError:  # this container cannot be searched
            break
    try:
        container.seek(0)
    except av.FFmpegError:
        container.seek(0, unsupported_byte_offset=True)


def _shown(packet: av.Packet) -> int | None:
    """When the packet's frame is shown, in ticks, or None where the container does not say."""
    return packet.pts if packet.pts is not None else packet.dts


def _is_key(packet: av.Packet) -> bool:
    return packet.is_keyframe and packet.size > 1 and _shown(packet) is not None


def _wanted(packet: av.Packet, span: Span) -> bool:
    return packet.size > 1 and not packet.is_discard and _shown(packet) in span
