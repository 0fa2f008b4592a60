"""Listed clips on their way to a Listing: each finds its video among the files, or is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mdltool.data.formats.common import choose_video, finished, key_of, label_of, relative_name, videos_by_stem
from mdltool.types import Clip, Listing

Span = tuple[float | None, float | None]


class Gathering:
    """videos: file name without extension -> the videos of that name below `folder` (default: the source)."""

    def __init__(self, source: Path, classes: Sequence[str], folder: Path | None = None) -> None:
        self._source = source
        self._classes = tuple(classes)
        self.index = {name: i for i, name in enumerate(classes)}
        self.videos = videos_by_stem(folder or source)
        self._clips: list[Clip] = []
        self._missing: list[tuple[str, str]] = []

    def take(
        self,
        candidates: Sequence[Path] | None,
        class_name: str,
        where: str,
        absent: tuple[str, str],
        span: Span = (None, None),
        folder: str | None = None,
    ) -> None:
        """Add a clip: of its candidates the one in `folder` (default: the class's), else what is `absent`.

        absent: (key, reason). span: start and end in seconds. Raises MdlError for a class that is not listed.
        """
        label = label_of(class_name, self.index, where)
        if candidates:
            video = choose_video(candidates, folder or class_name)
            self._clips.append(Clip(key_of(relative_name(video, self._source), *span), video, label, *span))
        else:
            self._missing.append(absent)

    def listing(self, notes: Sequence[str], where: Path) -> Listing:
        """What was gathered, checked as `finished` does."""
        return finished(self._classes, self._clips, self._missing, notes, where)
