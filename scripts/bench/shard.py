"""Throughput of `mdltool shard` beside plain `tar` of the same files, in the same run.

    python scripts/bench/shard.py [--check] [--clips 200] [--megabytes 6] [--repetitions 5] [--dir DIR] [--cold]

Makes clips of H.264 noise in a temporary folder of DIR, then takes turns: tar, shard, tar, shard ... Both are timed
as commands, from start to exit; tar is also waited for until its file is on the disk, as shard always is. The clips
are in the page cache unless --cold, which asks the kernel to forget them before each turn. --check exits with 1
when the median of shard takes more than twice the median of tar (on the disk).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

REACH = 2.0
SMALL_BYTES = 250_000
FRAMES, WIDTH, HEIGHT, RATE = 250, 340, 256, 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=6.0, help="of one clip")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--cold", action="store_true", help="source files out of the page cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-", dir=options.dir) as folder:
        large = Bench(Path(folder) / "large", options.clips, int(options.megabytes * 1e6), options.cold)
        ratio = large.compare(options.repetitions)
        shutil.rmtree(large.folder)
        Bench(Path(folder) / "small", options.clips, SMALL_BYTES, options.cold).compare(options.repetitions)
    print(f"shard takes {ratio:.2f} times as long as tar to the disk; the reach is {REACH:g}")
    return 1 if options.check and ratio > REACH else 0


class Bench:
    """Clips of one size in class folders, and the two commands on them."""

    def __init__(self, folder: Path, clips: int, clip_bytes: int, cold: bool) -> None:
        self.folder = folder
        self.cold = cold
        self.videos = folder / "videos"
        first = self.videos / "a" / "clip0000.mp4"
        first.parent.mkdir(parents=True)
        write_clip(first, clip_bytes)
        (self.videos / "b").mkdir()
        for number in range(1, clips):
            shutil.copyfile(first, self.videos / "ab"[number % 2] / f"clip{number:04d}.mp4")
        self.files = sorted(self.videos.rglob("*.mp4"))
        self.bytes = first.stat().st_size * clips

    def compare(self, repetitions: int) -> float:
        """Print medians and spreads; returns the ratio of shard to tar on the disk."""
        runs: dict[str, Callable[[], None]] = {
            "tar": self.tar,
            "tar to the disk": self.tar_sync,
            "shard": self.shard,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        self.shard()  # both programs and, without --cold, the clips are in memory from here on
        for repetition in range(repetitions):
            # Turns in both directions: what runs second takes over pages that the first just gave back.
            for name, command in list(runs.items())[:: -1 if repetition % 2 else 1]:
                times[name].append(self._timed(command))
        state = "cold" if self.cold else "warm"
        size = self.bytes / len(self.files) / 1e6
        print(f"{len(self.files)} clips of {size:.2f} MB, {state} cache, {len(os.sched_getaffinity(0))} cores:")
        for name, seconds in times.items():
            median = statistics.median(seconds)
            print(
                f"  {name:16s} {median:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
                f"{self.bytes / median / 1e6:6.0f} MB/s, {1000 * median / len(self.files):6.2f} ms a clip"
            )
        return statistics.median(times["shard"]) / statistics.median(times["tar to the disk"])

    def tar(self) -> None:
        subprocess.run(["tar", "-cf", self.folder / "plain.tar", "-C", self.videos, "."], check=True)

    def tar_sync(self) -> None:
        self.tar()
        flush(self.folder / "plain.tar")

    def shard(self) -> None:
        target = self.folder / "shards"
        words = [self.videos, "--format", "folder", "--domain", "bench", "--split", "train", "--out", target]
        command = [sys.executable, "-m", "mdltool", "shard", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _timed(self, command: Callable[[], None]) -> float:
        shutil.rmtree(self.folder / "shards", ignore_errors=True)
        (self.folder / "plain.tar").unlink(missing_ok=True)
        os.sync()
        for path in self.files if self.cold else ():
            forget(path)
        started = time.perf_counter()
        command()
        return time.perf_counter() - started


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(path: Path) -> None:
    """Ask the kernel to drop a file from its page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def write_clip(path: Path, size: int) -> None:
    """A 10 s H.264 clip of noise, of about `size` bytes."""
    noise = np.random.default_rng(0)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = size * 8 * RATE // FRAMES
        for _ in range(FRAMES):
            picture = noise.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    sys.exit(main())
