"""The domain `sound`: what tells each class and what does not, real files with a track and a transcript."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest

from mdltool.data import synth
from mdltool.data import synth_sound as sound
from mdltool.errors import MdlError
from tests.conftest import run_mdltool

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def clips() -> dict[tuple[str, int], sound.SoundClip]:
    """Every class's clips of a few numbers, before encoding."""
    return {(name, seed): sound.render_clip(name, seed) for name in sound.CLASSES for seed in SEEDS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "videos"
    made = synth.write_domains(out, [sound.DOMAIN], 2, seed=0, workers=1)
    assert made.classes == {"sound": tuple(sound.CLASSES)}
    assert made.clips == len(list(out.rglob("*.mp4"))) == len(list(out.rglob("*.srt"))) == 12 * 3
    return out


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _heard(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        assert (track.codec_context.name, track.rate, track.channels) == ("flac", sound.RATE, 1)
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(track)])


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((), 1 / 12),
        (("rgb",), 6 / 12),
        (("rgb", "text"), 8 / 12),
        (("rgb", "audio"), 10 / 12),
        (("text", "audio", "rgb"), 1),
        # each sound's likeliest class: of rise, fall and hiss certain, slow and fast of two classes each
        (("audio",), 5 / 12),
        (("text",), 3 / 12),
    ],
)
def test_ceilings_follow_from_the_table(kinds: tuple[str, ...], expected: float) -> None:
    assert sound.ceiling(kinds) == pytest.approx(expected)


def test_an_unknown_kind_has_no_ceiling() -> None:
    with pytest.raises(MdlError, match="no kind 'flow'"):
        sound.ceiling(["rgb", "flow"])


@pytest.mark.parametrize("kinds", [("rgb",), ("rgb", "audio"), ("rgb", "text"), sound.KINDS])
def test_clips_of_a_number_are_equal_but_for_what_the_table_tells_apart(
    clips: dict[tuple[str, int], sound.SoundClip], kinds: tuple[str, ...]
) -> None:
    """Of each set of equal clips one guess can be right: as many as there are different ones."""
    for seed in SEEDS:
        seen = set()
        for name in sound.CLASSES:
            clip = clips[name, seed]
            parts = {
                "rgb": clip.frames.tobytes(),
                "audio": clip.samples.tobytes(),
                "text": clip.utterances,
            }
            seen.add(tuple(parts[kind] for kind in kinds))
        assert len(seen) / len(sound.CLASSES) == pytest.approx(sound.ceiling(kinds))


def test_no_two_numbers_are_alike(clips: dict[tuple[str, int], sound.SoundClip]) -> None:
    for name in sound.CLASSES:
        of_class = [clips[name, seed] for seed in SEEDS]
        assert len({clip.samples.tobytes() for clip in of_class}) == len(SEEDS)
        assert len({clip.frames.tobytes() for clip in of_class}) == len(SEEDS)
        assert len({clip.utterances for clip in of_class}) == len(SEEDS)


def _spectra(samples: np.ndarray) -> np.ndarray:
    """Magnitudes of windows of 32 ms every 8 ms, [T, 257]."""
    windows = np.lib.stride_tricks.sliding_window_view(samples / 32768, 512)[::128]
    return np.abs(np.fft.rfft(windows * np.hanning(512)))


