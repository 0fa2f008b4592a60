"""Generated domains: real H.264 files of moving figures, or images of them, for the demo and for tests.

Half of a domain's classes are told by what the figure is, and it wobbles without direction. The other half come
in pairs that are exact time reversals of each other: clip i of one is clip i of the other played backwards, so a
model that ignores time cannot tell them apart. The domain `sound` is of another kind: see synth_sound.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from mdltool import console
from mdltool.data import synth_sound
from mdltool.data.encode import REPRODUCIBLE_H264
from mdltool.data.image import shrunk, write_image
from mdltool.data.synth_looks import LOOKS
from mdltool.data.synth_paint import Frames, play
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.registry import did_you_mean

DOMAINS = (*LOOKS, synth_sound.DOMAIN)
DEFAULT_DOMAINS = ("chalk", "neon", "field")
GOP_FRAMES = 16

# A motion and the classes that are it played forwards and backwards.
_PAIRS = {
    "move": ("move_right", "move_left"),
    "rise": ("rise", "fall"),
    "open": ("open", "close"),
    "spin": ("spin_cw", "spin_ccw"),
    "grow": ("grow", "shrink"),
}
REVERSED: dict[str, str] = {
    name: partner for pair in _PAIRS.values() for name, partner in (pair, (pair[1], pair[0]))
}
_MOTIONS = {name: motion for motion, pair in _PAIRS.items() for name in pair}
_REQUEST = "synth.json"
_IMAGE_SIDE = 72  # the shorter one, as the Visual Decathlon has it


@dataclass(frozen=True)
class Written:
    """What `write_domains` made. classes: domain -> its classes; clips: files in all domains and splits."""

    out: Path
    classes: dict[str, tuple[str, ...]]
    clips: int


def domain_classes(domain: str) -> tuple[str, ...]:
    """The classes of a domain: four of appearance, then two reversed pairs; of `sound` those of its table.

    Raises MdlError for an unknown domain.
    """
    _check_domain(domain)
    if domain == synth_sound.DOMAIN:
        return tuple(synth_sound.CLASSES)
    look = LOOKS[domain]
    return look.appearance + tuple(name for motion in look.motions for name in _PAIRS[motion])


def render(domain: str, cls: str, instance_seed: int) -> Frames:
    """One clip's pictures before encoding: uint8 RGB [T, H, W, 3], at the domain's rate and size, 2.7 to 3.3 s.

    The clip of a class in REVERSED is, frame for frame, that of its partner and the same seed played backwards.
    Raises MdlError for an unknown domain or class.
    """
    if cls not in domain_classes(domain):
        raise MdlError(f"domain '{domain}' has no class '{cls}'", None, did_you_mean(cls, domain_classes(domain)))
    if domain == synth_sound.DOMAIN:
        return synth_sound.render_clip(cls, instance_seed).frames
    course = _MOTIONS.get(cls, cls)
    frames = play(LOOKS[domain], domain, course, instance_seed)
    return frames if cls == _played(course)[0] else frames[::-1]


def write_domains(
    out: Path,
    domains: Sequence[str],
    clips_per_class: int,
    seed: int,
    splits: Sequence[str] = ("train", "val"),
    workers: int | None = None,
    images: bool = False,
    missing: float = 0.0,
) -> Written:
    """Write `out/<domain>/<split>/<class>/<class>_<number>.mp4`, H.264, a keyframe every 16 frames.

    Videos of the domain `sound` have a FLAC track, and a transcript `<class>_<number>.srt` beside them.
    images: PNG files of one frame in their place, of the classes of appearance alone, with a shorter side of 72.
    missing: the chance (0..1) of a clip of `sound` to have no sound, and that to have no transcript.
    The split `train` gets clips_per_class clips of every class, any other half as many (at least one); instances
    of different splits differ. The same arguments give the same bytes whatever the number of workers (default:
    one per core), and finished files of an interrupted call are kept.
    Raises MdlError for unknown or repeated names, for a count below 1, for images or a missing share that the
    domains cannot have, and where `out` holds something else.
    """
    _check(domains, clips_per_class, splits)
    _check_options(domains, images, missing)
    request = {"domains": list(domains), "clips_per_class": clips_per_class, "seed": seed, "splits": list(splits)}
    _claim(out, request | ({"images": True} if images else {}) | ({"missing": missing} if missing else {}))
    jobs: list[_Job | _SoundJob] = []
    for domain in domains:
        if domain == synth_sound.DOMAIN:
            jobs.extend(_sound_jobs(out, clips_per_class, seed, splits, missing))
        else:
            jobs.extend(_jobs(out, domain, clips_per_class, seed, splits, images))
    unfinished = [job for job in jobs if not all(path.is_file() for path in job.paths)]
    total = sum(job.clips for job in unfinished)
    with console.progress("synth", total) as advance, _mapped(unfinished, workers) as finished:
        for written in finished:
            advance(written)
    clips = sum(job.clips for job in jobs)
    classes = {domain: LOOKS[domain].appearance if images else domain_classes(domain) for domain in domains}
    return Written(out, classes, clips)


def _check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise MdlError(f"there is no generated domain '{domain}'", "--domains", did_you_mean(domain, DOMAINS))


def _check(domains: Sequence[str], clips_per_class: int, splits: Sequence[str]) -> None:
    for domain in domains:
        _check_domain(domain)
    for names, noun in ((domains, "domain"), (splits, "split")):
        if not names or len(set(names)) != len(names):
            raise MdlError(f"give each {noun} once, and at least one", f"--{noun}s", f"--{noun}s a,b")
    for split in splits:
        if not split.replace("_", "").replace("-", "").isalnum():
            raise MdlError(f"'{split}' is not a split's name", "--splits", "use letters, digits, - and _")
    if clips_per_class < 1:
        raise MdlError("a class needs at least one clip", "--clips-per-class", "--clips-per-class 24")


def _check_options(domains: Sequence[str], images: bool, missing: float) -> None:
    sounds = synth_sound.DOMAIN in domains
    if images and sounds:
        raise MdlError("images have no sound", "--images", f"leave '{synth_sound.DOMAIN}' out of --domains")
    if not 0 <= missing <= 1:
        raise MdlError(f"a share of clips is from 0 to 1, not {missing}", "--missing", "--missing 0.1")
    if missing and not sounds:
        raise MdlError(
            f"only the domain '{synth_sound.DOMAIN}' has sound and transcripts to leave out", "--missing", "drop it"
        )


def _claim(out: Path, request: dict[str, object]) -> None:
    """Record the request in `out`; refuse a directory that holds anything else."""
    record = out / _REQUEST
    text = json.dumps(request, indent=1)
    if record.is_file():
        if record.read_text() != text:
            raise MdlError("clips of another request are here", out, "give another --out, or remove it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MdlError("this path holds something else", out, "give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_text(record, text)


@dataclass(frozen=True)
class _Job:
    """One course to play, and the files of the classes that it gives."""

    domain: str
    course: str
    instance_seed: int
    paths: tuple[Path, ...]

    @property
    def clips(self) -> int:
        return len(self.paths)

    def write(self) -> None:
        """Write the files, each whole or not at all."""
        look = LOOKS[self.domain]
        if self.paths[0].suffix == ".png":
            (path,) = self.paths
            with _whole(path, path.with_name(f".{path.name}")) as partial:
                picture = play(look, self.domain, self.course, self.instance_seed, 1)[0]
                write_image(shrunk(picture, _IMAGE_SIDE), partial)
            return
        frames = play(look, self.domain, self.course, self.instance_seed)
        for path, clip in zip(self.paths, (frames, frames[::-1]), strict=False):
            with _whole(path, path.with_suffix(".part")) as partial:
                write_clip(partial, clip, look.fps)


@dataclass(frozen=True)
class _SoundJob:
    """A clip of the domain `sound`. transcript: None leaves it out; audible: False leaves the sound out."""

    cls: str
    instance_seed: int
    video: Path
    transcript: Path | None
    audible: bool
    clips: int = 1

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.video,) if self.transcript is None else (self.video, self.transcript)

    def write(self) -> None:
        """Write the files, each whole or not at all."""
        clip = synth_sound.render_clip(self.cls, self.instance_seed)
        if self.transcript is not None:
            write_text(self.transcript, synth_sound.srt(clip.utterances))
        with _whole(self.video, self.video.with_suffix(".part")) as partial:
            write_clip(partial, clip.frames, synth_sound.LOOK.fps, clip.samples if self.audible else None)


@contextmanager
def _whole(path: Path, partial: Path) -> Iterator[Path]:
    yield partial
    os.replace(partial, path)


def _jobs(
    out: Path, domain: str, clips_per_class: int, seed: int, splits: Sequence[str], images: bool
) -> Iterator[_Job]:
    look = LOOKS[domain]
    courses, suffix = (look.appearance, "png") if images else (look.appearance + look.motions, "mp4")
    for split in splits:
        for course in courses:
            folders = [out / domain / split / cls for cls in _played(course)]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for number in range(_count(clips_per_class, split)):
                paths = tuple(folder / f"{folder.name}_{number:04d}.{suffix}" for folder in folders)
                yield _Job(domain, course, _drawn(seed, split, number), paths)


def _sound_jobs(
    out: Path, clips_per_class: int, seed: int, splits: Sequence[str], missing: float
) -> Iterator[_SoundJob]:
    for split, cls in itertools.product(splits, synth_sound.CLASSES):
        folder = out / synth_sound.DOMAIN / split / cls
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(_count(clips_per_class, split)):
            deaf, mute = (
                _drawn(seed, split, number, cls, part) < missing * 2**48 for part in ("sound", "transcript")
            )
            video = folder / f"{cls}_{number:04d}.mp4"
            transcript = None if mute else video.with_suffix(".srt")
            yield _SoundJob(cls, _drawn(seed, split, number), video, transcript, not deaf)


def _count(clips_per_class: int, split: str) -> int:
    return clips_per_class if split == "train" else max(1, clips_per_class // 2)


def _drawn(*what: object) -> int:
    """A number below 2**48 that is drawn by what it is for."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, what)).encode()).digest()[:6], "big")


