"""From shards to batches, at exact positions (design, section 7; spec omi_mdl 5.1, 6.1, 6.3, 6.5).

The order (order.py) decides which positions of which domains a batch takes; here a position becomes a decoded and
augmented clip, as a pure function of the seed and the position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mdltool.data.ahead import empty, load_ahead, usable
from mdltool.data.decode import Decoded, decode
from mdltool.data.image import image_of
from mdltool.data.index import ShardIndex
from mdltool.data.order import AUGMENT, ORDER, START, Order, Share, Slot, rng_for, rows_of
from mdltool.data.sampling import Sampling, clip_indices, random_start
from mdltool.data.tokens import check_stored, check_widths, padded
from mdltool.data.transforms import TrainTransform, flipped_classes
from mdltool.data.video import Timeline, VideoError
from mdltool.errors import MdlError
from mdltool.evaluate.views import Views, ViewSpec, load_views
from mdltool.types import Batch

_WINDOW_SHARDS = 8


@dataclass(frozen=True)
class Stream:
    """One domain's shards, and how a position in them becomes a training clip.

    modalities: width of each stream of embeddings that batches are to carry, whole, whatever frames are drawn.
    swap_sides: a flipped clip has the label of its mirror image (see flipped_classes); one without is not flipped.
    """

    index: ShardIndex
    sampling: Sampling
    transform: TrainTransform
    modalities: Mapping[str, int] = field(default_factory=dict)
    swap_sides: bool = False


@dataclass(frozen=True)
class ClipViews:
    """All views of one clip; views is None and error says why where it cannot be decoded.

    streams: float32 [M, D] each, M = 0 where the clip has no tokens.
    """

    key: str
    views: Views | None
    error: str | None
    streams: dict[str, torch.Tensor] = field(default_factory=dict)


def epoch_order(index: ShardIndex, seed: int, epoch: int, window: int = _WINDOW_SHARDS) -> np.ndarray:
    """The permutation int64 [M] of an epoch: shards permuted, then clips shuffled within windows of shards.

    A pure function of its arguments. Windows keep reads near each other on disks that care.
    """
    rng = rng_for(seed, index.domain, ORDER, epoch)
    place_of_shard = np.argsort(rng.permutation(len(index.files)))
    window_of_clip = place_of_shard[index.shard_of] // window
    return np.lexsort((rng.permutation(len(index)), window_of_clip))


def trim_of(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """The `trim` of a clip's metadata: [start, stop) in seconds, or None."""
    trim = metadata.get("trim")
    return (float(trim[0]), float(trim[1])) if trim else None


class TrainLoader:
    """This process's micro-batches, from `start_update` to before `updates`, in the order of `order`.

    streams: the order's domains; those of one batch have the same number of frames and the same crop. A clip that
    cannot be decoded gives way to the next of its permutation, and Batch.skipped says so. per_update: micro-batches
    of an update.

    Raises MdlError for shards without clips, shards without a stream that is asked for, a batch that cannot be
    shared, and, while iterating, for shards that are damaged or hold no clip that decodes.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        order: Order,
        *,
        seed: int,
        workers: int,
        updates: range,
        share: Share | None = None,
    ) -> None:
        for index in (stream.index for stream in streams):
            if len(index) == 0:
                raise MdlError(f"the shards of {index.domain} hold no clips", index.folder, "shard again")
        for stream in streams:
            check_stored(stream.index, stream.modalities)
        check_widths({stream.index.domain: stream.modalities for stream in streams})
        self.names = [stream.index.domain for stream in streams]
        self.order = order
        self.share = share or Share()
        for name, draws in order.draws_of.items():
            self.share.check(draws, order.batches, name)
        self.per_update = self.share.batches(order.batches)
        self.batches = _Batches([_StreamReader(stream, seed) for stream in streams])
        self.updates = updates
        self.workers = usable(workers, len(updates) * self.per_update, "batches")

    def __iter__(self) -> Iterator[Batch]:
        return load_ahead(self.batches, self._requests(), self.workers)

    def _requests(self) -> Iterator[_Request]:
        for batches in self.order.updates(self.updates.start, self.updates.stop):
            for number, batch in enumerate(batches):
                if not self.share.takes(number):
                    continue
                whole = rows_of(batch, self.names)
                for part in range(self.share.parts):
                    rows, partners = self.share.rows(batch, part)
                    yield _Request(number, [batch[row] for row in rows], partners, whole)


@dataclass(frozen=True)
class _Request:
    """Batch.number, its rows and their partners among them, Batch.whole."""

    number: int
    rows: list[Slot]
    partners: list[int] | None
    whole: dict[str, int]


class ViewLoader:
    """ClipViews of every clip of a split exactly once over all processes, in the index's order.

    modalities: width of each stream of embeddings that comes along; what the shards lack is absent from every clip.
    """

    def __init__(
        self,
        index: ShardIndex,
        spec: ViewSpec,
        *,
        workers: int,
        rank: int = 0,
        world: int = 1,
        modalities: Mapping[str, int] | None = None,
    ) -> None:
        check_stored(index, modalities or {}, all_there=False)
        self.clips = list(range(rank, len(index), world))
        self.views = _ClipViewsOf(index, spec, modalities or {})
        self.workers = usable(workers, len(self.clips), "clips")

    def __iter__(self) -> Iterator[ClipViews]:
        return load_ahead(self.views, self.clips, self.workers)


class _Drawn(NamedTuple):
    """What all augmented copies of a position share: frame numbers of the clip, frames, streams [M, D]."""

    picked: np.ndarray
    decoded: Decoded
    streams: dict[str, np.ndarray]


class _Loaded(NamedTuple):
    """A slot's clip, its label, its streams [M, D], and (key, reason) of the clips that were passed over for it."""

    clip: int
    label: Any
    streams: dict[str, np.ndarray]
    skipped: list[tuple[str, str]]


