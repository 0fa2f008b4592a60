"""A data set of people in the layout of MPIIGroupInteraction, small, with sound."""

from __future__ import annotations

import wave
from pathlib import Path

from tests.data.tiny_sound import RATE, make_video, tone


def write_sound(path: Path, seconds: float, hertz: float) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(tone(seconds, hertz=hertz).astype("<i2").tobytes())


def make_mpiigi(folder: Path) -> Path:
    """Two snippets of 0.4 s for training, four microphones beside each, two behaviours."""
    clips = folder / "clips_train"
    clips.mkdir(parents=True)
    for number in (1, 2):
        (clips / f"{number:05d}-video.mp4").write_bytes(make_video(None, 0.4, container="mp4"))
        for microphone in range(4):
            write_sound(clips / f"{number:05d}-audio{microphone}.wav", 0.4, 200.0 * (number + microphone))
    (folder / "bodily_train.csv").write_text("clip,Settle,Groom\n1,1,0\n2,0,1\n")
    return folder
