"""The generated domain `sound`: classes that are told by eye, by ear, by both, or by what is said.

A class is a figure to see, a sound to hear and a group of key words to read (CLASSES). Where the table has None,
that part is drawn and tells nothing. Clips of the same number and figure are equal in all but what the table tells
apart: the same pictures; of sounds the same pitch, loudness, tempo and noise; the same utterances but for the key
words. So what sees the pictures, and any of the rest, passes its `ceiling` on no set of whole numbers; without
the pictures the ceiling is that of the average:

    by      classes                                      rgb    rgb+audio   rgb+audio+text
    eye     disc, star                                   2 / 2  2 / 2       2 / 2
    ear     bars_rise, bars_fall, bars_hiss              1 / 3  3 / 3       3 / 3
    both    ring_slow, ring_fast, heart_slow, heart_fast 2 / 4  4 / 4       4 / 4
    words   cross_cook, cross_clean, cross_pack          1 / 3  1 / 3       3 / 3
    all                                                  50%    83.3%       100%

Sounds repeat within a fraction of a second, so that any second of a clip tells them: tones that rise or fall in
pitch, bursts of noise in the same rhythm, and beeps that come slowly or fast.
Shapes: T frames, N samples.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdltool.data.synth_looks import Look
from mdltool.data.synth_paint import Frames, play
from mdltool.errors import MdlError

DOMAIN = "sound"
RATE = 16000  # samples per second
KINDS = ("rgb", "audio", "text")
LOOK = Look(
    width=112,
    height=84,
    fps=10,
    appearance=("disc", "star", "bars", "ring", "heart", "cross"),
    motions=(),
    background="smudges",
    ground=((46, 52, 64), (86, 92, 104)),
    paints=((244, 236, 220), (250, 200, 120), (150, 220, 200)),
    grain=2,
)


@dataclass(frozen=True)
class SoundClass:
    """What the clips of a class share. figure: of LOOK; sound: of SOUNDS; words: of WORDS; None: drawn, any."""

    figure: str
    sound: str | None = None
    words: str | None = None


CLASSES: dict[str, SoundClass] = {
    "disc": SoundClass("disc"),
    "star": SoundClass("star"),
    "bars_rise": SoundClass("bars", sound="rise"),
    "bars_fall": SoundClass("bars", sound="fall"),
    "bars_hiss": SoundClass("bars", sound="hiss"),
    "ring_slow": SoundClass("ring", sound="slow"),
    "ring_fast": SoundClass("ring", sound="fast"),
    "heart_slow": SoundClass("heart", sound="slow"),
    "heart_fast": SoundClass("heart", sound="fast"),
    "cross_cook": SoundClass("cross", words="cook"),
    "cross_clean": SoundClass("cross", words="clean"),
    "cross_pack": SoundClass("cross", words="pack"),
}


@dataclass(frozen=True)
class _Voice:
    """A repeated event. period_s: from one to the next; length_s: of one; octaves: its glide; noisy: no tone."""

    period_s: float
    length_s: float
    octaves: float = 0.0
    noisy: bool = False


SOUNDS: dict[str, _Voice] = {
    "rise": _Voice(0.45, 0.36, octaves=1.5),
    "fall": _Voice(0.45, 0.36, octaves=-1.5),
    "hiss": _Voice(0.45, 0.36, noisy=True),
    "slow": _Voice(0.5, 0.08),
    "fast": _Voice(0.16, 0.08),
}
WORDS: dict[str, tuple[str, ...]] = {
    "cook": ("stir", "fry", "boil"),
    "clean": ("wipe", "rinse", "scrub"),
    "pack": ("fold", "wrap", "stack"),
}
_FILLERS = (
    "so",
    "now",
    "then",
    "well",
    "okay",
    "right",
    "here",
    "we",
    "have",
    "a",
    "bit",
    "more",
    "of",
    "this",
    "that",
    "again",
)


@dataclass(frozen=True)
class Utterance:
    """Words said within a clip, between two times in seconds from its start."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class SoundClip:
    """frames: uint8 RGB [T, H, W, 3] at LOOK.fps; samples: int16 [N] at RATE, as long; utterances: in order."""

    frames: Frames
    samples: NDArray[np.int16]
    utterances: tuple[Utterance, ...]


