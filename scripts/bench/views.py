"""The 10x3 data path, from a video's bytes to uint8 crops, beside one full decode of the same video.

    python scripts/bench/views.py [--check] [--repetitions 15] [--threads 1] [VIDEO ...]

Without videos it makes H.264 clips of 340x256 pixels, 10 s, with keyframes every 16 and every 250 frames. Decoding
every frame to RGB and `load_views`, which opens the video once, take turns; then the same 30 views with the video
opened for each. --check exits with 1 when the median over the turns of `load_views` is above 1.2 times the full
decode on one of the clips.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clips import write_clip

from mdltool.data.decode import decode
from mdltool.data.sampling import Sampling, clip_indices, view_starts
from mdltool.data.transforms import crop_corners, resized
from mdltool.evaluate.views import ViewSpec, load_views

REACH = 1.2
SPEC = ViewSpec(10, 3, Sampling(16, 80 / 30), 256, 224)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the decoder")
    parser.add_argument("videos", nargs="*", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as folder:
        videos = options.videos or [
            write_clip(Path(folder) / f"gop{gop}-{rate}fps.mp4", gop=gop, rate=rate)
            for gop, rate in ((16, 30), (250, 30), (16, 25), (250, 25))
        ]
        worst = max(compare(video, options.repetitions, options.threads) for video in videos)
    print(f"the slowest 10x3 path takes {worst:.2f} times one full decode; the reach is {REACH:g}")
    return 1 if options.check and worst > REACH else 0


def compare(video: Path, repetitions: int, threads: int) -> float:
    """Print the medians for one video; returns the ratio of load_views to the full decode."""
    content = video.read_bytes()
    runs: dict[str, Callable[[], object]] = {
        "full decode": lambda: decode(content, lambda timeline: range(len(timeline)), threads=threads),
        "10x3, opened once": lambda: load_views(content, SPEC, threads=threads),
        "10x3, opened per view": lambda: each_view_alone(content, threads),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name in ("full decode", "10x3, opened once"):
            took = timed(runs[name])
            if repetition:  # the first warms up
                times[name].append(took)
    times["10x3, opened per view"] = [timed(runs["10x3, opened per view"]) for _ in range(3)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    backend = load_views(content, SPEC).backend
    print(f"{video.name}: {len(content) / 1e3:.0f} kB, decoder {backend}, {threads} thread(s)")
    for name, median in medians.items():
        spread = f"{min(times[name]) * 1e3:.0f} to {max(times[name]) * 1e3:.0f}"
        print(f"  {name:22} {median * 1e3:7.1f} ms ({spread})  {median / medians['full decode']:5.2f}")
    # Turn by turn, so that whatever else the machine does weighs on both.
    return statistics.median(a / b for a, b in zip(times["10x3, opened once"], times["full decode"], strict=True))


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def each_view_alone(content: bytes, threads: int) -> list[torch.Tensor]:
    """The same views, the video opened and decoded for each: what load_views saves."""
    views = []
    for position in range(SPEC.temporal):
        for number in range(SPEC.spatial):
            decoded = decode(content, lambda timeline, p=position: _indices(timeline, p), threads=threads)
            frames = resized(decoded.frames, SPEC.short_side)
            height, width = frames.shape[-2:]
            y, x = crop_corners(height, width, SPEC.crop, SPEC.spatial)[number]
            views.append(frames[..., y : y + SPEC.crop, x : x + SPEC.crop].transpose(0, 1).contiguous())
    return views


def _indices(timeline, position: int) -> list[int]:  # type: ignore[no-untyped-def]
    start_s = view_starts(timeline.duration_s, SPEC.sampling.span_s(timeline), SPEC.temporal)[position]
    return clip_indices(timeline, start_s, SPEC.sampling).tolist()


if __name__ == "__main__":
    sys.exit(main())
