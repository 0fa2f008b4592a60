"""Reading shards, here or at an address: where each clip lies, and its bytes by one range read.

No torch here: planning and inspection read indices too. Nothing is unpickled and nothing is written.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdltool.artifact import Artifact
from mdltool.errors import MdlError
from mdltool.remote import Url, read_range
from mdltool.types import STREAM_KINDS, LabelSpace, StreamInfo

_META = "json"
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class ShardIndex:
    """The clips of a shards artifact, in the order of their shards. Picklable; opens files when it reads.

    domain, split: str. space: the task and its classes. files: the shards' names. keys: [M]. labels: int64 [M] of
    single_label; int64 [M, 2] of verb_noun; float32 [M, N] of the others: 0 or 1 for each class, or each target's
    value. shard_of (position in files), offsets, sizes (bytes, tar headers included): int64 [M]. raw_sizes: int64
    [M], the last bytes of `sizes`, in which the raw streams lie. streams: by name, in the order of the recipe.
    subsets, participants: name -> keys, as Listing has them.
    digest: the artifact's. lengths: bytes of each shard.
    """

    def __init__(self, folder: Path | Url, digest: str, content: dict[str, Any]) -> None:
        self.folder = folder
        self.digest = digest
        self.domain = _typed(content, "domain", str)
        self.split = _typed(content, "split", str)
        self.space = _space(content)
        shards = _typed(content, "shards", list)
        self.files = [_typed(shard, "file", str) for shard in shards]
        members = [(i, member) for i, shard in enumerate(shards) for member in _typed(shard, "members", list)]
        self.keys = [_typed(member, "key", str) for _, member in members]
        self.shard_of = np.array([i for i, _ in members], dtype=np.int64)
        self.offsets, self.sizes = (
            np.array([_typed(member, name, int) for _, member in members], dtype=np.int64)
            for name in ("offset", "size")
        )
        self.raw_sizes = np.array([_raw_size(member) for _, member in members], dtype=np.int64)
        self.streams = {name: _stream(entry) for name, entry in _optional(content, "streams", dict).items()}
        self.subsets = _groups(content, "subsets")
        self.participants = _groups(content, "participants")
        self.lengths: list[int] = []
        self.labels = _labels(self.space, [member for _, member in members])

    @classmethod
    def open(cls, artifact: Artifact) -> ShardIndex:
        """Read and check an artifact's index. Raises MdlError when it does not describe the files beside it."""
        if artifact.kind != "shards":
            raise MdlError(f"this is a {artifact.kind} artifact, not shards", artifact.path, "give shards")
        try:
            index = cls(artifact.path, artifact.digest, artifact.load_json("index.json"))
            index.lengths = [artifact.size(file) for file in index.files]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _damaged(artifact.path, f"index.json: {error.args[0]}") from None
        index._check_ranges()
        if len(set(index.keys)) != len(index.keys):
            raise _damaged(artifact.path, "two clips have the same key")
        return index

    @property
    def task(self) -> str:
        return self.space.task

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order, as LabelSpace has them."""
        return self.space.classes

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> ShardIndex:
        """Some of the clips only. rows: int64, their positions, in the order that the clips are to have."""
        found = copy.copy(self)
        found.keys = [self.keys[row] for row in rows]
        for name in ("labels", "shard_of", "offsets", "sizes", "raw_sizes"):
            setattr(found, name, getattr(self, name)[rows])
        return found

    def of_classes(self, numbers: np.ndarray) -> ShardIndex:
        """The clips of some classes of single_label, which are numbered anew. numbers: int64, the classes' own."""
        found = self.take(np.flatnonzero(np.isin(self.labels, numbers)))
        found.space = dataclasses.replace(self.space, classes=tuple(self.classes[number] for number in numbers))
        renumbered = np.full(len(self.classes), -1, dtype=np.int64)
        renumbered[numbers] = np.arange(len(numbers))
        found.labels = renumbered[found.labels]
        return found

    def read(self, i: int, *, raw: bool = False) -> dict[str, bytes]:
        """A clip's members: extension -> bytes, without the raw streams unless `raw`.

        Raises MdlError when they are not what the index says.
        """
        shard, offset, size = (int(column[i]) for column in (self.shard_of, self.offsets, self.sizes))
        size -= 0 if raw else int(self.raw_sizes[i])
        path = self.folder / self.files[shard]
        if isinstance(path, Url):
            data = read_range(path, offset, size, self.lengths[shard])
        else:
            data = _read_range(path, offset, size)
        members: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    extension = member.name.removeprefix(f"{self.keys[i]}.")
                    if extension == member.name or not member.isreg() or member.issparse():
                        raise _damaged(path, f"'{member.name}' lies where the clip '{self.keys[i]}' should")
                    members[extension] = data[member.offset_data : member.offset_data + member.size]
                    if len(members[extension]) != member.size:
                        raise _damaged(path, f"'{member.name}' ends too early")
        except tarfile.TarError as error:
            raise _damaged(path, f"the clip '{self.keys[i]}' cannot be read ({error})") from None
        return members

    def clip(self, i: int) -> tuple[dict[str, Any], bytes]:
        """(metadata, bytes of the video file) of a clip."""
        metadata, video, _ = self.clip_and_streams(i, {})
        return metadata, video

    def clip_and_streams(
        self, i: int, widths: Mapping[str, int]
    ) -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
        """As `clip`, and the clip's streams: float32 [M, D], M = 0 where it has no tokens. widths: name -> D."""
        members = self.read(i)
        videos = [name for name in members if name != _META and "." not in name]
        try:
            metadata = json.loads(members[_META])
            (video,) = (members[name] for name in videos)
        except (KeyError, ValueError):
            raise _damaged(self.folder, f"the clip '{self.keys[i]}' is not one video and one JSON") from None
        if not isinstance(metadata, dict) or metadata.get("key") != self.keys[i]:
            raise _damaged(self.folder, f"the metadata of '{self.keys[i]}' belongs to another clip")
        streams = {name: self._stream(i, members, name, width) for name, width in widths.items()}
        return metadata, video, streams

    def _stream(self, i: int, members: Mapping[str, bytes], name: str, width: int) -> np.ndarray:
        content = members.get(f"{name}.npy")
        if content is None:
            return np.zeros((0, width), np.float32)
        try:
            tokens = _tokens(content, width)
        except ValueError as error:
            raise _damaged(self.folder, f"the stream '{name}' of '{self.keys[i]}' is {error}") from None
        if not np.isfinite(tokens).all():
            raise _damaged(self.folder, f"the stream '{name}' of '{self.keys[i]}' holds values that are not finite")
        return tokens.astype(np.float32)

    def _check_ranges(self) -> None:
        # Compared without adding, which could overflow for the numbers of a hostile index.
        lengths = np.array(self.lengths, dtype=np.int64)[self.shard_of]
        offsets, sizes = self.offsets, self.sizes
        outside = (offsets < 0) | (offsets > lengths) | (sizes <= 0) | (sizes > lengths - offsets)
        outside |= (self.raw_sizes < 0) | (self.raw_sizes >= sizes)
        if outside.any():
            path = self.folder / self.files[self.shard_of[outside.argmax()]]
            raise _damaged(path, "index.json points outside this file")


