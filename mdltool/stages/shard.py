"""`shard`: videos and annotations -> shards artifact; and the parts of one, made apart, into the whole."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact, Draft, begin
from mdltool.data.dataset import Dataset
from mdltool.data.encode import Job, Prepared, prepare
from mdltool.data.formats.common import clip_name, nothing_there
from mdltool.data.modalities.clip import TORCH_KINDS, prepare_with_streams
from mdltool.data.modalities.plan import Streams, index_entry
from mdltool.data.shard_builder import (
    CLIP_LIMIT_S,
    Builder,
    Effort,
    Writing,
    own_names,
    refuse_too_many_bad,
    remove_strays,
)
from mdltool.data.shards import SHARD_PREFIX, Naming, PlannedShard, ShardRecord, StreamCount, Unusable, plan
from mdltool.data.workers import Pool
from mdltool.errors import MdlError
from mdltool.files import digest_of, sha256_file, write_text
from mdltool.types import Clip, Listing

__all__ = ["CLIP_LIMIT_S", "Dataset", "Effort", "Writing", "default_name", "merge", "outlook", "run"]

_PART = "part.json"
INDEX, QUARANTINE, MISSING = "index.json", "quarantine.jsonl", "missing.jsonl"

Row = dict[str, Any]


def default_name(dataset: Dataset, part: tuple[int, int] | None) -> str:
    """The artifact's name in the work directory."""
    suffix = "" if part is None else f"-part{part[0]}of{part[1]}"
    return f"{dataset.domain}-{dataset.split}{suffix}"


def outlook(dataset: Dataset, writing: Writing) -> dict[str, Any]:
    """What `run` would write: counts, notes, and each shard's clips and bytes of source files."""
    listing = _listed(dataset, writing)
    shards = _share(plan(listing.clips, writing.shard_bytes), writing.part)
    streams = _streams(dataset, listing, writing)
    about = {plan.name: index_entry(plan.info) for plan in streams.plans} if streams else {}
    return {
        "domain": dataset.domain,
        "split": dataset.split,
        **listing.space.as_json(),
        "clips": len(listing.clips),
        "missing": len(listing.missing),
        "excluded": listing.excluded,
        "notes": [*listing.notes, *(streams.note(listing.clips) if streams else ())],
        **({"streams": about} if about else {}),
        "rows": _rows_of(listing, dataset),
        "shards": [
            {"file": s.file, "clips": len(s.clips), "source_bytes": sum(f.size for f in s.sources)} for s in shards
        ],
    }


def _rows_of(listing: Listing, dataset: Dataset) -> list[Row]:
    """Every clip as its metadata would begin, with its segment; there: whether its video is."""
    naming = Naming(dataset.domain, dataset.split, listing.space, dataset.source)
    order = sorted([*((c, True) for c in listing.clips), *((c, False) for c in listing.absent)], key=_key_first)
    return [
        {**naming.metadata(clip), "start_s": clip.start_s, "end_s": clip.end_s, "there": there}
        for clip, there in order
    ]


def _key_first(row: tuple[Clip, bool]) -> str:
    return row[0].key


def run(dataset: Dataset, out: Path, writing: Writing = Writing(), effort: Effort = Effort()) -> Artifact:
    """Write the shards, or the share of them that `writing.part` names, and return the artifact.

    An interrupted run is continued: finished shards are kept, clips that failed are tried again. Raises MdlError
    for what is wrong with the annotations or side files, when more than `effort.max_bad` of the clips cannot be
    used, and when no clip has one of the streams, which nothing but another request mends.
    """
    pool = _pool(writing, effort)  # it starts while the annotations are read
    listing = _listed(dataset, writing)
    if not listing.clips:
        raise nothing_there(listing.missing, dataset.source)
    streams = _streams(dataset, listing, writing)
    notes = [*listing.notes, *(streams.note(listing.clips) if streams else ())]
    console.say(f"{dataset.format}: {'; '.join(notes)}")
    planned = plan(listing.clips, writing.shard_bytes)
    request = _request(dataset, listing, writing, streams)
    draft = begin(out, kind="shards", stage="shard", inputs=(), request=request, resume="auto")
    if isinstance(draft, Artifact):
        return draft
    naming = Naming(dataset.domain, dataset.split, listing.space, dataset.source, listing.marks)
    try:
        shards = _share(planned, writing.part)
        with pool:
            clips = len(listing.clips)
            records = Builder(draft.path, pool, naming, writing, effort, shards, clips, streams).build()
        if writing.part is not None:
            _write_part(draft.path, writing.part, planned)
        missing = [{"key": key, "reason": reason} for key, reason in sorted(listing.missing)]
        unusable = [asdict(clip) for record in records for clip in record.unusable]
        entries = [record.as_index() for record in records if record.members]
        header = naming.as_index() | _stream_entries(streams, records, whole=writing.part is None)
        return _commit(draft, header, entries, unusable, missing, listing.excluded)
    except _NoStream:
        draft.abandon()
        raise
    except BaseException:
        # Without a finished shard there is nothing to continue, and what mends a fault may change the request.
        draft.abandon(keep=any(draft.path.glob(f"{SHARD_PREFIX}*.tar")))
        raise