def test_sounds_differ_in_contour_timbre_and_rhythm(clips: dict[tuple[str, int], sound.SoundClip]) -> None:
    def loud(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        spectra = _spectra(clips[name, seed].samples)
        energy = (spectra**2).sum(axis=1)
        return spectra, energy > 0.1 * energy.max()

    for seed in SEEDS:
        for name, sign in (("bars_rise", 1), ("bars_fall", -1)):
            spectra, on = loud(name, seed)
            steps = np.diff(spectra.argmax(axis=1))[on[1:] & on[:-1]]
            assert sign * np.sign(steps).sum() > 0.2 * len(steps)
        for name, flat in (("bars_hiss", True), ("bars_rise", False), ("ring_slow", False)):
            spectra, on = loud(name, seed)
            flatness = np.exp(np.log(spectra[on]).mean(axis=1)) / spectra[on].mean(axis=1)
            assert (flatness.mean() > 0.6) == flat
        for figure in ("ring", "heart"):
            slow, fast = (np.diff(loud(f"{figure}_{pace}", seed)[1].astype(int)) for pace in ("slow", "fast"))
            assert 2 * (slow == 1).sum() < (fast == 1).sum()


def test_transcripts_hold_key_words_among_others(clips: dict[tuple[str, int], sound.SoundClip]) -> None:
    keys = {word for group in sound.WORDS.values() for word in group}
    for (name, _), clip in clips.items():
        duration_s = len(clip.frames) / sound.LOOK.fps
        assert len(clip.samples) == round(duration_s * sound.RATE)
        times = [time for said in clip.utterances for time in (said.start_s, said.end_s)]
        assert times == sorted(set(times))
        assert times[0] > 0
        assert times[-1] < duration_s
        found = [set(said.text.split()) & keys for said in clip.utterances]
        assert 1 <= sum(map(bool, found)) <= 2 < len(found)
        words = sound.CLASSES[name].words
        if words:
            assert set.union(*found) <= set(sound.WORDS[words])


def test_files_hold_what_was_rendered(written: Path) -> None:
    folder = written / "sound" / "val" / "ring_fast"
    video = folder / "ring_fast_0000.mp4"
    seed = synth._drawn(0, "val", 0)
    clip = sound.render_clip("ring_fast", seed)
    assert np.array_equal(synth.render("sound", "ring_fast", seed), clip.frames)
    assert np.array_equal(_heard(video), clip.samples)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.codec_context.name == "h264"
        assert float(stream.average_rate) == sound.LOOK.fps
    assert frames.shape == clip.frames.shape
    assert np.abs(frames.astype(int) - clip.frames).mean() < 6
    blocks = video.with_suffix(".srt").read_text().strip().split("\n\n")
    assert [block.split("\n")[2] for block in blocks] == [said.text for said in clip.utterances]
    first = clip.utterances[0]
    assert blocks[0].split("\n")[:2] == [
        "1",
        f"00:00:00,{round(first.start_s * 1000):03d} --> {_srt_time(first.end_s)}",
    ]


def _srt_time(time_s: float) -> str:
    return f"00:00:{time_s:06.3f}".replace(".", ",")


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(written: Path, tmp_path: Path) -> None:
    synth.write_domains(tmp_path / "two", [sound.DOMAIN], 2, seed=0, workers=2)
    assert _hashes(tmp_path / "two") == _hashes(written)
    for lost in ("disc_0000.mp4", "disc_0001.srt"):
        (tmp_path / "two" / "sound" / "train" / "disc" / lost).unlink()
    synth.write_domains(tmp_path / "two", [sound.DOMAIN], 2, seed=0, workers=1)
    assert _hashes(tmp_path / "two") == _hashes(written)


def test_a_share_of_clips_lacks_sound_or_transcript(written: Path, tmp_path: Path) -> None:
    ran = run_mdltool(
        "synth", "--out", tmp_path / "v", "--domains", "sound", "--clips-per-class", 2, "--missing", 0.5
    )
    assert ran.code == 0, ran.err
    whole, part = _hashes(written), _hashes(tmp_path / "v")
    videos = [name for name in part if name.endswith(".mp4")]
    assert len(videos) == 36
    silent = {name for name in videos if part[name] != whole[name]}
    mute = {name for name in videos if name.replace(".mp4", ".srt") not in part}
    for name in silent:
        with av.open(str(tmp_path / "v" / name)) as container:
            assert [stream.type for stream in container.streams] == ["video"]
    for lacking in (silent, mute):
        assert 9 <= len(lacking) <= 27  # 18 of 36 expected, within three standard deviations
    assert silent != mute
    assert {part[name] for name in part if name.endswith(".srt")} <= set(whole.values())
    with pytest.raises(MdlError, match="another request"):
        synth.write_domains(tmp_path / "v", [sound.DOMAIN], 2, seed=0)


@pytest.mark.parametrize(
    ("domains", "options", "message", "fix"),
    [
        (["sound"], {"images": True}, "images have no sound", "--domains"),
        (["chalk"], {"missing": 0.1}, "only the domain 'sound'", "drop"),
        (["sound"], {"missing": 1.5}, "from 0 to 1", "0.1"),
        (["sond"], {}, "no generated domain 'sond'", "sound"),
    ],
)
def test_bad_requests_write_nothing(
    tmp_path: Path, domains: list[str], options: dict[str, float], message: str, fix: str
) -> None:
    with pytest.raises(MdlError, match=message) as caught:
        synth.write_domains(tmp_path / "out", domains, 1, 0, **options)  # type: ignore[arg-type]
    assert fix in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