def _groups(content: dict[str, Any], name: str) -> dict[str, frozenset[str]]:
    """Groups of clips by their names, where there are any."""
    given = _optional(content, name, dict)
    return {str(group): frozenset(map(str, _typed(given, group, list))) for group in given}


def _space(content: dict[str, Any]) -> LabelSpace:
    """ShardIndex.space. Raises KeyError, TypeError or ValueError where it is not what LabelSpace says."""
    for name, kind in (("task", str), ("classes", list)):
        _typed(content, name, kind)
    if content["task"] == "verb_noun":
        verbs, nouns = _typed(content, "verbs", int), len(content["classes"]) - content["verbs"]
        pairs = [tuple(_pair(pair, verbs, nouns)) for pair in _typed(content, "actions", list)]
        if not pairs or pairs != sorted(set(pairs)):
            raise ValueError("'actions' has not each valid pair once and in order")
    return LabelSpace.from_json(content)


def _pair(given: Any, verbs: int, nouns: int) -> list[int]:
    """The numbers of a verb and a noun."""
    if not isinstance(given, list) or [type(number) for number in given] != [int, int]:
        raise TypeError(f"{given!r:.40} is no pair of a verb's and a noun's number")
    if not (0 <= given[0] < verbs and 0 <= given[1] < nouns):
        raise ValueError(f"the pair {given} is outside the class list")
    return given


