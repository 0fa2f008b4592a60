"""The sound of a clip: cut in seconds, mono, resampled, and stored as FLAC or Opus.

Encoders write no dates or versions, so that the same sound gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.codec.context import Flags
from av.container import InputContainer
from av.stream import Disposition

from mdltool.data.decode_pyav import packets_of, readable
from mdltool.data.modalities import Absent, Part, Sound
from mdltool.data.remux import find_span, open_video
from mdltool.errors import MdlError

_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
_STORES = {"flac": ("flac", "flac"), "opus": ("libopus", "ogg")}
_PREROLL_S = 1.0  # decoders of lossy codecs need what came before
_JITTER_S = 0.02  # time stamps that differ by less from where the samples go are rounded ones


@dataclass(frozen=True)
class SoundOptions:
    """rate: samples per second. store: flac (lossless) or opus."""

    rate: int = 24_000
    store: str = "flac"
    kind: ClassVar[str] = "audio"

    def check(self, where: str) -> None:
        """Raises MdlError for what cannot be stored."""
        if self.store not in _STORES:
            raise MdlError(f"sound is not stored as '{self.store}'", f"{where}.store", "one of: flac, opus")
        if not 4000 <= self.rate <= 192_000:
            raise MdlError(f"{self.rate} samples a second is no rate of sound", f"{where}.rate", "e.g. 24000")
        if self.store == "opus" and self.rate not in _OPUS_RATES:
            rates = ", ".join(map(str, _OPUS_RATES))
            raise MdlError(f"Opus does not store {self.rate} samples a second", f"{where}.rate", f"one of: {rates}")


def read_sound(part: Part, side: Path | None, options: SoundOptions) -> Sound:
    """The clip's sound, from its own track or from `side`, whose time 0 is that of the video.

    The time 0 of a file is its first frame, of one without a video its first sample. Ends early where the track
    does. Raises Absent where there is none that decodes in the clip.
    """
    if part.is_image and side is None:
        raise Absent("an image has no sound")
    with _opened(side or part.video) as container:
        # None is best where no rate is known, which is to be told.
        stream = container.streams.best("audio") or next(iter(container.streams.audio), None)
        if not isinstance(stream, av.AudioStream):
            raise Absent("the side file has no audio track" if side else "the video has no audio track")
        context = stream.codec_context
        if context is None:
            raise Absent("the audio's codec cannot be decoded here")
        if not context.sample_rate or not context.layout.nb_channels:
            raise Absent(f"the audio's rate cannot be read ({context.codec.canonical_name})")
        filmed = side is None or any(not _is_cover(video) for video in container.streams.video)
        origin_s = _first_frame_s(side or part.video) if filmed else _start_s(stream)
        samples_N = _Track(container, stream).read(origin_s + part.start_s, part.duration_s)
        return Sound(_resampled(samples_N, context.sample_rate, options.rate), options.rate)


def encode_sound(sound: Sound, store: str) -> bytes:
    """A FLAC or Opus file."""
    codec, container = _STORES[store]
    target = io.BytesIO()
    # FLAC files get 8 kB of empty room for tags otherwise.
    bare = {"fflags": "+bitexact", "metadata_header_padding": "0"}
    with av.open(target, "w", format=container, options=bare) as out:
        stream = out.add_stream(codec, rate=sound.rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.flags |= Flags.bitexact
        stream.codec_context.thread_count = 1
        frame = av.AudioFrame.from_ndarray(sound.samples_N[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = sound.rate, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return target.getvalue()


class _Track:
    """One audio track, decoded to the mean of its channels at its own rate."""

    def __init__(self, container: InputContainer, stream: av.AudioStream) -> None:
        self.container, self.stream = container, stream
        self.rate: int = stream.codec_context.sample_rate
        self.first_s: float | None = None
        self.end_s: float | None = None

    def read(self, start_s: float, duration_s: float) -> np.ndarray:
        """float32 [N] from `start_s` of the track's clock. Raises Absent where no sample decodes there."""
        samples_N = np.zeros(round(duration_s * self.rate), np.float32)
        self._seek(start_s)
        filled = self._fill(samples_N, start_s)
        if self.first_s is not None and self.first_s > start_s and start_s > _PREROLL_S:
            self.container.seek(0)  # a coarse index may lead too far
            filled = self._fill(samples_N, start_s)
        if not filled:
            if self.end_s is None:
                raise Absent(f"no sound decodes ({self.stream.codec_context.codec.canonical_name})")
            stop_s = start_s + duration_s
            if self.first_s is not None and self.first_s >= stop_s:
                raise Absent(f"the sound begins {self.first_s - stop_s:.2f} s after the clip ends")
            raise Absent(f"the sound ends {start_s - self.end_s:.2f} s before the clip starts")
        return samples_N[:filled]

    def _seek(self, start_s: float) -> None:
        if start_s > _PREROLL_S:
            try:
                self.container.seek(int((start_s - _PREROLL_S) / (self.stream.time_base or 1)), stream=self.stream)
            except av.FFmpegError:  # this container cannot be searched
                self.container.seek(0)

    def _fill(self, samples_N: np.ndarray, start_s: float) -> int:
        """Write what lies in the clip; returns the end of what was written, 0 for nothing."""
        floating = AudioResampler(format="fltp")
        at, filled = None, 0
        for frame in self._frames():
            if frame.sample_rate != self.rate:
                raise Absent(f"the sound changes its rate from {self.rate} to {frame.sample_rate}")
            begins_s = frame.time if frame.time is not None else (self.end_s or 0.0)
            place = round((begins_s - start_s) * self.rate)
            at = place if at is None or abs(place - at) > _JITTER_S * self.rate else at
            for block in (out.to_ndarray().mean(0) for out in floating.resample(frame)):
                low, high = max(at, 0), min(at + len(block), len(samples_N))
                if low < high:
                    samples_N[low:high] = block[low - at : high - at]
                    filled = max(filled, high)
                at += len(block)
            self.first_s = begins_s if self.first_s is None else min(self.first_s, begins_s)
            self.end_s = start_s + at / self.rate
            if at >= len(samples_N):
                break
        return filled

    def _frames(self) -> Iterator[av.AudioFrame]:
        for packet in packets_of(self.container, self.stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:  # a damaged packet costs its own samples only
                continue


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    try:
        container = av.open(readable(path), mode="r", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        # Without the path, which the shards' bytes must not depend on.
        why = getattr(error, "strerror", None) or error
        raise Absent(f"the sound's file cannot be opened ({why})") from None
    with container:
        yield container


def _start_s(stream: av.AudioStream) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _is_cover(stream: av.VideoStream) -> bool:
    """Whether this is a picture of the sound's file, not a video."""
    return bool(stream.disposition & Disposition.attached_pic)


def _first_frame_s(video: Path) -> float:
    """When the video's first frame is shown, by the file's clock."""
    container, stream = open_video(video)
    with container:
        return float(find_span(container, stream, None, None).first * (stream.time_base or 0))


def _resampled(samples_N: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """int16 at another rate."""
    frame = av.AudioFrame.from_ndarray(samples_N[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = rate, 0
    resampler = AudioResampler(format="s16", layout="mono", rate=wanted)
    blocks = [out.to_ndarray()[0] for out in (*resampler.resample(frame), *resampler.resample(None))]
    found = np.concatenate(blocks) if blocks else np.zeros(0, np.int16)
    length = max(1, round(len(samples_N) * wanted / rate))
    return np.pad(found, (0, max(0, length - len(found))))[:length]
