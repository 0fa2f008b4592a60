"""`shard`: videos and annotations -> shards artifact; and the parts of one, made apart, into the whole."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact, Draft, begin
from mdltool.data.dataset import Dataset
from mdltool.data.encode import Encoding, Job, Prepared, prepare
from mdltool.data.formats.common import clip_name
from mdltool.data.shards import (
    SHARD_PREFIX,
    Naming,
    PlannedShard,
    ShardRecord,
    Unusable,
    plan,
    read_record,
    write_record,
    write_shard,
)
from mdltool.data.workers import Failed, Pool
from mdltool.errors import MdlError
from mdltool.files import digest_of, sha256_file, write_text
from mdltool.types import Clip, Listing

CLIP_LIMIT_S = 120.0
# Of a long video's file, that the slowest disk and decoder get through; its clip may take longer than others.
_SLOWEST_BYTES_PER_S = 250_000
_REASONS_SHOWN = 5
_SCRATCH = "scratch-"
_PART = "part.json"
INDEX, QUARANTINE, MISSING = "index.json", "quarantine.jsonl", "missing.jsonl"

Outcome = Prepared | Failed
Row = dict[str, Any]


@dataclass(frozen=True)
class Writing:
    """What decides the shards' bytes besides the data set.

    part: (i, n), the i-th of n shares, i from 0. exclude: a file of the keys of clips to leave out.
    """

    encoding: Encoding = field(default_factory=Encoding)
    shard_bytes: int = 10**9
    full_check: bool = False
    part: tuple[int, int] | None = None
    exclude: Path | None = None


@dataclass(frozen=True)
class Effort:
    """What does not: worker processes, seconds that a small clip may take, share of clips that may be bad."""

    workers: int = 1
    limit_s: float = CLIP_LIMIT_S
    max_bad: float = 0.01


def default_name(dataset: Dataset, part: tuple[int, int] | None) -> str:
    """The artifact's name in the work directory."""
    suffix = "" if part is None else f"-part{part[0]}of{part[1]}"
    return f"{dataset.domain}-{dataset.split}{suffix}"


def outlook(dataset: Dataset, writing: Writing) -> dict[str, Any]:
    """What `run` would write: counts, notes, and each shard's clips and bytes of source files."""
    listing = _listed(dataset, writing)
    shards = _share(plan(listing.clips, writing.shard_bytes), writing.part)
    return {
        "domain": dataset.domain,
        "split": dataset.split,
        "task": listing.task,
        "classes": list(listing.classes),
        "clips": len(listing.clips),
        "missing": len(listing.missing),
        "excluded": listing.excluded,
        "notes": list(listing.notes),
        "shards": [
            {"file": s.file, "clips": len(s.clips), "source_bytes": sum(f.size for f in s.sources)} for s in shards
        ],
    }


def run(dataset: Dataset, out: Path, writing: Writing = Writing(), effort: Effort = Effort()) -> Artifact:
    """Write the shards, or the share of them that `writing.part` names, and return the artifact.

    An interrupted run is continued: finished shards are kept, clips that failed are tried again. Raises MdlError
    for what is wrong with the annotations, and when more than `effort.max_bad` of the clips cannot be used; what
    is finished is kept then.
    """
    with Pool(prepare, effort.workers, attrgetter("limit_s")) as pool:
        listing = _listed(dataset, writing)
        console.say(f"{dataset.format}: {'; '.join(listing.notes)}")
        planned = plan(listing.clips, writing.shard_bytes)
        request = _request(dataset, listing, writing)
        draft = begin(out, kind="shards", stage="shard", inputs=(), request=request, resume="auto")
        if isinstance(draft, Artifact):
            console.say(f"already there and identical: {out}")
            return draft
        naming = Naming(dataset.domain, dataset.split, listing.classes, dataset.source, listing.task)
        try:
            shards = _share(planned, writing.part)
            records = _Builder(draft.path, pool, naming, writing, effort, shards, len(listing.clips)).build()
            if writing.part is not None:
                _write_part(draft.path, writing.part, planned)
            missing = [{"key": key, "reason": reason} for key, reason in sorted(listing.missing)]
            unusable = [asdict(clip) for record in records for clip in record.unusable]
            entries = [record.as_index() for record in records if record.members]
            return _commit(draft, naming.as_index(), entries, unusable, missing, listing.excluded)
        except BaseException:
            draft.abandon(keep=True)
            raise