@contextmanager
def _mapped(jobs: Sequence[_Job | _SoundJob], workers: int | None) -> Iterator[Iterable[int]]:
    count = min(workers or len(os.sched_getaffinity(0)), max(1, len(jobs) // 8))
    if count <= 1:
        yield map(_write, jobs)
        return
    # spawned: a fork of a process with running threads (torch, libav) can hang
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map(_write, jobs, chunksize=4)


def _write(job: _Job | _SoundJob) -> int:
    """Write the files of one job; returns the number of its clips."""
    job.write()
    return job.clips


def write_clip(path: Path, frames: Frames, fps: int, samples: NDArray[np.int16] | None = None) -> None:
    """Write frames (uint8 RGB [T, H, W, 3]) as H.264 in MP4, and samples (int16 [N], at synth_sound.RATE) as FLAC.

    One thread and a fixed keyframe distance: the bytes depend on frames and samples alone.
    """
    options = {"preset": "veryfast", "crf": "20", "bf": "0", "sc_threshold": "0", **REPRODUCIBLE_H264}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = GOP_FRAMES
        track = None if samples is None else container.add_stream("flac", rate=synth_sound.RATE, layout="mono")
        for number, picture in enumerate(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            if samples is not None and track is not None:
                container.mux(track.encode(_heard(samples, number, fps)))
        container.mux(stream.encode())
        if track is not None:
            container.mux(track.encode())


def _heard(samples: NDArray[np.int16], number: int, fps: int) -> av.AudioFrame:
    """The sound of one picture."""
    first, last = (round(synth_sound.RATE * t / fps) for t in (number, number + 1))
    frame = av.AudioFrame.from_ndarray(samples[None, first:last], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = synth_sound.RATE, first, Fraction(1, synth_sound.RATE)
    return frame


def _played(course: str) -> tuple[str, ...]:
    """The classes that a course gives: itself for an appearance class, a motion forwards and backwards."""
    return _PAIRS.get(course, (course,))
