"""Data sets of people in the layouts of MPIIGroupInteraction and UDIVA, small, with sound and speech."""

from __future__ import annotations

import wave
from pathlib import Path

from mdltool.data.formats.udiva import TRAITS
from tests.data.tiny_sound import RATE, make_video, tone

_SRT = "1\n00:00:00,000 --> 00:00:00,300\n{}\n"


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


def make_udiva(folder: Path) -> Path:
    """A session for training: two participants, a recording of 0.4 s, sound and a transcript of each."""
    here = folder / "talk_recordings_train" / "002003"
    here.mkdir(parents=True)
    (folder / "sessions_train.csv").write_text("ID,PART.1,PART.2\n002003,2,3\n")
    rows = [f"ID,{','.join(TRAITS)}", *(f"{person},{','.join(['0.5'] * 5)}" for person in (2, 3))]
    (folder / "parts_train.csv").write_text("\n".join(rows) + "\n")
    for camera in (1, 2):
        (here / f"FC{camera}_T.mp4").write_bytes(make_video(None, 0.4, container="mp4"))
        write_sound(here / f"FC{camera}_T.wav", 0.4, 300.0 * camera)
        (here / f"FC{camera}_T.srt").write_text(_SRT.format(("hola", "bon dia")[camera - 1]))
    return folder
