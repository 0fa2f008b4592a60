"""From shards to batches, at exact positions (design, section 7; spec omi_mdl 5.1, 6.1, 6.3, 6.5).

A domain is an endless stream: one permutation of its clips after the other. The position in the stream decides the
clip and its augmentation, and the update decides the positions, so any number of workers and processes gives the
same batches, and a run that starts at update u gets what it would have got anyway.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mdltool import console
from mdltool.data.decode import decode
from mdltool.data.index import ShardIndex
from mdltool.data.sampling import Sampling, clip_indices, random_start
from mdltool.data.transforms import TrainTransform
from mdltool.data.video import Timeline, VideoError
from mdltool.errors import MdlError
from mdltool.evaluate.views import Views, ViewSpec, load_views
from mdltool.types import Batch

_WINDOW_SHARDS = 8


@dataclass(frozen=True)
class Stream:
    """One domain's shards and how many clips an update takes of them, over all processes."""

    index: ShardIndex
    batch: int


def epoch_order(index: ShardIndex, seed: int, epoch: int, window: int = _WINDOW_SHARDS) -> np.ndarray:
    """The permutation int64 [M] of an epoch: shards permuted, then clips shuffled within windows of shards.

    A pure function of its arguments. Windows keep reads near each other on disks that care.
    """
    rng = np.random.default_rng([seed, _name_seed(index.domain), epoch])
    rank_of_shard = np.argsort(rng.permutation(len(index.files)))
    window_of_clip = rank_of_shard[index.shard_of] // window
    return np.lexsort((rng.permutation(len(index)), window_of_clip))


def _name_seed(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % (2**63)


class _StreamReader:
    """Clips of one domain by their position in its endless stream."""

    def __init__(self, index: ShardIndex, seed: int, sampling: Sampling, transform: TrainTransform) -> None:
        self.index = index
        self.seed = seed
        self.sampling = sampling
        self.transform = transform
        self._order: tuple[int, np.ndarray] | None = None

    def clip_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.index))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.index, self.seed, epoch))
        return int(self._order[1][offset])

    def load(self, position: int) -> tuple[torch.Tensor, int, list[tuple[str, str]]]:
        """(uint8 [C, T, H, W], clip, skipped): a clip that cannot be decoded gives way to the next of its epoch."""
        rng = np.random.default_rng([self.seed, _name_seed(self.index.domain), 1, position])
        epoch, offset = divmod(position, len(self.index))
        skipped: list[tuple[str, str]] = []
        for step in range(len(self.index)):
            clip = self.clip_at(epoch * len(self.index) + (offset + step) % len(self.index))
            try:
                return self._decode(clip, rng), clip, skipped
            except VideoError as error:
                skipped.append((self.index.keys[clip], error.reason))
        raise MdlError(
            f"no clip of {self.index.domain} can be decoded ({skipped[0][1]})",
            self.index.folder,
            "mdltool shard --verify decode",
        )

    def _decode(self, clip: int, rng: np.random.Generator) -> torch.Tensor:
        metadata, video = self.index.clip(clip)
        fraction = rng.random()
        picked: list[np.ndarray] = []

        def choose(timeline: Timeline) -> Sequence[int]:
            start = random_start(timeline.duration_s, self.sampling.clip_seconds, _Fixed(fraction))
            picked[:] = [clip_indices(timeline, start, self.sampling)]
            return picked[0].tolist()

        decoded = decode(video, choose, trim=trim_of(metadata))
        frames_TCHW = decoded.frames[torch.from_numpy(decoded.rows(picked[0]))]
        return self.transform(frames_TCHW, rng)


class _Fixed(np.random.Generator):
    """A generator whose next number is known: `choose` may be asked twice for a damaged video."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._value = value

    def random(self, *_: object) -> float:  # type: ignore[override]
        return self._value


def trim_of(metadata: dict) -> tuple[float, float] | None:
    """The `trim` of a clip's metadata: [start, stop) in seconds, or None."""
    trim = metadata.get("trim")
    return (float(trim[0]), float(trim[1])) if trim else None


class _Batches(Dataset):
    """(domain number, positions) -> Batch."""

    def __init__(self, readers: Sequence[_StreamReader]) -> None:
        self.readers = readers

    def __getitem__(self, request: tuple[int, list[int]]) -> Batch:
        number, positions = request
        reader = self.readers[number]
        loaded = [reader.load(position) for position in positions]
        index = reader.index
        return Batch(
            domain=index.domain,
            frames=torch.stack([frames for frames, _, _ in loaded]),
            labels=torch.from_numpy(index.labels[[clip for _, clip, _ in loaded]]),
            keys=[index.keys[clip] for _, clip, _ in loaded],
            positions=positions,
            skipped=[entry for _, _, skipped in loaded for entry in skipped],
        )


