"""Reading shards: where each clip lies, and its bytes by one range read.

No torch here: planning and inspection read indices too. Nothing is unpickled and nothing is written.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdltool.artifact import Artifact
from mdltool.errors import MdlError

_META = "json"


class ShardIndex:
    """The clips of a shards artifact. Picklable; opens files when it reads.

    domain, split, task: str. classes: names in label order. keys: [M]. labels, shard_of: int64 [M].
    """

    def __init__(self, folder: Path, digest: str, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.digest = digest
        self.domain: str = content["domain"]
        self.split: str = content["split"]
        self.task: str = content["task"]
        self.classes: tuple[str, ...] = tuple(content["classes"])
        self.files: list[str] = [shard["file"] for shard in content["shards"]]
        members = [(i, member) for i, shard in enumerate(content["shards"]) for member in shard["members"]]
        self.keys: list[str] = [member["key"] for _, member in members]
        self.labels = np.array([member["label"] for _, member in members], dtype=np.int64)
        self.shard_of = np.array([i for i, _ in members], dtype=np.int64)
        self.offsets = np.array([member["offset"] for _, member in members], dtype=np.int64)
        self.sizes = np.array([member["size"] for _, member in members], dtype=np.int64)

    @classmethod
    def open(cls, artifact: Artifact) -> ShardIndex:
        """Read and check an artifact's index. Raises MdlError when it does not describe the files beside it."""
        if artifact.kind != "shards":
            raise MdlError(f"this is a {artifact.kind} artifact, not shards", artifact.path, "give shards")
        content = artifact.load_json("index.json")
        try:
            index = cls(artifact.path, artifact.digest, content)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(artifact.path, f"index.json lacks or garbles {error}") from None
        for number, file in enumerate(index.files):
            size = artifact.file(file).stat().st_size
            own = index.shard_of == number
            ends = index.offsets[own] + index.sizes[own]
            if own.any() and (ends.max() > size or index.offsets[own].min() < 0 or index.sizes[own].min() <= 0):
                raise _damaged(artifact.path, f"index.json points outside {file}")
        if len(index) and not (index.labels.min() >= 0 and index.labels.max() < len(index.classes)):
            raise _damaged(artifact.path, "a label is outside the class list")
        if len(set(index.keys)) != len(index.keys):
            raise _damaged(artifact.path, "two clips have the same key")
        return index

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> dict[str, bytes]:
        """A clip's members: extension -> bytes. Raises MdlError when they are not what the index says."""
        path = self.folder / self.files[self.shard_of[i]]
        data = _read_range(path, int(self.offsets[i]), int(self.sizes[i]))
        members: dict[str, bytes] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    stem, _, extension = member.name.rpartition(".")
                    handle = tar.extractfile(member)
                    if stem != self.keys[i] or handle is None:
                        raise _damaged(path, f"'{member.name}' lies where the clip '{self.keys[i]}' should")
                    members[extension] = handle.read()
        except tarfile.TarError as error:
            raise _damaged(path, f"the clip '{self.keys[i]}' cannot be read ({error})") from None
        return members

    def clip(self, i: int) -> tuple[dict[str, Any], bytes]:
        """(metadata, bytes of the video file) of a clip."""
        members = self.read(i)
        try:
            metadata = json.loads(members.pop(_META))
            (video,) = members.values()
        except (KeyError, ValueError):
            raise _damaged(self.folder, f"the clip '{self.keys[i]}' is not one video and one JSON") from None
        if metadata.get("key") != self.keys[i]:
            raise _damaged(self.folder, f"the metadata of '{self.keys[i]}' belongs to '{metadata.get('key')}'")
        return metadata, video


def _read_range(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a shard. Remote shards come here too, once they do."""
    with open(path, "rb", buffering=0) as handle:
        handle.seek(offset)
        data = handle.read(size)
    if len(data) != size:
        raise _damaged(path, "the file ends too early")
    return data


def _damaged(where: Path, what: str) -> MdlError:
    return MdlError(f"these shards are damaged: {what}", where, "mdltool inspect --verify, then make them again")
