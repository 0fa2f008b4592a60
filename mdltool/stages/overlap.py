"""`overlap`: source videos that stand in one domain's training list and in another's held-out list.

No artifact: the findings are returned. Clips are compared by their keys, which the index holds; they are read only
where a name may stand for two videos.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any

from mdltool import console
from mdltool.artifact import Artifact
from mdltool.data.formats.common import key_of, same_split
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError

# What tells a source video: (_YOUTUBE, its id), or (its domain, its file's name without extension).
Source = tuple[str, str]

_YOUTUBE = "/youtube"  # no domain's name
_ID = "[A-Za-z0-9_-]{11}"
_CUT = re.compile(rf"({_ID})_\d{{6}}_\d{{6}}")  # Kinetics: the seconds it was cut at
_MOMENT = re.compile(rf"yt-({_ID})_\d+")  # Moments in Time
_BARE = re.compile(rf"(?:v_)?({_ID})")
_SEGMENT = re.compile(r"(?:_\d{8,}_(?:\d{8,}|end))+$")  # what key_of adds
# 64 bits in 11 letters of 6 bits leave two bits of the last one unused.
_LAST = frozenset("AEIMQUYcgkosw048")
_FROM_YOUTUBE = ("kinetics", "activitynet")
# Their files' names are unique in the whole data set; class folders often count 1, 2, 3 in every class and split.
_UNIQUE_NAMES = ("ucf101", "hmdb51", "ssv2", "mit", *_FROM_YOUTUBE)


@dataclass(frozen=True)
class Side:
    """A domain's split."""

    domain: str
    split: str


@dataclass(frozen=True)
class Overlap:
    """What two lists share. videos: YouTube ids, or paths without extension in the training list, sorted.
    train_keys, test_keys: the clips of these videos, sorted."""

    train: Side
    test: Side
    videos: tuple[str, ...]
    train_keys: tuple[str, ...]
    test_keys: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """overlaps: of every two lists that share a video. train, test: (list, its clips) of all that were compared."""

    overlaps: tuple[Overlap, ...]
    train: tuple[tuple[Side, int], ...]
    test: tuple[tuple[Side, int], ...]


def source_of(name: str, domain: str, form: str = "") -> Source:
    """What tells the source video of a file. name: its path. form: the annotation format it was listed by."""
    stem = key_of(PurePosixPath(name).name)
    if form in ("ucf101", "hmdb51", "ssv2"):
        return domain, stem
    found = _CUT.fullmatch(stem) or _MOMENT.fullmatch(stem)
    if found is None and form != "mit":
        found = _BARE.fullmatch(stem)
        if found is not None and form not in _FROM_YOUTUBE and not _looks_random(found[1]):
            found = None
    return (_YOUTUBE, found[1]) if found else (domain, stem)


def _looks_random(text: str) -> bool:
    """Whether 11 letters can be a YouTube id rather than a name: nearly all ids have letters of both cases."""
    return text[-1] in _LAST and bool(re.search("[a-z]", text)) and bool(re.search("[A-Z]", text))


def run(artifacts: Sequence[Artifact]) -> Comparison:
    """Compare every training list with every held-out list. Raises MdlError unless there is one of each."""
    lists = [_List(artifact) for artifact in {artifact.digest: artifact for artifact in artifacts}.values()]
    train = [entry for entry in lists if same_split(entry.side.split, "train")]
    test = [entry for entry in lists if not same_split(entry.side.split, "train")]
    if not train or not test:
        given = ", ".join(f"{entry.side.domain}-{entry.side.split}" for entry in lists) or "none"
        what = "training" if not train else "held-out (val, test)"
        raise MdlError(
            f"no {what} shards are given (given: {given})", None, "mdltool overlap TRAIN VAL [SHARDS ...]"
        )
    found: dict[tuple[Side, Side], list[Overlap]] = defaultdict(list)
    pairs = [(a, b, a.by_source.keys() & b.by_source.keys()) for a in train for b in test]
    with console.progress("check", sum(len(common) for *_, common in pairs), "videos") as advance:
        for a, b, common in pairs:
            overlap = _shared(a, b, common, advance)
            if overlap.videos:
                found[a.side, b.side].append(overlap)
    overlaps = tuple(_joined(parts) for _, parts in sorted(found.items(), key=lambda item: str(item[0])))
    return Comparison(overlaps, _counts(train), _counts(test))


