"""Making the shards of one artifact: what an interrupted run finished is kept, the rest comes from workers."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from mdltool import console
from mdltool.data.encode import Encoding, Job, Prepared
from mdltool.data.modalities.asked import Asked
from mdltool.data.modalities.plan import Streams
from mdltool.data.shards import (
    SHARD_PREFIX,
    Naming,
    PlannedShard,
    ShardRecord,
    Unusable,
    read_record,
    write_record,
    write_shard,
)
from mdltool.data.workers import Failed, Pool
from mdltool.errors import MdlError
from mdltool.types import Clip

CLIP_LIMIT_S = 120.0
# Of a long video's file, that the slowest disk and decoder get through; its clip may take longer than others.
_SLOWEST_BYTES_PER_S = 250_000
_REASONS_SHOWN = 5
_SCRATCH = "scratch-"

Outcome = Prepared | Failed


@dataclass(frozen=True)
class Writing:
    """What decides the shards' bytes besides the data set.

    part: (i, n), the i-th of n shares, i from 0. exclude: a file of the keys of clips to leave out. streams: what
    is stored beside the frames.
    """

    encoding: Encoding = field(default_factory=Encoding)
    shard_bytes: int = 10**9
    full_check: bool = False
    part: tuple[int, int] | None = None
    exclude: Path | None = None
    streams: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class Effort:
    """What does not: worker processes, seconds that a small clip may take, share of clips that may be bad."""

    workers: int = 1
    limit_s: float = CLIP_LIMIT_S
    max_bad: float = 0.01


class Builder:
    """Makes the shards of one draft directory. total: clips of all parts, which --max-bad refers to."""

    def __init__(
        self,
        folder: Path,
        pool: Pool[Job, Prepared],
        naming: Naming,
        writing: Writing,
        effort: Effort,
        shards: Sequence[PlannedShard],
        total: int,
        streams: Streams | None = None,
    ) -> None:
        self._folder = folder
        self._pool = pool
        self._naming = naming
        self._writing = writing
        self._effort = effort
        self._shards = shards
        self._total = total
        self._streams = streams
        self._scratch = folder / _SCRATCH
        self._sizes = {
            clip.video: source.size for s in shards for clip, source in zip(s.clips, s.sources, strict=True)
        }
        self._numbers = itertools.count()
        self._records: dict[str, ShardRecord] = {}

    def build(self) -> list[ShardRecord]:
        """Records of all the shards, in their order; those that an earlier run finished are kept."""
        remove_strays(self._folder, {name for shard in self._shards for name in (shard.file, shard.record_file)})
        # A name of its own: a worker of a killed run may still be writing to that one's.
        self._scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
        try:
            self._keep_finished()
            self._make([shard for shard in self._shards if shard.file not in self._records])
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return [self._records[shard.file] for shard in self._shards]

    def _keep_finished(self) -> None:
        """Take over finished shards but for those of whose failed clips one can be used this time."""
        read = ((shard, read_record(self._folder, shard)) for shard in self._shards)
        found = [(shard, record) for shard, record in read if record is not None]
        if not found:
            return
        failed = [clip for shard, record in found for clip in _failed(shard, record)]
        outcomes = self._pool.map(self._jobs(failed))
        for shard, record in found:
            clips = _failed(shard, record)
            again = list(islice(outcomes, len(clips)))
            reasons = [outcome.reason for outcome in again if isinstance(outcome, Failed)]
            if len(reasons) < len(clips):
                continue
            unusable = [self._naming.unusable(clip, why) for clip, why in zip(clips, reasons, strict=True)]
            self._records[shard.file] = replace(record, unusable=tuple(unusable))
            if clips:
                write_record(self._folder, shard, self._records[shard.file])
        console.say(f"resuming: {len(self._records)} of {len(self._shards)} shards are finished")
        self._refuse_too_many_bad()

    def _make(self, shards: Sequence[PlannedShard]) -> None:
        clips = [clip for shard in shards for clip in shard.clips]
        outcomes = self._pool.map(self._jobs(clips))
        with console.progress("shard", len(clips)) as advance:
            for shard in shards:
                own = _counted(islice(outcomes, len(shard.clips)), advance)
                self._records[shard.file] = write_shard(self._folder, shard, own, self._naming)
                self._refuse_too_many_bad()

    def _refuse_too_many_bad(self) -> None:
        bad = [clip for record in self._records.values() for clip in record.unusable]
        refuse_too_many_bad(bad, self._total, self._effort.max_bad)

    def _jobs(self, clips: Iterable[Clip]) -> Iterator[Job]:
        for clip in clips:
            scratch = self._scratch / str(next(self._numbers))
            limit_s = self._effort.limit_s + self._sizes[clip.video] / _SLOWEST_BYTES_PER_S
            streams = self._streams.of(clip) if self._streams is not None else ()
            limit_s += sum(stream.plan.limit_s for stream in streams)
            yield Job(clip, self._writing.encoding, self._writing.full_check, scratch, limit_s, streams)


def _failed(shard: PlannedShard, record: ShardRecord) -> list[Clip]:
    keys = {clip.key for clip in record.unusable}
    return [clip for clip in shard.clips if clip.key in keys]


def _counted(outcomes: Iterable[Outcome], advance: Callable[..., None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        yield outcome
        advance()


def refuse_too_many_bad(bad: Sequence[Unusable], total: int, max_bad: float) -> None:
    """Raises MdlError when more than the share `max_bad` of all clips cannot be used."""
    if len(bad) <= max_bad * total and len(bad) < total:
        return
    reasons = "".join(f"\n    {clip.video}: {clip.reason}" for clip in bad[:_REASONS_SHOWN])
    more = f"\n    and {len(bad) - _REASONS_SHOWN} more" if len(bad) > _REASONS_SHOWN else ""
    share = math.ceil(1000 * len(bad) / total) / 10
    raise MdlError(
        f"{len(bad)} of {total} clips cannot be used, more than --max-bad {100 * max_bad:g}%:{reasons}{more}",
        None,
        f"repair the files, or accept the loss with --max-bad {share:g}%; finished shards are kept until then",
    )


def remove_strays(folder: Path, expected: set[str]) -> None:
    """Delete what interrupted runs and other plans left in a draft."""
    for name in own_names(folder) - expected:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def own_names(folder: Path) -> set[str]:
    """What may not be in the artifact unless expected; a kill may leave any file half-written, as .tmp."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name.startswith((SHARD_PREFIX, _SCRATCH)) or name.endswith(".tmp")}