class TrainLoader:
    """Batches of all domains, one after the other within each update, from `start_update` to `updates`.

    Update u of a domain takes positions [u * B, (u + 1) * B) of its stream (B: its batch times rounds); process
    `rank` of `world` takes every world-th of each batch. domain_order: `sequential` as given, `shuffled` anew for
    every round, `random` draws each domain of a round with replacement. The same order on every process.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        sampling: Sampling,
        transform: TrainTransform,
        seed: int,
        workers: int,
        updates: int,
        start_update: int = 0,
        rank: int = 0,
        world: int = 1,
        domain_order: str = "sequential",
        rounds_per_update: int = 1,
    ) -> None:
        self.streams = list(streams)
        self.readers = [_StreamReader(s.index, seed, sampling, transform) for s in self.streams]
        for stream in self.streams:
            if len(stream.index) == 0:
                raise MdlError(
                    f"the shards of {stream.index.domain} hold no clips", stream.index.folder, "shard again"
                )
        self.seed = seed
        self.workers = _usable(workers, (updates - start_update) * len(self.streams))
        self.updates = range(start_update, updates)
        self.rank, self.world = rank, world
        self.domain_order = domain_order
        self.rounds = rounds_per_update

    def requests(self) -> Iterator[tuple[int, list[int]]]:
        """(domain number, stream positions of this process) of every batch to come."""
        taken = self._taken_before(self.updates.start)
        for update in self.updates:
            for round_ in range(self.rounds):
                for number in self._order(update, round_):
                    batch = self.streams[number].batch
                    first = taken[number] * batch
                    taken[number] += 1
                    yield number, list(range(first + self.rank, first + batch, self.world))

    def _taken_before(self, update: int) -> list[int]:
        """Batches that each domain has given before an update."""
        if self.domain_order != "random":
            return [update * self.rounds] * len(self.streams)
        taken = [0] * len(self.streams)
        for earlier in range(update):
            for round_ in range(self.rounds):
                for number in self._order(earlier, round_):
                    taken[number] += 1
        return taken

    def _order(self, update: int, round_: int) -> list[int]:
        if self.domain_order == "sequential":
            return list(range(len(self.streams)))
        rng = np.random.default_rng([self.seed, 2, update, round_])
        if self.domain_order == "shuffled":
            return rng.permutation(len(self.streams)).tolist()
        return rng.integers(0, len(self.streams), len(self.streams)).tolist()

    def __iter__(self) -> Iterator[Batch]:
        # batch_size None: each request is a whole batch, made in one worker.
        return iter(_data_loader(_Batches(self.readers), self.requests(), self.workers))


@dataclass(frozen=True)
class ClipViews:
    """All views of one clip; views is None and error says why where it cannot be decoded."""

    key: str
    label: int
    views: Views | None
    error: str | None


class _ClipViewsOf(Dataset):
    def __init__(self, index: ShardIndex, spec: ViewSpec) -> None:
        self.index = index
        self.spec = spec

    def __getitem__(self, clip: int) -> ClipViews:
        key, label = self.index.keys[clip], int(self.index.labels[clip])
        metadata, video = self.index.clip(clip)
        try:
            views = load_views(video, self.spec, trim=trim_of(metadata), key=key)
        except VideoError as error:
            return ClipViews(key, label, None, error.reason)
        return ClipViews(key, label, views, None)


class ViewLoader:
    """Every clip of the split exactly once over all processes, in the index's order, with all its views."""

    def __init__(self, index: ShardIndex, spec: ViewSpec, *, workers: int, rank: int = 0, world: int = 1) -> None:
        self.dataset = _ClipViewsOf(index, spec)
        self.clips = range(rank, len(index), world)
        self.workers = _usable(workers, len(self.clips))

    def __iter__(self) -> Iterator[ClipViews]:
        return iter(_data_loader(self.dataset, iter(self.clips), self.workers))


def _usable(workers: int, work: int) -> int:
    if workers > max(work, 1):
        console.say(f"{workers - work} of {workers} workers have nothing to read and idle")
        return max(work, 0)
    return workers


def _data_loader(dataset: Dataset, requests: Iterator, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Requests(requests),
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        collate_fn=_as_it_is,
        prefetch_factor=2 if workers else None,
    )


class _Requests:
    """What DataLoader calls a sampler: anything to iterate over."""

    def __init__(self, requests: Iterator) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator:
        return self.requests


def _as_it_is(value: object) -> object:
    return value


def _start_worker(_: int) -> None:
    # The trainer decides when to stop; workers end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