def _listed(dataset: Dataset, writing: Writing) -> Listing:
    """The clips. Raises MdlError where they cannot all be stored as the encoding says."""
    listing = dataset.read(writing.exclude)
    images = sum(clip.is_image for clip in listing.clips)
    if images and writing.encoding.mode == "h264":
        raise MdlError(
            f"{images} of the clips are images, which are not stored as h264", "--encode", "copy or jpeg"
        )
    return listing


def _request(dataset: Dataset, listing: Listing, writing: Writing) -> dict[str, Any]:
    clips = [
        [clip.key, clip.label, clip_name(clip, dataset.source), clip.start_s, clip.end_s] for clip in listing.clips
    ]
    request = {
        "domain": dataset.domain,
        "split": dataset.split,
        "format": dataset.format,
        "encode": writing.encoding.as_request(),
        "verify": "decode" if writing.full_check else "probe",
        "shard_bytes": writing.shard_bytes,
        "listing": digest_of([listing.classes, sorted(clips), sorted(listing.missing)]),
    }
    if listing.excluded:  # which clips is in the listing
        request["excluded"] = listing.excluded
    if writing.part is not None:
        request["part"] = list(writing.part)
    return request


def _share(planned: Sequence[PlannedShard], part: tuple[int, int] | None) -> list[PlannedShard]:
    return list(planned) if part is None else list(planned[part[0] :: part[1]])


class _Builder:
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
    ) -> None:
        self._folder = folder
        self._pool = pool
        self._naming = naming
        self._writing = writing
        self._effort = effort
        self._shards = shards
        self._total = total
        self._scratch = folder / _SCRATCH
        self._sizes = {
            clip.video: source.size for s in shards for clip, source in zip(s.clips, s.sources, strict=True)
        }
        self._numbers = itertools.count()
        self._records: dict[str, ShardRecord] = {}

    def build(self) -> list[ShardRecord]:
        """Records of all the shards, in their order; those that an earlier run finished are kept."""
        _remove_strays(self._folder, {name for shard in self._shards for name in (shard.file, shard.record_file)})
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
        _refuse_too_many_bad(bad, self._total, self._effort.max_bad)

    def _jobs(self, clips: Iterable[Clip]) -> Iterator[Job]:
        for clip in clips:
            scratch = self._scratch / str(next(self._numbers))
            limit_s = self._effort.limit_s + self._sizes[clip.video] / _SLOWEST_BYTES_PER_S
            yield Job(clip, self._writing.encoding, self._writing.full_check, scratch, limit_s)


def _failed(shard: PlannedShard, record: ShardRecord) -> list[Clip]:
    keys = {clip.key for clip in record.unusable}
    return [clip for clip in shard.clips if clip.key in keys]


def _counted(outcomes: Iterable[Outcome], advance: Callable[..., None]) -> Iterator[Outcome]:
    for outcome in outcomes:
        yield outcome
        advance()


def _refuse_too_many_bad(bad: Sequence[Unusable], total: int, max_bad: float) -> None:
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


