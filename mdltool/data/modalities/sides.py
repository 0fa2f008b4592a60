"""Which side file belongs to which video: by its path below the source, else by its name alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from mdltool.data.formats.common import relative_name
from mdltool.data.modalities.transcripts import SUBTITLES, TRANSCRIPTS
from mdltool.errors import MdlError
from mdltool.files import digest_of

_SOUNDS = frozenset((".aac", ".aiff", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"))
_CONTAINERS = frozenset((".avi", ".mkv", ".mov", ".mp4", ".webm"))
_SUFFIXES = {
    "audio": _SOUNDS | _CONTAINERS,
    "flow": frozenset((".tar",)),
    "text": TRANSCRIPTS,
    "subtitles": SUBTITLES,
    "features": frozenset((".npy",)),
}


class Sides:
    """The side files of one stream. kind: of the stream, "features", or "subtitles" for those beside the videos.

    Raises MdlError for a folder without any, and for an ambiguous name when that is asked for.
    """

    def __init__(self, path: Path, kind: str, source: Path, option: str) -> None:
        self._source, self._option = source, option
        self._folder = path if path.is_dir() else path.parent
        self._one = None if path.is_dir() else path
        if self._one is not None and (kind != "text" or path.suffix.lower() not in TRANSCRIPTS):
            raise MdlError(f"this is a file, not a folder of {kind} files", path, f"check {option}")
        self._by_path: dict[str, list[Path]] = {}
        self._by_name: dict[str, list[Path]] = {}
        for file in _walk(path, _SUFFIXES[kind], kind == "flow") if self._one is None else ():
            name = file.relative_to(path)
            path_of = (name if file.is_dir() else name.with_suffix("")).as_posix()
            self._by_path.setdefault(path_of, []).append(file)
            self._by_name.setdefault(file.name if file.is_dir() else file.stem, []).append(file)
        if self._one is None and not self._by_path:
            suffixes = ", ".join(sorted(_SUFFIXES[kind]))
            what = f"no {suffixes} file" + (", nor a folder with u and v," if kind == "flow" else "")
            raise MdlError(f"there is {what} in the folder", path, f"check {option}")

    def of(self, video: Path, key: str | None = None) -> Path | None:
        """The file of a video, or of a clip's `key` alone; a video is no side file of its own.

        Raises MdlError where two have its name.
        """
        if self._one is not None:
            return self._one
        name = (
            key if key is not None else PurePosixPath(relative_name(video, self._source)).with_suffix("").as_posix()
        )
        found = self._by_path.get(name) or self._by_name.get(PurePosixPath(name).name, [])
        return only_one([file for file in found if file != video], name, self._option)

    @property
    def digest(self) -> str:
        """Of the files' names and sizes; a folder's date is not in it, so that a copy gives the same shards."""
        own = (file for found in self._by_path.values() for file in found)
        files = [self._one] if self._one is not None else list(own)
        rows = [[file.relative_to(self._folder).as_posix(), _size(file)] for file in files]
        return digest_of(sorted(rows))


def only_one(files: Sequence[Path], name: str, option: str) -> Path | None:
    """The file of a name, if there is one. Raises MdlError for two."""
    if len(files) > 1:
        raise MdlError(
            f"two files may be that of {name}: {files[0]} and {files[1]}",
            option,
            "leave one, or order them in folders as the videos are",
        )
    return files[0] if files else None


def names_of(video: Path, source: Path) -> Sequence[str]:
    """What a transcript of several videos may call this one."""
    name = PurePosixPath(relative_name(video, source)).with_suffix("")
    return (name.as_posix(), name.name)


def _walk(folder: Path, suffixes: Collection[str], folders: bool) -> Iterator[Path]:
    """Files with one of the suffixes; with `folders` also folders that hold u and v, which are not entered."""
    for root, children, files in os.walk(folder, followlinks=True):
        children.sort()
        if folders and {"u", "v"} <= set(children):
            children.clear()
            yield Path(root)
            continue
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):
                yield Path(root, name)


def _size(path: Path) -> int:
    """Bytes of a file; of a folder of flow frames, how many there are."""
    return len(os.listdir(path / "u")) if path.is_dir() else path.stat().st_size