class _NoStream(MdlError):
    """No clip has a stream that was asked for."""


def _pool(writing: Writing, effort: Effort) -> Pool[Job, Prepared]:
    if not writing.streams:
        return Pool(prepare, effort.workers, attrgetter("limit_s"))
    extracted = [asked.kind for asked in writing.streams if asked.features is None]
    preload = ("torch",) if set(extracted) & set(TORCH_KINDS) else ()
    return Pool(prepare_with_streams, effort.workers, attrgetter("limit_s"), preload)


def _streams(dataset: Dataset, listing: Listing, writing: Writing) -> Streams | None:
    return Streams(writing.streams, listing.clips, dataset.source, listing.sides) if writing.streams else None


def _stream_entries(streams: Streams | None, records: Sequence[ShardRecord], whole: bool) -> Row:
    """{"streams": ...} of index.json, nothing where there are none; says how many clips have each."""
    if streams is None:
        return {}
    entries: Row = {}
    for planned in streams.plans:
        count = sum((record.streams.get(planned.name, StreamCount()) for record in records), StreamCount())
        lacking = f", {count.lacking} lack it, e.g. {count.example}" if count.lacking else ""
        console.say(f"{planned.name}: {count.clips} clips have it{lacking}")
        entries[planned.name] = {**index_entry(planned.info), "clips": count.clips}
        if whole:
            _refuse_empty_stream(planned.name, count)
    return {"streams": entries}


def _refuse_empty_stream(name: str, count: StreamCount) -> None:
    if count.lacking and not count.clips:
        raise _NoStream(
            f"no clip has the stream '{name}'" + (f", e.g. {count.example}" if count.example else ""),
            f"--modality {name}",
            f"leave it out, or say where it is (--side {name}=...)",
        )


def _listed(dataset: Dataset, writing: Writing) -> Listing:
    """The clips. Raises MdlError where they cannot all be stored as the encoding says."""
    listing = dataset.read(writing.exclude)
    images = sum(clip.is_image for clip in listing.clips)
    if images and writing.encoding.mode == "h264":
        raise MdlError(
            f"{images} of the clips are images, which are not stored as h264", "--encode", "copy or jpeg"
        )
    return listing


def _request(dataset: Dataset, listing: Listing, writing: Writing, streams: Streams | None) -> dict[str, Any]:
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
    if listing.verbs or listing.marks:
        request["marks"] = digest_of([listing.verbs, listing.actions, listing.marks])
    if listing.excluded:  # which clips is in the listing
        request["excluded"] = listing.excluded
    if streams is not None:
        request["streams"] = streams.request()
    if writing.part is not None:
        request["part"] = list(writing.part)
    return request


def _share(planned: Sequence[PlannedShard], part: tuple[int, int] | None) -> list[PlannedShard]:
    return list(planned) if part is None else list(planned[part[0] :: part[1]])


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
    if "streams" in header:
        summary["streams"] = {name: entry["clips"] for name, entry in header["streams"].items()}
    known = {shard["file"]: (shard["bytes"], shard["sha256"]) for shard in shards}
    return draft.commit(summary, known=known, drop=own_names(draft.path) - set(known))


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def merge(parts: Sequence[Artifact], out: Path | None, work: Path, max_bad: float) -> Artifact:
    """Join the parts of one set of shards; the artifact is the one that an undivided run makes, digest and all.

    out: default the undivided run's. Shard files are linked where the file system allows it, else copied. Raises
    MdlError when the parts are not all of one set, and when more than `max_bad` of all clips cannot be used.
    """
    total = _check_parts(parts)
    indices = [part.load_json(INDEX) for part in parts]
    apart = ("clips", "quarantined", "shards", "streams")
    header = {name: value for name, value in indices[0].items() if name not in apart}
    header |= _joined_streams(indices)
    request = _undivided(parts[0])
    unusable = [row for part in parts for row in _rows(part, QUARANTINE)]
    refuse_too_many_bad([Unusable(**row) for row in unusable], total, max_bad)
    out = out or work / "shards" / f"{header['domain']}-{header['split']}"
    draft = begin(out, kind="shards", stage="shard", inputs=(), request=request, resume="auto")
    if isinstance(draft, Artifact):
        return draft
    try:
        remove_strays(draft.path, set())
        for part, index in zip(parts, indices, strict=True):
            for shard in index["shards"]:
                _take_over(part.file(shard["file"]), draft.path / shard["file"], shard["sha256"])
        shards = [shard for index in indices for shard in index["shards"]]
        missing = _rows(parts[0], MISSING)
        return _commit(draft, header, shards, unusable, missing, request.get("excluded", 0))
    except BaseException:
        draft.abandon(keep=True)
        raise


def _joined_streams(indices: Sequence[Mapping[str, Any]]) -> Row:
    """As `_stream_entries`, of all parts together."""
    entries = {name: dict(entry) for name, entry in indices[0].get("streams", {}).items()}
    clips = sum(index["clips"] for index in indices)
    for name, entry in entries.items():
        entry["clips"] = sum(index["streams"][name]["clips"] for index in indices)
        _refuse_empty_stream(name, StreamCount(entry["clips"], clips - entry["clips"]))
    return {"streams": entries} if entries else {}


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
