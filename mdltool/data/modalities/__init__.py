"""Raw streams of a clip beside its frames: sound, optical flow, speech as text (spec cm3t 5.2, 5.3).

Axes: N samples, P pairs of frames, S stacks of K pairs, H W pixels.
No torch at import time: workers that only check videos read this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


class Absent(Exception):
    """The clip lacks the modality. reason: a short true sentence for the clip's metadata."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Part:
    """The part of a video that a clip is.

    start_s, duration_s: in seconds from the first frame of `video`. shown, trim: a file that holds the frames, and
    the [start, stop) of it that they are, in seconds from its first frame; None: all of it.
    """

    video: Path
    start_s: float
    duration_s: float
    shown: Path
    trim: tuple[float, float] | None = None
    is_image: bool = False
    is_segment: bool = False

    @property
    def stop_s(self) -> float:
        return self.start_s + self.duration_s


@dataclass(frozen=True)
class Sound:
    """Mono sound from the clip's start on. samples_N: int16. rate: per second."""

    samples_N: np.ndarray
    rate: int

    @property
    def duration_s(self) -> float:
        return len(self.samples_N) / self.rate


@dataclass(frozen=True)
class Flow:
    """Optical flow of some pairs of frames.

    pixels_P2HW: uint8, u and v; 128 is 0, and 1 and 255 are the largest motions that 8 bits hold. times_P2:
    float64, when the two frames are shown, in seconds from the clip's start. rows_SK: int64, each stack's pairs, by
    row.
    """

    pixels_P2HW: np.ndarray
    times_P2: np.ndarray
    rows_SK: np.ndarray


@dataclass(frozen=True)
class Utterance:
    """What is said from start_s to end_s. speaker: empty where the transcript names none."""

    start_s: float
    end_s: float
    text: str
    speaker: str = ""


Raw = Sound | Flow | list[Utterance]
