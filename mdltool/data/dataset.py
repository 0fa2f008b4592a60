"""A data set as the user has it: a folder of videos, annotations, and the clips of them that are wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mdltool.data.formats import FORMATS
from mdltool.data.formats.common import read_class_list, read_lines
from mdltool.data.formats.query import Query, Reader
from mdltool.errors import MdlError
from mdltool.types import Listing


@dataclass(frozen=True)
class Dataset:
    """Videos and their annotations. annotations: what the format needs. classes: a file that fixes the labels."""

    source: Path
    format: str
    domain: str
    split: str
    annotations: Path | None = None
    fold: int = 1
    classes: Path | None = None

    def read(self, exclude: Path | None = None) -> Listing:
        """List the clips, but for those whose keys the file `exclude` holds, one a line. Raises MdlError."""
        read: Reader = FORMATS.load(self.format, "--format")
        classes = read_class_list(self.classes) if self.classes else None
        listing = read(Query(self.source, self.annotations, self.split, self.fold, classes))
        return listing if exclude is None else _without(listing, exclude)


def _without(listing: Listing, exclude: Path) -> Listing:
    """The listing without some clips, there or missing; the classes and their numbers stay."""
    unwanted = {key for _, key in read_lines(exclude, "--exclude")}
    clips = tuple(clip for clip in listing.clips if clip.key not in unwanted)
    missing = tuple(entry for entry in listing.missing if entry[0] not in unwanted)
    absent = tuple(clip for clip in listing.absent if clip.key not in unwanted)
    if not clips and not absent:
        raise MdlError("every clip is excluded", exclude, "give the list of another split, or none")
    excluded = len(listing.clips) + len(listing.missing) - len(clips) - len(missing)
    unknown = sorted(unwanted - {clip.key for clip in listing.clips} - {key for key, _ in listing.missing})
    note = f"excluded: {excluded} clips of {exclude.name}"
    if unknown:
        note += f" (not found: {len(unknown)} of its keys, e.g. {unknown[0]})"
    notes = (*listing.notes, note)
    return replace(listing, clips=clips, absent=absent, missing=missing, notes=notes, excluded=excluded)
