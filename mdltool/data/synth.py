"""Generated domains: real H.264 files of moving figures, or images of them, for the demo and for tests.

Half of a domain's classes are told by what the figure is, and it wobbles without direction. The other half come
in pairs that are exact time reversals of each other: clip i of one is clip i of the other played backwards, so a
model that ignores time cannot tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from mdltool import console
from mdltool.data.encode import REPRODUCIBLE_H264
from mdltool.data.image import shrunk, write_image
from mdltool.data.synth_figures import APPEARANCE, MOVERS, Figure
from mdltool.data.synth_looks import LOOKS, Look, paint_background, smooth_noise
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.registry import did_you_mean

Frames = NDArray[np.uint8]
Array = NDArray[np.floating[Any]]

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


@dataclass(frozen=True)
class _Track:
    """A figure's course, float32 [T] each: centre and radius in pixels, tilt in radians, opening 0..1."""

    x: Array
    y: Array
    radius: Array
    tilt: Array
    opening: Array


def domain_classes(domain: str) -> tuple[str, ...]:
    """The classes of a domain: four of appearance, then two reversed pairs. Raises MdlError if unknown."""
    look = _look(domain)
    return look.appearance + tuple(name for motion in look.motions for name in _PAIRS[motion])


def render(domain: str, cls: str, instance_seed: int) -> Frames:
    """One clip before encoding: uint8 RGB [T, H, W, 3], at the domain's frame rate and size, 2.7 to 3.3 s.

    The clip of a class in REVERSED is, frame for frame, that of its partner and the same seed played backwards.
    Raises MdlError for an unknown domain or class.
    """
    if cls not in domain_classes(domain):
        raise MdlError(f"domain '{domain}' has no class '{cls}'", None, did_you_mean(cls, domain_classes(domain)))
    course = _MOTIONS.get(cls, cls)
    frames = _play(domain, course, instance_seed)
    return frames if cls == _played(course)[0] else frames[::-1]


def write_domains(
    out: Path,
    domains: Sequence[str],
    clips_per_class: int,
    seed: int,
    splits: Sequence[str] = ("train", "val"),
    workers: int | None = None,
    images: bool = False,
) -> Written:
    """Write `out/<domain>/<split>/<class>/<class>_<number>.mp4`, H.264, a keyframe every 16 frames.

    images: PNG files of one frame in their place, of the classes of appearance alone, with a shorter side of 72.
    The split `train` gets clips_per_class clips of every class, any other half as many (at least one); instances
    of different splits differ. The same arguments give the same bytes whatever the number of workers (default:
    one per core), and finished files of an interrupted call are kept.
    Raises MdlError for unknown or repeated names, for a count below 1, and where `out` holds something else.
    """
    _check(domains, clips_per_class, splits)
    request = {"domains": list(domains), "clips_per_class": clips_per_class, "seed": seed, "splits": list(splits)}
    _claim(out, request | ({"images": True} if images else {}))
    jobs = [job for domain in domains for job in _jobs(out, domain, clips_per_class, seed, splits, images)]
    missing = [job for job in jobs if not all(path.is_file() for path in job.paths)]
    total = sum(len(job.paths) for job in missing)
    with console.progress("synth", total) as advance, _mapped(missing, workers) as finished:
        for written in finished:
            advance(written)
    clips = sum(len(job.paths) for job in jobs)
    classes = {domain: LOOKS[domain].appearance if images else domain_classes(domain) for domain in domains}
    return Written(out, classes, clips)


def _look(domain: str) -> Look:
    if domain not in LOOKS:
        raise MdlError(f"there is no generated domain '{domain}'", "--domains", did_you_mean(domain, LOOKS))
    return LOOKS[domain]


def _check(domains: Sequence[str], clips_per_class: int, splits: Sequence[str]) -> None:
    for domain in domains:
        _look(domain)
    for names, noun in ((domains, "domain"), (splits, "split")):
        if not names or len(set(names)) != len(names):
            raise MdlError(f"give each {noun} once, and at least one", f"--{noun}s", f"--{noun}s a,b")
    for split in splits:
        if not split.replace("_", "").replace("-", "").isalnum():
            raise MdlError(f"'{split}' is not a split's name", "--splits", "use letters, digits, - and _")
    if clips_per_class < 1:
        raise MdlError("a class needs at least one clip", "--clips-per-class", "--clips-per-class 24")


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


