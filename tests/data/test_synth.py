"""Generated domains: exact reversal, partial overlap, real files, the same bytes however many workers."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from mdltool.data import synth
from mdltool.data.image import read_image
from mdltool.data.synth_looks import LOOKS
from mdltool.data.synth_paint import follow
from mdltool.errors import MdlError

DOMAINS = tuple(LOOKS)
PAIRED = [(d, c) for d in DOMAINS for c in synth.domain_classes(d) if c in synth.REVERSED]


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _decode(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


@pytest.mark.parametrize(("domain", "cls"), PAIRED)
def test_a_pair_is_an_exact_time_reversal(domain: str, cls: str) -> None:
    partner = synth.REVERSED[cls]
    assert synth.REVERSED[partner] == cls != partner
    assert partner in synth.domain_classes(domain)
    for seed in (0, 1):
        frames, mirrored = synth.render(domain, cls, seed), synth.render(domain, partner, seed)
        assert np.array_equal(frames[::-1], mirrored)
        # not a palindrome: direction is there to be seen
        assert np.abs(frames.astype(int) - mirrored).mean() > 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_half_of_the_classes_are_told_by_direction(domain: str) -> None:
    classes = synth.domain_classes(domain)
    assert len(classes) == len(set(classes)) == 8
    assert sum(cls in synth.REVERSED for cls in classes) == 4


def test_per_frame_statistics_are_equal_within_pairs_and_differ_between_classes() -> None:
    def feature(domain: str, cls: str) -> np.ndarray:
        # any function of single frames, averaged over the clip as a per-frame model does
        grey = synth.render(domain, cls, 3).mean(axis=3)
        return np.array(
            [np.tanh(grey / 99).mean(), grey.std(axis=(1, 2)).mean(), grey[:, ::7, ::5].max(axis=2).mean()]
        )

    for domain in DOMAINS:
        found = {cls: feature(domain, cls) for cls in synth.domain_classes(domain)}
        for one, other in itertools.combinations(found, 2):
            if synth.REVERSED.get(one) == other:
                assert found[one] == pytest.approx(found[other], rel=1e-12)
            else:
                assert found[one] != pytest.approx(found[other], rel=1e-6)


def test_class_sets_overlap_only_partly() -> None:
    shared = 0
    for one, other in itertools.combinations(DOMAINS, 2):
        common = set(synth.domain_classes(one)) & set(synth.domain_classes(other))
        assert len(common) < 8
        shared += bool(common)
    assert shared
    assert set(synth.DEFAULT_DOMAINS) <= set(DOMAINS)
    assert len(DOMAINS) >= 6
    looks = [(look.width, look.height, look.fps) for look in LOOKS.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("domain", DOMAINS)
def test_spinning_never_turns_far_between_sampled_frames(domain: str) -> None:
    """At most 3/4 turn a clip, so eight frames of 2.67 s are under 50 degrees apart; no figure is symmetric."""
    rng = np.random.default_rng(0)
    look = LOOKS[domain]
    for _ in range(20):
        tilt = follow(look, "spin", round(3 * look.fps), rng).tilt
        assert np.ptp(tilt) < 2 * np.pi * 0.78
        assert np.ptp(tilt) > 2 * np.pi * 0.5


def test_files_decode_to_what_was_rendered(tmp_path: Path) -> None:
    written = synth.write_domains(tmp_path / "v", ["chalk", "field"], 2, seed=5, workers=1)
    files = sorted((tmp_path / "v").rglob("*.mp4"))
    assert len(files) == written.clips == 2 * 8 * (2 + 1)
    assert written.classes["field"] == synth.domain_classes("field")
    for domain in ("chalk", "field"):
        look = LOOKS[domain]
        path = next(p for p in files if p.is_relative_to(tmp_path / "v" / domain / "train"))
        assert path.parent.name in synth.domain_classes(domain)
        frames, stream = _decode(path)
        assert frames.shape[1:] == (look.height, look.width, 3)
        assert stream.codec_context.name == "h264"
        assert float(stream.average_rate) == look.fps
        assert 2.5 < len(frames) / look.fps < 4


def test_reversal_survives_encoding(tmp_path: Path) -> None:
    synth.write_domains(tmp_path / "v", ["neon"], 1, seed=0, splits=["train"], workers=1)
    folder = tmp_path / "v" / "neon" / "train"
    rise, _ = _decode(folder / "rise" / "rise_0000.mp4")
    fall, _ = _decode(folder / "fall" / "fall_0000.mp4")
    assert np.abs(rise[::-1].astype(int) - fall).mean() < 2 < np.abs(rise.astype(int) - fall).mean()


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(tmp_path: Path) -> None:
    request = (["chalk", "dusk"], 1, 7)
    for name, workers in (("one", 1), ("two", 2), ("cut", 1)):
        synth.write_domains(tmp_path / name, *request, workers=workers)
    whole = _hashes(tmp_path / "one")
    assert _hashes(tmp_path / "two") == whole
    lost = tmp_path / "cut" / "dusk" / "val" / "grow" / "grow_0000.mp4"
    lost.unlink()
    synth.write_domains(tmp_path / "cut", *request, workers=1)
    assert _hashes(tmp_path / "cut") == whole


def test_seeds_and_splits_give_different_clips(tmp_path: Path) -> None:
    synth.write_domains(tmp_path / "a", ["chalk"], 1, seed=0, workers=1)
    synth.write_domains(tmp_path / "b", ["chalk"], 1, seed=1, workers=1)
    hashes = [*_hashes(tmp_path / "a").items(), *_hashes(tmp_path / "b").items()]
    clips = [digest for name, digest in hashes if name.endswith(".mp4")]
    assert len(set(clips)) == len(clips) == 32


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        ({"domains": ["chlak"]}, "no generated domain 'chlak'", "chalk"),
        ({"domains": ["chalk", "chalk"]}, "each domain once", "--domains"),
        ({"domains": []}, "at least one", "--domains"),
        ({"splits": ["../train"]}, "not a split's name", "letters"),
        ({"clips_per_class": 0}, "at least one clip", "--clips-per-class"),
    ],
)
def test_bad_requests_write_nothing(tmp_path: Path, arguments: dict[str, object], message: str, fix: str) -> None:
    request: dict[str, object] = {"domains": ["chalk"], "clips_per_class": 1, "seed": 0, **arguments}
    with pytest.raises(MdlError, match=message) as caught:
        synth.write_domains(tmp_path / "out", **request)  # type: ignore[arg-type]
    assert fix in str(caught.value.fix)
    assert not (tmp_path / "out").exists()


def test_unknown_class_names_the_nearest() -> None:
    with pytest.raises(MdlError) as caught:
        synth.render("chalk", "move_lefft", 0)
    assert "move_left" in str(caught.value.fix)


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MdlError, match="something else"):
        synth.write_domains(tmp_path, ["chalk"], 1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    synth.write_domains(tmp_path / "v", ["chalk"], 1, seed=0, splits=["train"], workers=1)
    with pytest.raises(MdlError, match="another request"):
        synth.write_domains(tmp_path / "v", ["chalk"], 1, seed=1, splits=["train"])


def test_images_are_of_the_classes_that_one_frame_shows(tmp_path: Path) -> None:
    written = synth.write_domains(tmp_path / "a", ["chalk", "field"], 2, 0, workers=1, images=True)
    assert written.classes == {domain: LOOKS[domain].appearance for domain in ("chalk", "field")}
    assert written.clips == 2 * 4 * 3
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert len(files) == len({file.read_bytes() for file in files}) == written.clips
    assert {min(read_image(file).shape[:2]) for file in files} == {72}
    synth.write_domains(tmp_path / "b", ["chalk", "field"], 2, 0, workers=2, images=True)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    with pytest.raises(MdlError, match="another request"):
        synth.write_domains(tmp_path / "a", ["chalk", "field"], 2, 0)
