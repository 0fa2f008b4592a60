"""What the annotation formats share: keys, class lists, finding videos, and the checks on a finished listing."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from mdltool.errors import MdlError
from mdltool.registry import did_you_mean
from mdltool.types import Clip, Listing

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mjpeg",
        ".mjpg",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogv",
        ".rm",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    )
)
SPLITS = (("train", "training"), ("val", "valid", "validate", "validation"), ("test", "testing"))
_ROLES = {
    "train": SPLITS[0],
    "eval": (*SPLITS[1], *SPLITS[2]),
}


def key_of(name: str, start_s: float | None = None, end_s: float | None = None) -> str:
    """A clip's key: its video's relative path without extension and without dots, plus the segment in ms.

    The dots go because webdataset takes what follows the first one for the extension.
    """
    # a file name that is not UTF-8 has no place in JSON
    text = PurePosixPath(name).as_posix().encode("utf-8", "replace").decode()
    key = os.path.splitext(text)[0].lstrip("/").replace(".", "_")
    # webdataset skips members whose first folder is written __like_this__
    key = re.sub(r"^__+(?=[^/]*__/)", "_", key)
    if start_s is None and end_s is None:
        return key
    return f"{key}_{_ms(start_s or 0.0)}_{_ms(end_s)}"


def _ms(seconds: float | None) -> str:
    return "end" if seconds is None else f"{round(seconds * 1000):08d}"


def relative_name(video: Path, source: Path) -> str:
    """A video's path as keys and metadata name it: relative to the source where it lies inside."""
    if video == source:  # a file of image arrays
        return video.name
    path = video.relative_to(source) if video.is_relative_to(source) else video
    return path.as_posix().lstrip("/")


def clip_name(clip: Clip, source: Path) -> str:
    """What the metadata call a clip's file; of an image in arrays also which image it is."""
    name = relative_name(clip.video, source)
    if clip.item is None:
        return name
    array, row = clip.item
    return "/".join(part for part in (name, array, f"{row:06d}") if part)


def walk_videos(folder: Path, suffixes: Container[str] = VIDEO_SUFFIXES) -> Iterator[Path]:
    """Every file below a folder with one of the suffixes, in order of name; hidden files and folders are left out.

    Links to folders are followed, each folder once.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files) if real not in seen else ():
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(root, name)
        seen.add(real)


def videos_by_stem(folder: Path) -> dict[str, list[Path]]:
    """File name without extension -> the videos of that name anywhere below the folder."""
    found: dict[str, list[Path]] = {}
    for path in walk_videos(folder):
        found.setdefault(path.stem, []).append(path)
    return found


def choose_video(candidates: Sequence[Path], label: str) -> Path:
    """Of several videos of one name, the one in its class's folder, else the first."""
    wanted = _folded(label)
    return next((path for path in candidates if _folded(path.parent.name) == wanted), candidates[0])