def _labels(space: LabelSpace, members: Sequence[Any]) -> np.ndarray:
    """ShardIndex.labels. Raises KeyError, TypeError or ValueError for bad ones."""
    task, count = space.task, len(space.classes)
    if task == "single_label":
        labels = np.array([_typed(member, "label", int) for member in members], dtype=np.int64)
        _check_classes(labels, count)
    elif task == "multi_label":
        labels = np.zeros((len(members), count), np.float32)
        for row, member in zip(labels, members, strict=True):
            row[_class_numbers(member, count)] = 1
    elif task == "verb_noun":
        given = [_pair(_typed(member, "label", list), space.verbs, count - space.verbs) for member in members]
        labels = np.array(given, dtype=np.int64).reshape(-1, 2)
    elif task == "regression":
        labels = np.empty((len(members), count), np.float32)
        for row, member in zip(labels, members, strict=True):
            row[:] = _values(member, count)
    else:
        raise ValueError(f"there is no task '{task:.40}'")
    return labels


def _check_classes(labels: np.ndarray, count: int) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < count):
        raise ValueError("a label is outside the class list")


def _class_numbers(member: Any, count: int) -> np.ndarray:
    """int64, a clip's classes."""
    given = _typed(member, "label", list)
    if any(type(number) is not int for number in given):
        raise TypeError(f"'label' is {given!r:.40}, not a list of class numbers")
    numbers = np.array(given, dtype=np.int64)
    _check_classes(numbers, count)
    if not (numbers[1:] > numbers[:-1]).all():
        raise ValueError(f"'label' is {given!r:.40}, not each class once and in order")
    return numbers


def _values(member: Any, count: int) -> list[float]:
    """A clip's values, one for each target, that float32 can hold."""
    given = _typed(member, "label", list)
    if len(given) != count:
        raise ValueError(f"'label' has {len(given)} values for {count} targets")
    if not all(type(value) in (int, float) and abs(value) <= _FLOAT32_MAX for value in given):
        raise ValueError(f"'label' is {given!r:.40}, not a list of numbers")
    return given


def _stream(entry: Any) -> StreamInfo:
    """A stream's entry in index.json. Raises KeyError, TypeError or ValueError for a bad one."""
    kind, extractor, version = (_typed(entry, name, str) for name in ("kind", "extractor", "version"))
    width, clips = _typed(entry, "width", int), _typed(entry, "clips", int)
    if kind not in STREAM_KINDS or width < 1:
        raise ValueError(f"there is no stream of the kind '{kind:.40}' and width {width}")
    return StreamInfo(kind, width, extractor, _typed(entry, "options", dict), version, clips)


def _tokens(content: bytes, width: int) -> np.ndarray:
    """[M, D] of a .npy file; its header is believed only so far as the bytes bear it out. Raises ValueError."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file)
    except Exception:  # the header is parsed as Python, whose parsers fail in many ways
        raise ValueError("no array") from None
    if len(shape) != 2 or shape[1] != width or dtype not in (np.float16, np.float32):
        raise ValueError(f"{dtype} {list(shape)}, not float16 or float32 [M, {width}]")
    if by_columns or shape[0] * width * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"not the rows of {list(shape)} that it says")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(-1, width)


def _raw_size(member: Any) -> int:
    return int(_typed(member, "raw", int)) if "raw" in member else 0


def _optional(entry: Any, name: str, kind: type) -> Any:
    """entry[name], an empty one where it is missing. Raises TypeError where it is of another type."""
    return _typed(entry, name, kind) if name in entry else kind()


def _typed(entry: Any, name: str, kind: type) -> Any:
    """entry[name]. Raises KeyError or TypeError where it is missing or of another type."""
    if not isinstance(entry, dict) or name not in entry:
        raise KeyError(f"'{name}' is missing")
    if type(entry[name]) is not kind:
        raise TypeError(f"'{name}' is {entry[name]!r:.40}, not {kind.__name__}")
    return entry[name]


def _read_range(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a shard on this machine."""
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            data = handle.read(size)
    except OSError as error:
        raise MdlError(f"a shard cannot be read ({error.strerror})", path, "check the disk and the path") from None
    if len(data) != size:
        raise _damaged(path, "the file ends too early")
    return data


def _damaged(where: Path | Url, what: str) -> MdlError:
    return MdlError(f"these shards are damaged: {what}", where, "mdltool inspect --verify, then make them again")