class _StreamReader:
    """Clips of one domain by their position in its endless stream."""

    def __init__(self, stream: Stream, seed: int) -> None:
        self.index = stream.index
        self.seed = seed
        self.sampling = stream.sampling
        self.transform = stream.transform
        self.modalities = stream.modalities
        self.images = flipped_classes(stream.index.classes) if stream.swap_sides else None
        self._orders: dict[int, np.ndarray] = {}
        self._last: tuple[tuple[int, int], _Drawn] | None = None

    def load(self, slot: Slot, out_CTHW: torch.Tensor) -> _Loaded:
        """Write a slot's frames to `out_CTHW`."""
        epoch, offset = divmod(slot.position, len(self.index))
        order = self._order(epoch)
        skipped: list[tuple[str, str]] = []
        for step in range(len(order)):
            clip = int(order[(offset + step) % len(order)])
            try:
                return _Loaded(clip, *self._decode(clip, slot, out_CTHW), skipped)
            except VideoError as error:
                skipped.append((self.index.keys[clip], error.reason))
        raise MdlError(
            f"no clip of {self.index.domain} can be decoded ({skipped[0][0]}: {skipped[0][1]})",
            self.index.folder,
            "shard again with --verify decode",
        )

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch may span two permutations
                self._orders.clear()
            self._orders[epoch] = epoch_order(self.index, self.seed, epoch)
        return self._orders[epoch]

    def forget(self) -> None:
        """Let go of the clip that was decoded last."""
        self._last = None

    def _decode(self, clip: int, slot: Slot, out_CTHW: torch.Tensor) -> tuple[Any, dict[str, np.ndarray]]:
        """Write the frames; returns the clip's label and streams."""
        if self._last is None or self._last[0] != (clip, slot.position):
            self._last = ((clip, slot.position), self._decoded(clip, slot.position))
        picked, decoded, streams = self._last[1]
        copy = (slot.copy,) if slot.copy else ()
        rng = rng_for(self.seed, self.index.domain, AUGMENT, slot.position, *copy)
        label, images = self.index.labels[clip], self.images
        may_flip = images is None or label in images
        whole = len(picked) == len(decoded.indices)
        clip_CTHW, flipped = self.transform.apply(decoded.frames, rng, out_CTHW if whole else None, may_flip)
        if not whole:
            torch.index_select(clip_CTHW, 1, torch.from_numpy(decoded.rows(picked)), out=out_CTHW)
        return (images[label] if flipped and images is not None else label), streams

    def _decoded(self, clip: int, position: int) -> _Drawn:
        metadata, video, streams = self.index.clip_and_streams(clip, self.modalities)
        picked = np.empty(0, np.int64)

        def choose(timeline: Timeline) -> Sequence[int]:
            nonlocal picked
            # A generator of its own: a damaged video asks twice, and gets the same draw.
            rng = rng_for(self.seed, self.index.domain, START, position)
            start_s = random_start(timeline.duration_s, self.sampling.span_s(timeline), rng)
            picked = clip_indices(timeline, start_s, self.sampling, rng)
            return picked.tolist()

        decoded = decode(video, choose, trim=trim_of(metadata), image=image_of(metadata))
        return _Drawn(picked, decoded, streams)


class _Batches(Dataset[Batch]):
    """_Request -> Batch."""

    def __init__(self, readers: Sequence[_StreamReader]) -> None:
        self.readers = readers

    def __getitem__(self, request: _Request) -> Batch:
        reader = self.readers[request.rows[0].stream]
        crop = reader.transform.crop
        frames = empty((len(request.rows), 3, reader.sampling.num_frames, crop, crop))
        labels, keys, skipped, streams = [], [], [], []
        for slot, out in zip(request.rows, frames, strict=True):
            reader = self.readers[slot.stream]
            loaded = reader.load(slot, out)
            labels.append(torch.as_tensor(loaded.label))
            keys.append(reader.index.keys[loaded.clip])
            skipped += loaded.skipped
            streams.append(loaded.streams)
        for reader in self.readers:
            reader.forget()
        domains = torch.tensor([slot.stream for slot in request.rows])
        return Batch(
            domain=next(iter(request.whole)) if len(request.whole) == 1 else None,
            frames=frames,
            labels=torch.stack(labels),
            keys=keys,
            positions=[slot.position for slot in request.rows],
            skipped=skipped,
            domain_B=domains,
            whole=request.whole,
            partner_B=None if request.partners is None else torch.tensor(request.partners),
            number=request.number,
            streams=padded(streams),
        )


class _ClipViewsOf(Dataset[ClipViews]):
    """Clip number -> ClipViews."""

    def __init__(self, index: ShardIndex, spec: ViewSpec, modalities: Mapping[str, int]) -> None:
        self.index = index
        self.spec = spec
        self.modalities = modalities

    def __getitem__(self, clip: int) -> ClipViews:
        key = self.index.keys[clip]
        metadata, video, arrays = self.index.clip_and_streams(clip, self.modalities)
        streams = {name: torch.from_numpy(array) for name, array in arrays.items()}
        try:
            trim, image = trim_of(metadata), image_of(metadata)
            return ClipViews(key, load_views(video, self.spec, trim=trim, image=image, key=key), None, streams)
        except VideoError as error:
            return ClipViews(key, None, error.reason, streams)
