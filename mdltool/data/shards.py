"""Writing shards: which clip goes where, tar bytes that depend on the clips only, and resuming.

Reading is in index.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdltool.data.encode import Prepared
from mdltool.data.formats.common import clip_name
from mdltool.data.tar import ReadFault, TarWriter
from mdltool.data.workers import Failed
from mdltool.files import write_text
from mdltool.types import Clip, Label, LabelSpace

SHARD_PREFIX = "shard-"


@dataclass(frozen=True)
class SourceFile:
    """What tells a changed source file from an unchanged one."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class PlannedShard:
    """The clips of one shard, in order, with the state of their files."""

    number: int
    clips: tuple[Clip, ...]
    sources: tuple[SourceFile, ...]

    @property
    def file(self) -> str:
        return f"{SHARD_PREFIX}{self.number:06d}.tar"

    @property
    def record_file(self) -> str:
        """Beside a finished shard until the artifact is whole."""
        return self.file + ".done.json"


@dataclass(frozen=True)
class Member:
    """A clip in a shard. offset, size: bytes of all its members in the tar, headers included. raw: bytes at the end
    of these in which raw streams lie."""

    key: str
    offset: int
    size: int
    label: Label
    raw: int = 0

    def as_index(self) -> dict[str, Any]:
        """Its entry in index.json, which says nothing of raw streams where there are none."""
        entry = asdict(self)
        return entry if self.raw else {name: value for name, value in entry.items() if name != "raw"}


@dataclass(frozen=True)
class StreamCount:
    """How many clips of a shard have a stream, how many lack it, and one of these with its reason."""

    clips: int = 0
    lacking: int = 0
    example: str = ""

    def __add__(self, other: StreamCount) -> StreamCount:
        example = self.example or other.example
        return StreamCount(self.clips + other.clips, self.lacking + other.lacking, example)


