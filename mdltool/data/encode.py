"""One clip's bytes for a shard: the file as it is, a segment cut from it, or its frames encoded anew.

Images stay images: encoded anew they are JPEG files, and those from arrays are PNG files where bytes are kept.

Encoders run one thread and write no dates or versions: their bytes depend on the frames only (design, section 7).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from mdltool.data.decode import check_video
from mdltool.data.decode_pyav import demux, quarter_turns
from mdltool.data.image import read_image, shrunk, write_image
from mdltool.data.image_arrays import read_row
from mdltool.data.remux import cut_segment, find_span, open_video, segment_packets
from mdltool.data.video import VideoError
from mdltool.types import Clip

if TYPE_CHECKING:
    from mdltool.data.modalities.clip import StoredStream
    from mdltool.data.modalities.plan import ClipStream

MODES = ("copy", "h264", "jpeg")
# x264's macroblock tree, on CPUs with AVX-512, reads memory that it never wrote: the same frames come out as other
# bytes from one time to the next, and from one CPU to another. Whoever encodes with libx264 here adds these.
REPRODUCIBLE_H264 = {"mbtree": "0", "threads": "1"}
_H264_OPTIONS = {"crf": "20", "preset": "fast", **REPRODUCIBLE_H264}
_JPEG_QUANTIZER = 3
_REORDERED_FRAMES = 8


@dataclass(frozen=True)
class Encoding:
    """How clips are stored. mode: copy, h264 or jpeg; of the latter two: short_side: the most pixels of the
    shorter side, never enlarged; gop: the most frames from one key frame to the next (h264)."""

    mode: str = "copy"
    short_side: int = 320
    gop: int = 16

    def as_request(self) -> dict[str, Any]:
        """What of this decides the bytes."""
        request: dict[str, Any] = {"mode": self.mode}
        if self.mode != "copy":
            request["short_side"] = self.short_side
        if self.mode == "h264":
            request["gop"] = self.gop
        return request


@dataclass(frozen=True)
class Prepared:
    """A clip ready to be stored. path: the file to store, the source itself or a temporary one.

    meta: width, height (upright), frames, duration_s, and trim [start_s, stop_s] for a cut segment. Of a whole
    file that was not decoded, frames and duration_s are what its container lists.
    """

    path: Path
    temporary: bool
    meta: dict[str, Any]
    streams: tuple[StoredStream, ...] = ()


@dataclass(frozen=True)
class Job:
    """What a worker is told. full: decode everything instead of the first frame. scratch: new files are named so,
    plus a suffix. limit_s: the time after which it counts as hanging (0: never). streams: what is stored beside."""

    clip: Clip
    encoding: Encoding
    full: bool
    scratch: Path
    limit_s: float = 0.0
    streams: tuple[ClipStream, ...] = ()


def prepare(job: Job) -> Prepared:
    """Check a clip and make the file to store. Raises VideoError with the reason when it cannot be used."""
    clip, encoding = job.clip, job.encoding
    if clip.is_image:
        return _prepare_image(job)
    if encoding.mode != "copy":
        if not clip.is_segment:
            check_video(clip.video, full=job.full)
        path = encode(clip.video, clip.start_s, clip.end_s, encoding, job.scratch)
        return Prepared(path, True, _meta(path, False))
    if not clip.is_segment:
        meta = None if job.full else _glance(clip.video)
        return Prepared(clip.video, False, meta or _meta(clip.video, job.full))
    cut = cut_segment(clip.video, clip.start_s, clip.end_s, job.scratch)
    return Prepared(cut.path, True, _meta(cut.path, job.full, cut.trim))


def _prepare_image(job: Job) -> Prepared:
    """An image decodes whole or not at all, so that it is checked whole whatever `full` says."""
    clip, encoding = job.clip, job.encoding
    if clip.is_segment:
        raise VideoError("an image has no times: it cannot be cut by a start and an end")
    if encoding.mode not in ("copy", "jpeg"):
        raise VideoError(f"an image cannot be stored as {encoding.mode}")
    pixels = read_image(clip.video) if clip.item is None else read_row(clip.video, *clip.item)
    path, small = clip.video, min(pixels.shape[:2]) <= encoding.short_side
    # Another round of JPEG would only cost quality.
    kept = encoding.mode == "copy" or (small and clip.video.suffix.lower() in (".jpg", ".jpeg"))
    if clip.item is not None or not kept:
        jpeg = encoding.mode == "jpeg"
        pixels = shrunk(pixels, encoding.short_side) if jpeg else pixels
        path = job.scratch.with_name(job.scratch.name + (".jpg" if jpeg else ".png"))
        write_image(pixels, path)
    height, width = pixels.shape[:2]
    meta = {"image": True, "width": width, "height": height, "frames": 1, "duration_s": 0.0}
    return Prepared(path, path != clip.video, meta)


def _meta(path: Path, full: bool, trim: tuple[float, float] | None = None) -> dict[str, Any]:
    info = check_video(path, full=full, trim=trim)
    meta = {
        "width": info.width,
        "height": info.height,
        "frames": info.frames,
        "duration_s": round(info.duration_s, 6),
    }
    return meta if trim is None else {**meta, "trim": [round(time, 9) for time in trim]}


def _glance(video: Path) -> dict[str, Any] | None:
    """The metadata by the container's own word and one decoded frame, or None where these do not suffice.

    Reads the beginning of the file only, where check_video reads it all to see every packet's time.
    """
    container, stream = open_video(video)
    with container:
        if not stream.frames or not stream.duration or not stream.time_base:
            return None
        frame = next(_decoded(demux(container, stream), stream), None)
        if frame is None:
            return None
        width, height = frame.width, frame.height
        if quarter_turns(frame.rotation) % 2:
            width, height = height, width
        duration_s = round(float(stream.duration * stream.time_base), 6)
        return {"width": width, "height": height, "frames": stream.frames, "duration_s": duration_s}


def encode(video: Path, start_s: float | None, end_s: float | None, encoding: Encoding, out: Path) -> Path:
    """Encode a video's frames into `out` plus a suffix, upright, without sound, at their presentation times.

    Frames that do not decode are left out. Raises VideoError when none does.
    """
    path = out.with_name(out.name + (".mp4" if encoding.mode == "h264" else ".mov"))
    container, stream = open_video(video)
    with container:
        frames = _increasing(_frames(container, stream, start_s, end_s))
        first = next(frames, None)
        if first is None or first.pts is None:
            raise VideoError(f"no frame decodes ({stream.codec_context.codec.canonical_name})")
        origin, picture = first.pts, _Picture(first, encoding)
        time_base = stream.time_base or Fraction(1, 25)
        with av.open(f"file:{path}", mode="w", options={"fflags": "+bitexact"}) as target:
            coder = _coder(target, encoding, picture.upright, time_base, stream.average_rate or Fraction(25))
            picture.tag(coder.codec_context)
            for frame in itertools.chain([first], frames):
                image = picture(frame)
                image.pts, image.time_base = (frame.pts or 0) - origin, time_base
                target.mux(coder.encode(image))
            target.mux(coder.encode(None))
    return path


def _coder(
    target: av.container.OutputContainer,
    encoding: Encoding,
    size: tuple[int, int],
    time_base: Fraction,
    rate: Fraction,
) -> av.VideoStream:
    h264 = encoding.mode == "h264"
    coder = target.add_stream("libx264" if h264 else "mjpeg", rate=rate, options=_H264_OPTIONS if h264 else {})
    assert isinstance(coder, av.VideoStream)
    context = coder.codec_context
    context.width, context.height = size
    context.pix_fmt = "yuv420p" if h264 else "yuvj420p"
    context.time_base = coder.time_base = time_base
    context.thread_count = 1
    context.flags |= Flags.bitexact
    if h264:
        context.flags |= Flags.closed_gop
        context.gop_size = encoding.gop
    else:
        context.qmin = context.qmax = _JPEG_QUANTIZER
    return coder


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, start_s: float | None, end_s: float | None
) -> Iterator[av.VideoFrame]:
    """Frames of the whole video or of a segment, in order of presentation."""
    if start_s is None and end_s is None:
        yield from _decoded(demux(container, stream), stream)
        return
    span = find_span(container, stream, start_s, end_s)
    packets = segment_packets(container, stream, span)
    stream.codec_context.flush_buffers()
    for frame in _decoded(packets, stream):
        if frame.pts in span:
            yield frame


def _decoded(packets: Iterable[av.Packet], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    for packet in itertools.chain(packets, [None]):
        try:
            yield from stream.codec_context.decode(packet)
        except av.FFmpegError:  # a damaged packet costs its own frames only
            continue


def _increasing(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Frames in the order of their times, each time once, as every reader of the video sees them.

    A decoder that meets damage, or a stream without its headers, gives them out of order.
    """
    held: list[tuple[int, int, av.VideoFrame]] = []
    last = None
    for number, frame in enumerate(itertools.chain(frames, itertools.repeat(None, _REORDERED_FRAMES))):
        if frame is not None and frame.pts is not None:
            heapq.heappush(held, (frame.pts, number, frame))
        if held and (frame is None or len(held) > _REORDERED_FRAMES):
            pts, _, earliest = heapq.heappop(held)
            if last is None or pts > last:
                last = pts
                yield earliest