def ceiling(kinds: Collection[str]) -> float:
    """The best accuracy (0..1) on equal numbers of clips of each class for what sees only these of KINDS.

    The best guess at what is seen is the class that shows it most often. Raises MdlError for an unknown kind.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise MdlError(f"there is no kind '{unknown[0]}' of what a clip holds", None, f"of {', '.join(KINDS)}")
    best: dict[tuple[str, ...], float] = {}
    for cls in CLASSES.values():
        parts = {
            "rgb": (cls.figure,),
            "audio": (cls.sound,) if cls.sound else tuple(SOUNDS),
            "text": (cls.words,) if cls.words else tuple(WORDS),
        }
        seen = list(itertools.product(*(parts[kind] for kind in KINDS if kind in kinds)))
        for one in seen:
            best[one] = max(best.get(one, 0.0), 1 / len(seen))
    return sum(best.values()) / len(CLASSES)


def render_clip(name: str, instance_seed: int) -> SoundClip:
    """One clip of a class (a key of CLASSES) before encoding, 2.7 to 3.3 s long."""
    cls = CLASSES[name]
    frames = play(LOOK, DOMAIN, cls.figure, instance_seed)
    duration_s = len(frames) / LOOK.fps
    samples = record(cls.sound, duration_s, _generator(cls.figure, "sound", instance_seed))
    return SoundClip(
        frames, samples, _narrate(cls.words, duration_s, _generator(cls.figure, "words", instance_seed))
    )


def srt(utterances: Collection[Utterance]) -> str:
    """The utterances as the text of a SubRip file."""
    blocks = (
        f"{number}\n{_clock(said.start_s)} --> {_clock(said.end_s)}\n{said.text}\n"
        for number, said in enumerate(utterances, 1)
    )
    return "\n".join(blocks)


def _clock(time_s: float) -> str:
    seconds, milliseconds = divmod(round(time_s * 1000), 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{milliseconds:03d}"


def _generator(figure: str, part: str, instance_seed: int) -> np.random.Generator:
    # of the figure, not of the class: what is drawn is the same for all classes that look alike
    return np.random.default_rng([zlib.crc32(f"{DOMAIN}/{figure}/{part}".encode()), instance_seed])


def record(sound: str | None, duration_s: float, rng: np.random.Generator) -> NDArray[np.int16]:
    """A sound of SOUNDS, or any: int16 [N]. Pitch, loudness, overtones, tempo, onset and noise are drawn."""
    drawn = list(SOUNDS)[rng.integers(len(SOUNDS))]
    voice = SOUNDS[sound or drawn]
    pitch_hz, loudness = 330 * 2 ** rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.4)
    overtone, hush = rng.uniform(0.2, 0.6), rng.uniform(0.001, 0.004)
    tempo, onset_s = rng.uniform(0.87, 1.15), rng.uniform(0, 0.3)
    hiss, background = rng.standard_normal((2, round(duration_s * RATE)))
    time_s = np.arange(len(hiss)) / RATE - onset_s
    progress = np.mod(time_s, voice.period_s * tempo) / voice.length_s
    sounding = (time_s >= 0) & (progress < 1)
    swell = np.where(sounding, np.sin(np.pi * progress), 0) ** 0.5
    frequency = pitch_hz * 2 ** (voice.octaves * (progress - 0.5))
    phase = 2 * np.pi * np.cumsum(np.where(sounding, frequency, 0)) / RATE
    event = 0.3 * hiss if voice.noisy else (np.sin(phase) + overtone * np.sin(2 * phase)) / (1 + overtone)
    wave = loudness * swell * event + hush * background
    return np.rint(np.clip(wave, -1, 1) * 32767).astype(np.int16)


def _narrate(words: str | None, duration_s: float, rng: np.random.Generator) -> tuple[Utterance, ...]:
    """Three to five utterances one after the other; one or two have a key word of `words`, or of any group."""
    drawn = list(WORDS)[rng.integers(len(WORDS))]
    keys = WORDS[words or drawn]
    count = int(rng.integers(3, 6))
    telling = rng.permutation(count)[: rng.integers(1, 3)]
    slot_s = duration_s / count
    said = []
    for number in range(count):
        text = [str(word) for word in rng.choice(_FILLERS, rng.integers(2, 5))]
        place, key = rng.integers(1, len(text) + 1), rng.integers(len(keys))
        if number in telling:
            text.insert(int(place), keys[key])
        start_s, pause_s = slot_s * (number + rng.uniform(0.02, 0.2)), slot_s * rng.uniform(0.02, 0.2)
        said.append(Utterance(round(start_s, 3), round(slot_s * (number + 1) - pause_s, 3), " ".join(text)))
    return tuple(said)
