"""Throughput of the training loader, to uint8 crops, beside bare decoding of the same frames on all cores.

    python scripts/bench/load.py [--check] [--updates 16] [--batch 16] [--repetitions 7] [--workers CORES]

Makes shards of H.264 clips (340x256 pixels, 10 s, half with keyframes every 16 frames, half every 250), then lets
two things take turns: the loader with one worker a core, reading shards, decoding, jittering, cropping and
collecting batches; and as many processes that hold the videos in memory and decode the very same frames to RGB,
nothing else. Both are timed from starting the processes to the last clip. --check exits with 1 when the median
over the turns of the loader's rate is below 0.8 of the bare decoding's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clips import write_clip

from mdltool.data import loader
from mdltool.data.decode import Choose, Decoded, decode
from mdltool.data.index import ShardIndex
from mdltool.data.loader import Stream, TrainLoader
from mdltool.data.order import InTurn
from mdltool.data.sampling import Sampling
from mdltool.data.transforms import TrainTransform
from mdltool.stages.shard import Dataset, run

REACH = 0.8
VIDEOS = 16
SAMPLING = Sampling(16, 80 / 30)
TRANSFORM = TrainTransform((224, 320), 224, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mdltool-bench-") as folder:
        for number in range(VIDEOS):
            path = Path(folder) / "videos" / f"class{number % 2}" / f"clip{number:02d}.mp4"
            write_clip(path, gop=(16, 250)[number // 2 % 2], rate=(25, 30)[number // 4 % 2], seed=number)
        shards = run(Dataset(Path(folder) / "videos", "folder", "bench", "train"), Path(folder) / "shards")
        return compare(ShardIndex.open(shards), options)


def compare(index: ShardIndex, options: argparse.Namespace) -> int:
    """Print clips a second and their ratio; returns the exit code."""

    def load(workers: int) -> None:
        order = InTurn({index.domain: len(index)}, {index.domain: options.batch}, 0)
        for _ in TrainLoader(
            [Stream(index, SAMPLING, TRANSFORM)],
            order,
            seed=0,
            workers=workers,
            updates=range(options.updates),
        ):
            pass

    clips = options.updates * options.batch
    work = decoded_by(lambda: load(0))
    shares = [[] for _ in range(options.workers)]
    for number, clip in enumerate(work):
        shares[number // options.batch % options.workers].append(clip)
    runs: dict[str, Callable[[], None]] = {
        "loader": lambda: load(options.workers),
        "bare decoding": lambda: decode_on_all_cores(shares),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(options.repetitions + 1):
        for name, run_once in runs.items():
            started = time.perf_counter()
            run_once()
            if repetition:  # the first warms up
                rates[name].append(clips / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Turn by turn, so that whatever else the machine does weighs on both.
    ratio = statistics.median(a / b for a, b in zip(rates["loader"], rates["bare decoding"], strict=True))
    print(f"{clips} clips of {SAMPLING.num_frames} frames from {len(index)} videos, {options.workers} worker(s)")
    for name, values in rates.items():
        print(f"  {name:14} {medians[name]:7.1f} clips/s ({min(values):.1f} to {max(values):.1f})")
    print(f"the loader reaches {ratio:.2f} of bare decoding; the reach is {REACH:g}")
    return 1 if options.check and ratio < REACH else 0


def decoded_by(run_once: Callable[[], None]) -> list[tuple[bytes, list[int]]]:
    """(video, frame numbers) of every decode() that the loader calls in this process, in order."""
    calls = []

    def recording(video: bytes, choose: Choose, **options: Any) -> Decoded:
        decoded = decode(video, choose, **options)
        calls.append((video, decoded.indices.tolist()))
        return decoded

    with mock.patch.object(loader, "decode", recording):
        run_once()
    return calls


def decode_on_all_cores(shares: list[list[tuple[bytes, list[int]]]]) -> None:
    """One process for each share."""
    processes = [multiprocessing.Process(target=decode_share, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "a decoding process failed"


def decode_share(share: list[tuple[bytes, list[int]]]) -> None:
    """Decode to RGB, nothing else."""
    torch.set_num_threads(1)
    for video, indices in share:
        decode(video, lambda _, indices=indices: indices)


if __name__ == "__main__":
    sys.exit(main())
