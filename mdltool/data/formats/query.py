"""What an annotation format is asked for, with the checks that formats share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdltool.errors import MdlError
from mdltool.types import Listing


@dataclass(frozen=True)
class Query:
    """One split of a data set as the user has it; a format takes of it what it has.

    source: where the files are. annotations: a file, or the folder of the published ones. fold: of several official
    splits, from 1. classes: names in label order, which fix the labels.
    """

    source: Path
    annotations: Path | None
    split: str
    fold: int = 1
    classes: tuple[str, ...] | None = None

    @property
    def place(self) -> Path:
        """Where annotations are looked for: as given, else the source."""
        return self.annotations or self.source

    def folder(self) -> Path:
        """`source`, which must be a directory. Raises MdlError."""
        if not self.source.exists():
            raise MdlError("there is no such directory", self.source, "give the folder that holds the videos")
        if not self.source.is_dir():
            what, fix = (
                "the source is a file, not a directory",
                "give the folder of the videos; lists: --annotations",
            )
            raise MdlError(what, self.source, fix)
        return self.source

    def given(self, what: str, fix: str) -> Path:
        """`annotations`, which must be given. Raises MdlError that `what` is not."""
        if self.annotations is None:
            raise MdlError(f"{what} is not given", self.source, fix)
        return self.annotations

    def find(self, names: Sequence[str], beside: Sequence[Path], what: str, fix: str) -> Path:
        """The first file of these names in the given folder or, where none is given, in those `beside` the source.

        Raises MdlError of `what` and `fix` where there is none.
        """
        places = [self.annotations] if self.annotations else beside
        found = next((path for place in places for name in names if (path := place / name).is_file()), None)
        if found is None:
            raise MdlError(what, places[0], fix)
        return found

    def origin(self, otherwise: str) -> str:
        """The words of a note on where the classes are from: --classes, or what the format says."""
        return "from --classes" if self.classes else otherwise


Reader = Callable[[Query], Listing]
"""What a format offers. Raises MdlError for what is wrong with the files, and for what the format has not."""