def _jobs(
    out: Path, domain: str, clips_per_class: int, seed: int, splits: Sequence[str], images: bool
) -> Iterator[_Job]:
    look = LOOKS[domain]
    courses, suffix = (look.appearance, "png") if images else (look.appearance + look.motions, "mp4")
    for split in splits:
        count = clips_per_class if split == "train" else max(1, clips_per_class // 2)
        for course in courses:
            folders = [out / domain / split / cls for cls in _played(course)]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                digest = hashlib.sha256(f"{seed}/{split}/{number}".encode()).digest()
                paths = tuple(folder / f"{folder.name}_{number:04d}.{suffix}" for folder in folders)
                yield _Job(domain, course, int.from_bytes(digest[:6], "big"), paths)


@contextmanager
def _mapped(jobs: Sequence[_Job], workers: int | None) -> Iterator[Iterable[int]]:
    count = min(workers or len(os.sched_getaffinity(0)), max(1, len(jobs) // 8))
    if count <= 1:
        yield map(_write, jobs)
        return
    # spawned: a fork of a process with running threads (torch, libav) can hang
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map(_write, jobs, chunksize=4)


def _write(job: _Job) -> int:
    """Write the files of one job, each whole or not at all; returns their number."""
    still = job.paths[0].suffix == ".png"
    frames = _play(job.domain, job.course, job.instance_seed, 1 if still else None)
    if still:
        (path,) = job.paths
        partial = path.with_name(f".{path.name}")
        write_image(shrunk(frames[0], _IMAGE_SIDE), partial)
        os.replace(partial, path)
        return 1
    for path, clip in zip(job.paths, (frames, frames[::-1]), strict=False):
        partial = path.with_suffix(".part")
        _encode(clip, LOOKS[job.domain].fps, partial)
        os.replace(partial, path)
    return len(job.paths)


def _encode(frames: Frames, fps: int, path: Path) -> None:
    """H.264 in MP4. One thread and a fixed keyframe distance: the bytes depend on the frames alone."""
    options = {"preset": "veryfast", "crf": "20", "bf": "0", "sc_threshold": "0", **REPRODUCIBLE_H264}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = GOP_FRAMES
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _played(course: str) -> tuple[str, ...]:
    """The classes that a course gives: itself for an appearance class, a motion forwards and backwards."""
    return _PAIRS.get(course, (course,))


def _play(domain: str, course: str, instance_seed: int, num_frames: int | None = None) -> Frames:
    """The clip of an appearance class, or of a motion forwards. num_frames: None draws it."""
    look = LOOKS[domain]
    rng = np.random.default_rng([zlib.crc32(f"{domain}/{course}".encode()), instance_seed])
    num_frames = num_frames or round(look.fps * rng.uniform(2.7, 3.3))
    track = _follow(look, course, num_frames, rng)
    figures = MOVERS.get(course) or (APPEARANCE[course],)
    figure = figures[rng.integers(len(figures))]
    return _paint(look, figure, track, rng)


def _wave(time: Array, amplitude: float, rng: np.random.Generator) -> Array:
    """A slow oscillation of random phase: the same process forwards and backwards."""
    frequency, phase = rng.uniform(0.4, 0.9), rng.uniform(0, 2 * np.pi)
    return np.float32(amplitude) * np.sin(2 * np.pi * frequency * time + phase, dtype=np.float32)


def _follow(look: Look, course: str, num_frames: int, rng: np.random.Generator) -> _Track:
    """Where the figure is in every frame. Motions are monotone and span the clip, so any part shows them."""
    short = min(look.width, look.height)
    time = np.arange(num_frames, dtype=np.float32) / np.float32(look.fps)
    progress = np.linspace(0, 1, num_frames, dtype=np.float32)
    moves = course in MOVERS
    wobble = short * (0.02 if moves else 0.07)
    x = look.width / 2 + short * rng.uniform(-0.05, 0.05) + _wave(time, wobble, rng)
    y = look.height / 2 + short * rng.uniform(-0.05, 0.05) + _wave(time, wobble, rng)
    radius = short * rng.uniform(0.32, 0.38) * (1 + _wave(time, 0.02 if moves else 0.06, rng))
    tilt = rng.uniform(-0.2, 0.2) + _wave(time, 0.05 if moves else 0.15, rng)
    opening = np.zeros_like(progress)
    if course == "move":
        x += look.width * rng.uniform(0.45, 0.55) * (progress - 0.5)
        radius *= 0.8
    elif course == "rise":
        y -= look.height * rng.uniform(0.45, 0.55) * (progress - 0.5)
        radius *= 0.8
    elif course == "spin":
        tilt += 2 * np.pi * (rng.uniform() + rng.uniform(0.55, 0.72) * progress)
    elif course == "open":
        opening = progress
    elif course == "grow":
        radius *= 0.4 + 0.8 * progress
    return _Track(x, y, np.asarray(radius, np.float32), np.asarray(tilt, np.float32), opening)


def _paint(look: Look, figure: Figure, track: _Track, rng: np.random.Generator) -> Frames:
    margin = int(np.ceil(look.jitter)) + 1
    scene = paint_background(look, rng, margin).astype(np.uint8)
    paint = np.array(look.paints[rng.integers(len(look.paints))], np.float32)
    rough = 1 - look.chalky * smooth_noise(rng, look.height, look.width, 2)
    num_frames = len(track.x)
    shake = np.clip(rng.normal(0, look.jitter / 2, (num_frames, 2)), -look.jitter, look.jitter)
    shifts = np.rint(shake).astype(int)
    grain = rng.integers(-look.grain, look.grain + 1, (2 * look.height, 2 * look.width, 1), np.int16)
    corners = rng.integers(0, (look.height, look.width), (num_frames, 2))
    frames = np.empty((num_frames, look.height, look.width, 3), np.uint8)
    for t, ((down, right), (top, left)) in enumerate(zip(shifts, corners, strict=True)):
        y, x = margin + down, margin + right
        picture = scene[y : y + look.height, x : x + look.width].copy()
        _draw(picture, look, figure, track, t, (right, down), paint, rough)
        if look.grain:
            noise = grain[top : top + look.height, left : left + look.width]
            picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
        frames[t] = picture
    return frames


def _draw(
    picture: Frames,
    look: Look,
    figure: Figure,
    track: _Track,
    t: int,
    shift: tuple[int, int],
    paint: Array,
    rough: Array,
) -> None:
    """Paint the figure of frame t into `picture`, within the window that it reaches."""
    centre_x, centre_y, radius = track.x[t] - shift[0], track.y[t] - shift[1], track.radius[t]
    reach = 1.35 * radius + 2 * look.glow + 2
    rows = slice(max(0, int(centre_y - reach)), max(0, int(centre_y + reach) + 1))
    columns = slice(max(0, int(centre_x - reach)), max(0, int(centre_x + reach) + 1))
    window = picture[rows, columns]
    y = (np.arange(window.shape[0], dtype=np.float32)[:, None] + rows.start - centre_y) / radius
    x = (np.arange(window.shape[1], dtype=np.float32)[None, :] + columns.start - centre_x) / radius
    cos, sin = np.cos(track.tilt[t]), np.sin(track.tilt[t])
    distance = figure(cos * x + sin * y, cos * y - sin * x, float(track.opening[t])) * radius
    cover = np.clip(0.5 - distance, 0, 1)
    if look.chalky:
        cover *= rough[rows, columns]
    if look.glow:
        cover = np.maximum(cover, 0.6 * np.exp(-np.maximum(distance, 0) / (look.glow / 2)))
    ink: Array = paint
    if look.outline is not None:
        edge = np.clip(distance + 2.5, 0, 1)[..., None]
        ink = paint + edge * (np.array(look.outline, np.float32) - paint)
    window[:] = (window + cover[..., None] * (ink - window)).astype(np.uint8)
