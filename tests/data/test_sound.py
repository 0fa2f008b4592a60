"""The sound of clips: where it is cut, what it becomes, and why a clip has none."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from mdltool.data.modalities import Absent, Part, Sound
from mdltool.data.modalities.sound import SoundOptions, encode_sound, read_sound
from mdltool.errors import MdlError
from tests.data.tiny_shards import picture
from tests.data.tiny_sound import RATE, make_video, tone


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two seconds, the sound lossless at the default rate."""
    path = tmp_path / "v.mkv"
    path.write_bytes(make_video(tone(2.0)))
    return path


def part(video: Path, start_s: float = 0.0, duration_s: float = 2.0) -> Part:
    return Part(video, start_s, duration_s, video)


def with_cover(samples_N: np.ndarray) -> bytes:
    """A FLAC file with a picture."""
    target = io.BytesIO()
    with av.open(target, "w", format="flac") as out:
        sound, cover = out.add_stream("flac", rate=RATE, layout="mono"), out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        shown = av.VideoFrame.from_ndarray(picture(0, 64, 48), "rgb24").reformat(format="yuvj420p")
        heard = av.AudioFrame.from_ndarray(samples_N[None], "s16", layout="mono")
        heard.sample_rate, heard.pts = RATE, 0
        out.mux([*cover.encode(shown), *cover.encode(), *sound.encode(heard), *sound.encode()])
    return target.getvalue()


def decoded(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])


@pytest.mark.parametrize(("start_s", "duration_s"), [(0.0, 2.0), (0.4, 0.5), (1.52, 0.2)])
def test_the_clips_own_samples(video: Path, start_s: float, duration_s: float) -> None:
    sound = read_sound(part(video, start_s, duration_s), None, SoundOptions())
    first = round(start_s * RATE)
    assert np.array_equal(sound.samples_N, tone(2.0)[first : first + round(duration_s * RATE)])


