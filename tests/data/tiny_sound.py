"""Small videos with sound, and transcripts, written by hand."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

from tests.data.tiny_shards import picture

RATE = 24_000


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """int16 [N]: a tone that grows louder, so that no two moments are alike."""
    at = np.arange(round(seconds * rate)) / rate
    return (12_000 * (0.1 + at / max(seconds, 1e-9)) * np.sin(2 * np.pi * hertz * at)).round().astype(np.int16)


def make_video(
    samples: np.ndarray | None,
    seconds: float = 2.0,
    *,
    rate: int = RATE,
    codec: str = "pcm_s16le",
    container: str = "matroska",
    late_s: float = 0.0,
    frames_late_s: float = 0.0,
    size: tuple[int, int] = (64, 48),
) -> bytes:
    """A video of 25 numbered frames a second with this sound, int16 [N] or [2, N].

    late_s, frames_late_s: when the sound and the frames begin, by the file's clock.
    """
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        video = out.add_stream("mjpeg", rate=25)
        video.width, video.height = size
        video.pix_fmt = "yuvj420p"
        layout = "mono" if samples is None or samples.ndim == 1 else "stereo"
        sound = None if samples is None else out.add_stream(codec, rate=rate, layout=layout)
        for number in range(round(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), "rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number + round(25 * frames_late_s), Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode())
        if sound is not None and samples is not None:
            interleaved = np.ascontiguousarray(np.atleast_2d(samples).T.reshape(1, -1))
            block = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
            block.sample_rate, block.pts, block.time_base = rate, round(late_s * rate), Fraction(1, rate)
            resampler = av.AudioResampler(format=sound.codec_context.format, layout=layout, rate=rate)
            for part in (*resampler.resample(block), *resampler.resample(None)):
                out.mux(sound.encode(part))
            out.mux(sound.encode())
    return target.getvalue()