def _remove_strays(folder: Path, expected: set[str]) -> None:
    """Delete what interrupted runs and other plans left in a draft."""
    for name in _own_names(folder) - expected:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _own_names(folder: Path) -> set[str]:
    """What may not be in the artifact unless expected; a kill may leave any file half-written, as .tmp."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name.startswith((SHARD_PREFIX, _SCRATCH)) or name.endswith(".tmp")}


def _write_part(folder: Path, part: tuple[int, int], planned: Sequence[PlannedShard]) -> None:
    """What `merge` needs to know that parts belong together."""
    layout = [[s.file, [clip.key for clip in s.clips], [f.size for f in s.sources]] for s in planned]
    content = {
        "part": part[0],
        "of": part[1],
        "clips": sum(len(s.clips) for s in planned),
        "plan": digest_of(layout),
    }
    write_text(folder / _PART, json.dumps(content))


def _commit(
    draft: Draft, header: Row, shards: list[Row], unusable: list[Row], missing: list[Row], excluded: int
) -> Artifact:
    """Write the index and the lists of what is not there, and make the artifact whole.

    header: what begins index.json; shards, unusable, missing: rows of index.json and of the two lists.
    """
    shards = sorted(shards, key=lambda shard: shard["file"])
    unusable = sorted(unusable, key=lambda clip: clip["key"])
    counts = {"clips": sum(shard["clips"] for shard in shards), "quarantined": len(unusable)}
    write_text(draft.path / INDEX, json.dumps({**header, **counts, "shards": shards}))
    write_text(draft.path / QUARANTINE, _lines(unusable))
    write_text(draft.path / MISSING, _lines(missing))
    if unusable:
        console.warn(f"{len(unusable)} clips are quarantined, e.g. {unusable[0]['video']}: {unusable[0]['reason']}")
    summary = {
        **{name: header[name] for name in ("domain", "split")},
        "classes": len(header["classes"]),
        **counts,
        "missing": len(missing),
        "excluded": excluded,
        "shards": len(shards),
        "bytes": sum(shard["bytes"] for shard in shards),
    }
    known = {shard["file"]: (shard["bytes"], shard["sha256"]) for shard in shards}
    return draft.commit(summary, known=known, drop=_own_names(draft.path) - set(known))


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def merge(parts: Sequence[Artifact], out: Path | None, work: Path, max_bad: float) -> Artifact:
    """Join the parts of one set of shards; the artifact is the one that an undivided run makes, digest and all.

    out: default the undivided run's. Shard files are linked where the file system allows it, else copied. Raises
    MdlError when the parts are not all of one set, and when more than `max_bad` of all clips cannot be used.
    """
    total = _check_parts(parts)
    indices = [part.load_json(INDEX) for part in parts]
    header = {name: indices[0][name] for name in ("domain", "split", "task", "classes")}
    request = _undivided(parts[0])
    unusable = [row for part in parts for row in _rows(part, QUARANTINE)]
    _refuse_too_many_bad([Unusable(**row) for row in unusable], total, max_bad)
    out = out or work / "shards" / f"{header['domain']}-{header['split']}"
    draft = begin(out, kind="shards", stage="shard", inputs=(), request=request, resume="auto")
    if isinstance(draft, Artifact):
        console.say(f"already there and identical: {out}")
        return draft
    try:
        _remove_strays(draft.path, set())
        for part, index in zip(parts, indices, strict=True):
            for shard in index["shards"]:
                _take_over(part.file(shard["file"]), draft.path / shard["file"], shard["sha256"])
        shards = [shard for index in indices for shard in index["shards"]]
        missing = _rows(parts[0], MISSING)
        return _commit(draft, header, shards, unusable, missing, request.get("excluded", 0))
    except BaseException:
        draft.abandon(keep=True)
        raise


def _check_parts(parts: Sequence[Artifact]) -> int:
    """Clips of the whole set. Raises MdlError unless these are all its parts, each once."""
    for part in parts:
        if _PART not in part.files:
            raise MdlError("this is not a part of divided shards", part.path, "give what 'shard --part i/n' made")
    notes = [part.load_json(_PART) for part in parts]
    for part, note in zip(parts, notes, strict=True):
        if _undivided(part) != _undivided(parts[0]) or note["of"] != notes[0]["of"]:
            raise MdlError(
                f"this part was made by another command than {parts[0].path.name}",
                part.path,
                "make all parts with the same options, of the same videos and annotations",
            )
        if note["plan"] != notes[0]["plan"]:
            raise MdlError(
                "source videos changed between this part and the first", part.path, "make the parts again"
            )
    given = Counter(note["part"] for note in notes)
    faults = [f"{i}/{notes[0]['of']} is given {given[i]} times" for i in range(notes[0]["of"]) if given[i] != 1]
    if faults:
        raise MdlError(f"the parts are not complete: {', '.join(faults)}", None, "give every part once")
    return int(notes[0]["clips"])


def _undivided(part: Artifact) -> dict[str, Any]:
    return {name: value for name, value in part.request.items() if name != "part"}


def _rows(part: Artifact, name: str) -> list[Row]:
    return [json.loads(line) for line in part.file(name).read_text().splitlines()]


def _take_over(source: Path, target: Path, sha256: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        if sha256_file(target) != sha256:
            raise MdlError("the part's content differs from its sha256", source, "make that part again") from None