def test_sound_that_begins_late_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    path.write_bytes(make_video(tone(1.0), late_s=0.5))
    samples = read_sound(part(path), None, SoundOptions()).samples_N
    assert not samples[: RATE // 2].any()
    assert np.array_equal(samples[RATE // 2 :], tone(1.0)), "and it ends where the track does"


def test_another_rate_and_two_channels(tmp_path: Path) -> None:
    path = tmp_path / "stereo.mkv"
    loud = tone(1.0, 48_000)
    path.write_bytes(make_video(np.stack([loud, loud // 2]), 1.0, rate=48_000))
    sound = read_sound(part(path, 0.0, 1.0), None, SoundOptions())
    wanted = 0.75 * tone(1.0).astype(float)
    assert len(sound.samples_N) == RATE
    assert np.abs(sound.samples_N - wanted)[200:-200].max() < 60, "the channels' mean, at half the rate"


def test_a_lossy_track_is_cut_where_it_would_be_heard(test_data: Path) -> None:
    path = test_data / "clips/kinetics400/abseiling/abseiling_k400.mp4"
    whole = read_sound(part(path, 0.0, 5.0), None, SoundOptions()).samples_N
    middle = read_sound(part(path, 3.0, 0.5), None, SoundOptions()).samples_N
    assert np.abs(whole[3 * RATE :][: RATE // 2].astype(int) - middle)[100:-100].max() <= 4


def test_stored_sound(video: Path) -> None:
    sound = read_sound(part(video), None, SoundOptions())
    flac, opus = (encode_sound(sound, store) for store in ("flac", "opus"))
    assert np.array_equal(decoded(flac), sound.samples_N)
    assert (flac, opus) == (encode_sound(sound, "flac"), encode_sound(sound, "opus"))
    assert max(len(opus), len(flac)) < sound.samples_N.nbytes / 3
    assert len(encode_sound(Sound(np.zeros(RATE, np.int16), RATE), "flac")) < 500


def test_a_side_file_takes_the_tracks_place(video: Path, tmp_path: Path) -> None:
    side = tmp_path / "mic.mkv"
    side.write_bytes(make_video(tone(2.0, hertz=880.0)))
    sound = read_sound(part(video, 0.4, 0.2), side, SoundOptions())
    assert np.array_equal(sound.samples_N, tone(2.0, hertz=880.0)[9600:14400])


@pytest.mark.parametrize("start_s", [0.0, 1.2])
def test_time_0_is_the_first_frame(start_s: float, video: Path, tmp_path: Path) -> None:
    """Of the video, and of a side file that is one; of a sound alone it is the first sample, cover or not."""
    late, alone = tmp_path / "late.mkv", tmp_path / "alone.flac"
    late.write_bytes(make_video(tone(2.0), frames_late_s=0.48))
    alone.write_bytes(with_cover(tone(2.0)))
    first = round(start_s * RATE)
    for path, side, wanted in ((late, None, 0.48), (late, late, 0.48), (video, late, 0.48), (late, alone, 0.0)):
        samples_N = read_sound(part(path, start_s, 0.2), side, SoundOptions()).samples_N
        assert np.array_equal(samples_N, tone(2.0)[round(wanted * RATE) + first :][: round(0.2 * RATE)])


def test_a_side_file_may_begin_with_silence(video: Path, tmp_path: Path) -> None:
    side = tmp_path / "side.mkv"
    side.write_bytes(make_video(tone(1.0), late_s=0.5))
    samples_N = read_sound(part(video), side, SoundOptions()).samples_N
    assert not samples_N[: RATE // 2].any()
    assert np.array_equal(samples_N[RATE // 2 :], tone(1.0))


def test_why_a_clip_has_none(video: Path, tmp_path: Path, test_data: Path) -> None:
    silent, short, late, text = (tmp_path / name for name in ("silent.mkv", "short.mkv", "late.mkv", "text.wav"))
    late.write_bytes(make_video(tone(0.5), late_s=1.5))
    silent.write_bytes(make_video(None))
    short.write_bytes(make_video(tone(0.5)))
    text.write_text("no sound")
    odd = bytearray(make_video(tone(0.5)))
    at = odd.index(b"A_PCM/INT/LIT")
    odd[at : at + 13] = b"A_UNKNOWNCODE"
    strange = tmp_path / "strange.mkv"
    strange.write_bytes(odd)
    for given, side, reason in (
        (part(silent), None, "the video has no audio track"),
        (part(short, 1.5, 0.5), None, "the sound ends 1.00 s before the clip starts"),
        (part(late, 0.5, 0.3), None, "the sound begins 0.70 s after the clip ends"),
        (replace(part(video), is_image=True), None, "an image has no sound"),
        (part(video), text, "the sound's file cannot be opened"),
        (part(strange), None, "the audio's codec cannot be decoded here"),
        (part(test_data / "awkward/corrupt/sample_qt.mp4"), None, "no sound decodes"),
    ):
        with pytest.raises(Absent, match=reason):
            read_sound(given, side, SoundOptions())


def test_a_track_without_a_readable_rate(tmp_path: Path) -> None:
    content = bytearray(make_video(tone(0.5), 0.5))
    at = content.index(b"\xb5\x88")  # Matroska's SamplingFrequency, a double
    content[at + 2 : at + 10] = bytes(8)
    path = tmp_path / "odd.mkv"
    path.write_bytes(content)
    with pytest.raises(Absent, match=r"the audio's rate cannot be read .pcm_s16le"):
        read_sound(part(path), None, SoundOptions())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (SoundOptions(store="mp3"), "not stored as 'mp3'"),
        (SoundOptions(rate=100), "100 samples a second is no rate"),
        (SoundOptions(rate=22_050, store="opus"), "Opus does not store 22050"),
    ],
)
def test_options_that_mean_nothing(options: SoundOptions, what: str) -> None:
    with pytest.raises(MdlError, match=what):
        options.check("--set audio")