class _Picture:
    """Turns a video's frames into the encoder's pictures: size, 8-bit 4:2:0, upright.

    upright: (width, height) of the pictures. The YUV matrix stays as it was for H.264, which can name it; JPEG
    means BT.601 and full range.
    """

    def __init__(self, first: av.VideoFrame, encoding: Encoding) -> None:
        self._jpeg = encoding.mode == "jpeg"
        self._turns = quarter_turns(first.rotation)
        self._size = _stored_size(first.width, first.height, encoding.short_side)
        self._colour = (first.colorspace, first.color_primaries, first.color_trc)
        self._reformatter = VideoReformatter()
        self.upright = self._size if self._turns % 2 == 0 else self._size[::-1]

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        image = self._reformatter.reformat(
            frame,
            width=self._size[0],
            height=self._size[1],
            format="yuvj420p" if self._jpeg else "yuv420p",
            dst_colorspace=Colorspace.ITU601 if self._jpeg else None,
            interpolation=Interpolation.BICUBIC,
            src_color_range=frame.color_range or None,
            dst_color_range=ColorRange.JPEG if self._jpeg else ColorRange.MPEG,
            threads=1,
        )
        if self._turns:
            planes = [np.rot90(plane, self._turns).ravel() for plane in _planes(image)]
            rows = self.upright[1] * 3 // 2
            pixels = np.concatenate(planes).reshape(rows, self.upright[0])
            image = av.VideoFrame.from_ndarray(pixels, format=image.format.name)
        image.pict_type = 0  # the encoder chooses
        return image

    def tag(self, context: av.VideoCodecContext) -> None:
        """Name the colours' meaning in the encoded stream."""
        if self._jpeg:
            context.color_range = ColorRange.JPEG
        else:
            context.color_range = ColorRange.MPEG
            context.colorspace, context.color_primaries, context.color_trc = self._colour


def _planes(image: av.VideoFrame) -> Iterator[np.ndarray]:
    for plane in image.planes:
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        yield rows[:, : plane.width]


def _stored_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side at most `short_side`, even, never larger than it was."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)