class _List:
    """One artifact's clips by what their keys tell of their source."""

    def __init__(self, artifact: Artifact) -> None:
        self.index = ShardIndex.open(artifact)
        self.side = Side(self.index.domain, self.index.split)
        self.form = str(artifact.request.get("format", ""))
        self.encode = artifact.request.get("encode")
        self.by_source: dict[Source, list[int]] = defaultdict(list)
        for i, key in enumerate(self.index.keys):
            self.by_source[self._guess(key)].append(i)
        self._read: dict[int, _Clip] = {}

    def clip(self, i: int) -> _Clip:
        """What a clip is of. Reads it."""
        if i not in self._read:
            metadata, video = self.index.clip(i)
            self._read[i] = self._described(self.index.keys[i], metadata, video)
        return self._read[i]

    def _guess(self, key: str) -> Source:
        """The source by a key, which is its path and maybe a segment's times. Equal wherever the sources are."""
        return source_of(path_of(key), self.side.domain, self.form)

    def _described(self, key: str, metadata: dict[str, Any], video: bytes) -> _Clip:
        name = metadata.get("source")
        if not isinstance(name, str):
            return _Clip(self._guess(key), None)
        whole = key_of(name) == key
        content = hashlib.sha256(video).hexdigest() if whole else None
        return _Clip(source_of(name, self.side.domain, self.form), content)


@dataclass(frozen=True)
class _Clip:
    """content: sha256 of a whole file as it is stored, None for a segment."""

    source: Source
    content: str | None


def path_of(key: str) -> str:
    """A key's video: the key without a segment's times."""
    return _SEGMENT.sub("", key)


def _shared(a: _List, b: _List, common: Iterable[Source], advance: Callable[..., None]) -> Overlap:
    """What a training list shares with a held-out list. common: the sources that both lists' keys tell of."""
    videos: set[str] = set()
    ours: set[int] = set()
    theirs: set[int] = set()
    certain = a.form in _UNIQUE_NAMES and b.form in _UNIQUE_NAMES
    for source in common:
        for i in a.by_source[source]:
            found = b.by_source[source]
            if source[0] != _YOUTUBE and not certain:
                found = [j for j in found if _same_video(a, i, b, j)]
            if found:
                ours.add(i)
                theirs.update(found)
                videos.add(source[1] if source[0] == _YOUTUBE else path_of(a.index.keys[i]))
        advance()
    train_keys, test_keys = ([e.index.keys[i] for i in sorted(c)] for e, c in ((a, ours), (b, theirs)))
    return Overlap(a.side, b.side, tuple(videos), tuple(train_keys), tuple(test_keys))


def _same_video(a: _List, i: int, b: _List, j: int) -> bool:
    """Whether two files of one name are one video: stored in the same way, a file has the same bytes in both lists.

    Segments, and clips stored in different ways, go by the name alone.
    """
    ours, theirs = a.clip(i), b.clip(j)
    if ours.source != theirs.source:
        return False
    comparable = a.encode is not None and a.encode == b.encode
    return not comparable or ours.content is None or theirs.content is None or ours.content == theirs.content


def _joined(parts: Sequence[Overlap]) -> Overlap:
    """The findings of divided shards as one, sorted."""
    videos, train_keys, test_keys = (
        tuple(sorted({name for part in parts for name in names(part)}))
        for names in (attrgetter("videos"), attrgetter("train_keys"), attrgetter("test_keys"))
    )
    return Overlap(parts[0].train, parts[0].test, videos, train_keys, test_keys)


def _counts(lists: Iterable[_List]) -> tuple[tuple[Side, int], ...]:
    clips: dict[Side, int] = defaultdict(int)
    for entry in lists:
        clips[entry.side] += len(entry.index)
    return tuple(clips.items())