def _folded(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def read_lines(path: Path, option: str = "--annotations") -> list[tuple[int, str]]:
    """(line number from 1, stripped text) of lines that are not blank. Raises MdlError that names the option."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise MdlError("there is no such file", path, f"check {option}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise MdlError(f"this is not a text file ({error})", path, f"check {option}") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names of a class list, one a line, in label order. Raises MdlError for none and for repeated names."""
    names = [line.strip('"').strip() for _, line in read_lines(path, "--classes")]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated:
        what = f"the class '{repeated[0]}' stands twice" if repeated else "the class list is empty"
        raise MdlError(what, path, "write each class once, one a line")
    return tuple(names)


def in_order(numbers: Mapping[str, object], where: Path) -> tuple[tuple[str, ...], int]:
    """The names in the order of their numbers, and the first number, 0 or 1.

    numbers: name -> an integer, or one written as text. Raises MdlError unless they count on from 0 or 1.
    """
    order: dict[int, str] = {}
    for name, number in numbers.items():
        if not str(number).strip().isdecimal():
            raise MdlError(f"the class '{name}' has the number {number!r:.40}", where, "number the classes from 0")
        other = order.setdefault(int(str(number)), name)
        if other != name:
            raise MdlError(f"two classes have the number {number}: '{other}', '{name}'", where, "restore the file")
    if not order or min(order) > 1 or max(order) - min(order) != len(order) - 1:
        found = f"{len(order)} classes have numbers from {min(order)} to {max(order)}" if order else "it is empty"
        raise MdlError(f"the class list does not count from 0 or 1 without a gap: {found}", where, "restore it")
    return tuple(order[number] for number in sorted(order)), min(order)


def label_of(name: str, classes: Sequence[str] | dict[str, int], where: str) -> int:
    """Index of a class. Raises MdlError that names the row and the nearest class."""
    index = classes if isinstance(classes, dict) else {c: i for i, c in enumerate(classes)}
    if name not in index:
        raise MdlError(f"the label '{name}' is not in the class list", where, did_you_mean(name, index))
    return index[name]


def number_base(seen: Collection[int], count: int, where: Path) -> int:
    """The number of the first class, 0 or 1. Raises MdlError where the numbers fit neither or do not tell."""
    span = f"the labels are numbers from {min(seen)} to {max(seen)}"
    if min(seen) < 0 or max(seen) - min(seen) >= count or max(seen) > count:
        raise MdlError(f"{span}, the class list has {count} names", where, "correct --classes")
    if min(seen) > 0 and max(seen) < count:
        raise MdlError(
            f"{span}: with {count} classes they may count from 0 or from 1", where, "write the classes' names"
        )
    return 0 if min(seen) == 0 else 1


def official_part(split: str, where: object) -> str:
    """ "train" or "eval": the two lists that UCF101 and HMDB51 publish. Raises MdlError for other splits."""
    for part, names in _ROLES.items():
        if split in names:
            return part
    raise MdlError(
        f"this data set has no split '{split}'",
        where,
        "give --split train, val or test (val and test: its test list)",
    )


def same_split(value: str, split: str) -> bool:
    """Whether a split column's value means the split asked for: train, val and test go by several names."""
    value, split = value.strip().lower(), split.lower()
    return value == split or any(value in family and split in family for family in SPLITS)


def label_notes(clips: Iterable[Clip]) -> list[str]:
    """What the clips of multi_label have for labels; nothing of other tasks."""
    counts = [len(clip.label) for clip in clips if isinstance(clip.label, tuple)]
    notes = []
    if counts:
        notes.append(f"labels a clip: {sum(counts) / len(counts):.2f} on average, {max(counts)} at most")
    if 0 in counts:
        notes.append(f"clips of no class: {counts.count(0)}")
    return notes


def finished(
    classes: Sequence[str],
    clips: Iterable[Clip],
    missing: Sequence[tuple[str, str]],
    notes: Sequence[str],
    where: Path,
    task: str = "single_label",
    absent: Sequence[Clip] = (),
) -> Listing:
    """The listing, checked: no key twice, and at least one file there unless `absent` says what clips there would
    be. Adds the notes that all formats print.
    """
    clips = tuple(clips)
    by_key: dict[str, Clip] = {}
    for clip in (*clips, *absent):
        other = by_key.setdefault(clip.key, clip)
        if other is not clip:
            raise MdlError(
                f"two clips have the key '{clip.key}': {other.video} and {clip.video}",
                where,
                "rename one of the files, or remove the repeated row",
            )
    if not clips and not absent:
        raise nothing_there(missing, where)
    notes = [*notes, *_seen(classes, clips, task), f"clips: {len(clips)}"]
    images = sum(clip.is_image for clip in clips)
    if images:
        notes.append(f"images: {images} of them")
    if missing:
        notes.append(f"missing: {len(missing)} of {len(missing) + len(clips)} listed files, e.g. {missing[0][1]}")
    return Listing(tuple(classes), clips, tuple(missing), tuple(notes), task, absent=tuple(absent))


def nothing_there(missing: Sequence[tuple[str, str]], where: object) -> MdlError:
    """What is to be raised where no listed file is there."""
    first = f", the first: {missing[0][1]}" if missing else ""
    return MdlError(f"none of the {len(missing)} listed files is there{first}", where, "check SOURCE")


def _seen(classes: Sequence[str], clips: Sequence[Clip], task: str) -> list[str]:
    """How many of the classes the clips have, of tasks whose labels are numbers of classes."""
    if task not in ("single_label", "multi_label"):
        return []
    labels = [clip.label if isinstance(clip.label, tuple) else (clip.label,) for clip in clips]
    return [f"classes: {len(set().union(*labels))} seen of {len(classes)} listed"]