@dataclass(frozen=True)
class Unusable:
    """A clip that is not in the shards. video: its path relative to the source."""

    key: str
    video: str
    label: Label
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard. bytes is 0 and there is no file where none of its clips can be used. streams: by name."""

    file: str
    bytes: int
    sha256: str
    members: tuple[Member, ...]
    unusable: tuple[Unusable, ...]
    streams: dict[str, StreamCount] = field(default_factory=dict)

    def as_index(self) -> dict[str, Any]:
        """Its entry in index.json."""
        members = [member.as_index() for member in self.members]
        return {
            "file": self.file,
            "clips": len(members),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "members": members,
        }


@dataclass(frozen=True)
class Naming:
    """What the metadata say of all clips. source: the folder that a video's path is relative to. marks: what
    index.json says of groups of clips, as Listing has it.
    """

    domain: str
    split: str
    space: LabelSpace
    source: Path
    marks: Mapping[str, Any] = field(default_factory=dict)

    def as_index(self) -> dict[str, Any]:
        """What begins index.json."""
        return {
            "domain": self.domain,
            "split": self.split,
            **self.space.as_json(),
            **self.marks,
        }

    def metadata(self, clip: Clip) -> dict[str, Any]:
        return {
            "key": clip.key,
            "domain": self.domain,
            "split": self.split,
            "label": clip.label,
            **self._class_names(clip.label),
            "source": self.video(clip),
        }

    def _class_names(self, label: Label) -> dict[str, Any]:
        space = self.space
        if isinstance(label, int):
            return {"class": space.classes[label]}
        if space.task == "multi_label":
            return {"class": [space.classes[int(number)] for number in label]}
        if space.task == "verb_noun":
            verb, noun = map(int, label)
            return {"verb": space.classes[verb], "noun": space.classes[space.verbs + noun]}
        return {}  # a value is of no class; the index names the targets

    def unusable(self, clip: Clip, reason: str) -> Unusable:
        return Unusable(clip.key, self.video(clip), clip.label, reason)

    def video(self, clip: Clip) -> str:
        return clip_name(clip, self.source)


def plan(clips: Sequence[Clip], shard_bytes: int) -> list[PlannedShard]:
    """Cut the clips into shards of about `shard_bytes` of source files.

    Depends on the clips and the sizes of their files only: not on encoding results, workers or parts. The order is
    by sha256 of the key, which mixes the classes. A file's size is divided among its segments.
    """
    ordered = sorted(clips, key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
    uses = Counter(clip.video for clip in clips)
    sources: dict[Path, SourceFile] = {}
    groups: list[list[Clip]] = [[]]
    filled = 0
    for clip in ordered:
        if clip.video not in sources:
            status = os.stat(clip.video)
            sources[clip.video] = SourceFile(status.st_size, status.st_mtime_ns)
        size = sources[clip.video].size // uses[clip.video]
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(clip)
        filled += size
    return [
        PlannedShard(number, tuple(group), tuple(sources[clip.video] for clip in group))
        for number, group in enumerate(filter(None, groups))
    ]


def write_shard(
    folder: Path, shard: PlannedShard, outcomes: Iterable[Prepared | Failed], naming: Naming
) -> ShardRecord:
    """Write one shard and then its record, which makes it finished. outcomes: of its clips, in their order.

    Raises OSError when the shard cannot be written; a source that cannot be read is an unusable clip.
    """
    temporary = folder / (shard.file + ".tmp")
    tar = TarWriter(temporary)
    members, unusable = [], []
    streams: dict[str, StreamCount] = {}
    try:
        for clip, source, outcome in zip(shard.clips, shard.sources, outcomes, strict=True):
            offset = tar.size
            stored = outcome if isinstance(outcome, Failed) else _store(tar, clip, source, outcome, naming)
            if isinstance(stored, Failed):
                unusable.append(naming.unusable(clip, stored.reason))
                continue
            members.append(Member(clip.key, offset, tar.size - offset, clip.label, stored))
            for stream in outcome.streams if isinstance(outcome, Prepared) else ():
                count = StreamCount(1) if stream.tokens else StreamCount(0, 1, f"{clip.key}: {stream.missing}")
                streams[stream.name] = streams.get(stream.name, StreamCount()) + count
        tar.close()
    finally:
        tar.abandon()
    if members:
        os.replace(temporary, folder / shard.file)
    else:
        temporary.unlink()
    size, sha256 = (tar.size, tar.sha256) if members else (0, "")
    record = ShardRecord(shard.file, size, sha256, tuple(members), tuple(unusable), streams)
    write_record(folder, shard, record)
    return record


def _store(tar: TarWriter, clip: Clip, source: SourceFile, prepared: Prepared, naming: Naming) -> Failed | int:
    """Append a clip's members, its raw streams last; returns their bytes.

    On failure to read its video nothing is appended.
    """
    extension = prepared.path.suffix.lower() or ".bin"
    metadata = {**naming.metadata(clip), **prepared.meta}
    if prepared.streams:
        metadata["streams"] = {stream.name: stream.meta for stream in prepared.streams}
    try:
        video = open(prepared.path, "rb", buffering=0)  # noqa: SIM115 - closed by the with below
    except OSError as error:
        return Failed(f"the file cannot be read ({error.strerror})")
    with video:
        size = os.fstat(video.fileno()).st_size
        if not prepared.temporary and size != source.size:
            return Failed("the file changed while it was being read")
        try:
            with tar.whole():
                tar.add_file(clip.key + extension, video, size)
                tar.add(clip.key + ".json", json.dumps(metadata).encode())
                for stream in prepared.streams:
                    for name, content in stream.members.items():
                        tar.add(f"{clip.key}.{name}", content)
                before_raw = tar.size
                for name, content in (stream.raw for stream in prepared.streams if stream.raw is not None):
                    tar.add(f"{clip.key}.{name}", content)
                raw = tar.size - before_raw
        except ReadFault as fault:
            return Failed(str(fault))
    if prepared.temporary:
        prepared.path.unlink()
    return raw


def write_record(folder: Path, shard: PlannedShard, record: ShardRecord) -> None:
    """Note beside a shard that it is finished, and from which files."""
    content = {"sources": _sources(shard), **asdict(record)}
    write_text(folder / shard.record_file, json.dumps(content))


def read_record(folder: Path, shard: PlannedShard) -> ShardRecord | None:
    """The record of a shard that an earlier run finished, or None when it is to be made (again)."""
    try:
        content = json.loads((folder / shard.record_file).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if content.pop("sources") != _sources(shard):
        return None
    record = ShardRecord(
        content["file"],
        content["bytes"],
        content["sha256"],
        tuple(Member(**member) for member in content["members"]),
        tuple(Unusable(**clip) for clip in content["unusable"]),
        {name: StreamCount(**count) for name, count in content.get("streams", {}).items()},
    )
    path = folder / shard.file
    there = path.stat().st_size if path.is_file() else 0
    return record if there == record.bytes else None


def _sources(shard: PlannedShard) -> list[list[Any]]:
    return [[c.key, s.size, s.mtime_ns] for c, s in zip(shard.clips, shard.sources, strict=True)]
