"""Streams as they will be stored: asked for, checked against what is there, and handed to the workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mdltool.data.features import DEFAULTS, Extractor, SoundExtractor, make_extractor, with_options
from mdltool.data.formats.common import relative_name
from mdltool.data.modalities.asked import Asked
from mdltool.data.modalities.flow import FlowOptions, resolved
from mdltool.data.modalities.sides import Sides, names_of
from mdltool.data.modalities.sound import SoundOptions
from mdltool.data.modalities.transcripts import TextOptions
from mdltool.errors import MdlError
from mdltool.files import digest_of
from mdltool.registry import did_you_mean
from mdltool.types import Clip, StreamInfo

FILES = "files"  # stands for an extractor where the data set's own features are taken
OPTIONS: dict[str, Any] = {"audio": SoundOptions, "flow": FlowOptions, "text": TextOptions}


@dataclass(frozen=True)
class StreamPlan:
    """How a worker makes one stream.

    raw: SoundOptions, FlowOptions or TextOptions; extractor: from that to tokens; both None for features that are
    taken as they are. side: whether it comes from side files. method, weights: of flow that is computed.
    """

    name: str
    info: StreamInfo
    raw: Any = None
    extractor: Extractor | None = None
    side: bool = False
    method: str = ""
    weights: str = ""

    @property
    def limit_s(self) -> float:
        """How much longer than without it a clip may take, on a busy core."""
        if self.method.startswith("raft"):
            return 20.0 * float(self.raw.stacks * self.raw.pairs)
        return 300.0 if self.info.extractor == "transformers" else 0.0


@dataclass(frozen=True)
class ClipStream:
    """One stream of one clip. source: its side or feature file, where it has one; whole: which is of all of its
    video. names: of the video."""

    plan: StreamPlan
    source: Path | None
    whole: bool
    names: tuple[str, ...]


class Streams:
    """All streams of a run, with the side files of each. Raises MdlError for what cannot be had at all."""

    def __init__(
        self, wanted: Sequence[Asked], clips: Sequence[Clip], source: Path, named: Collection[str] = ()
    ) -> None:
        """named: streams that come from the format's own side files, even where no clip has one."""
        self._source = source
        self._listed = {entry.name: _listed(entry, clips, source, entry.name in named) for entry in wanted}
        self._sides = {e.name: None if self._listed[e.name] else _sides(e, source) for e in wanted}
        self.plans = [_of_width(self._plan(entry, clips), entry.width) for entry in wanted]

    def of(self, clip: Clip) -> tuple[ClipStream, ...]:
        """What a worker is told of a clip's streams."""
        names = tuple(names_of(clip.video, self._source))
        return tuple(ClipStream(plan, *self._file(plan, clip), names) for plan in self.plans)

    def request(self) -> dict[str, Any]:
        """What of this decides the bytes."""
        digests = {name: sides.digest if sides else self._listed[name] for name, sides in self._sides.items()}
        return {p.name: {**index_entry(p.info), "sources": digests[p.name]} for p in self.plans}

    def note(self, clips: Sequence[Clip]) -> list[str]:
        """For each stream that reads files of its own, how many clips have one."""
        found = []
        for plan in self.plans:
            if self._sides[plan.name] is not None or self._listed[plan.name]:
                there = sum(self._file(plan, clip)[0] is not None for clip in clips)
                found.append(f"{plan.name}: files for {there} of {len(clips)} clips")
        return found

    def _file(self, plan: StreamPlan, clip: Clip) -> tuple[Path | None, bool]:
        """(a clip's file, whether it is of the whole video)."""
        sides = self._sides[plan.name]
        if sides is None:
            return clip.sides.get(plan.name), True
        if plan.info.extractor == FILES:
            own = sides.of(clip.video, clip.key)
            if own is not None:
                return own, False
        return sides.of(clip.video), True

    def _plan(self, entry: Asked, clips: Sequence[Clip]) -> StreamPlan:
        if entry.features is not None:
            plan = StreamPlan(entry.name, StreamInfo(entry.kind, 1, FILES, {}, "1", 0))
            width = self._stored_width(plan, clips, entry.features)
            return dataclasses.replace(plan, info=dataclasses.replace(plan.info, width=width))
        plan = extracted(entry)
        plan = dataclasses.replace(plan, side=True) if self._listed[entry.name] else plan
        # Flow says it by its method; a transcript of --side may as well lie beside the video.
        named = self._listed[entry.name] is not None
        if not (plan.side if entry.kind == "audio" else named):
            return plan
        info = dataclasses.replace(plan.info, options={**plan.info.options, "side": True})
        return dataclasses.replace(plan, info=info)

    def _stored_width(self, plan: StreamPlan, clips: Sequence[Clip], folder: Path) -> int:
        """The width of the first clip's features that are there, in order of the keys."""
        for clip in sorted(clips, key=lambda clip: clip.key):
            path, _ = self._file(plan, clip)
            if path is not None:
                return int(load_features(path, None).shape[1])
        example = clips[0].key if clips else "KEY"
        raise MdlError(
            f"no clip has a feature file there (e.g. {example}.npy)", folder, f"check --features {plan.name}"
        )


def index_entry(info: StreamInfo) -> dict[str, Any]:
    """A stream in index.json, but for how many clips have it."""
    names = ("kind", "width", "extractor", "options", "version")
    return {name: getattr(info, name) for name in names}


def load_features(path: Path, width: int | None) -> np.ndarray:
    """float16 or float32 [M, D] of a feature file. Raises MdlError for another shape, type or width."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise MdlError(f"this is no array of numbers ({str(error)[:80]})", path, "save it by numpy.save") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise MdlError(f"features are floating-point [M, D], this is {what}", path, "one row for each token")
    if found.shape[1] == 0 or (width is not None and found.shape[1] != width):
        raise MdlError(
            f"the features are {found.shape[1]} wide, those of other clips {width}",
            path,
            "make them all of one width",
        )
    if not np.isfinite(found).all():
        raise MdlError("the features hold values that are not finite", path, "make the file again")
    return found if found.dtype == np.float16 else found.astype(np.float32)


def _listed(entry: Asked, clips: Sequence[Clip], source: Path, named: bool) -> str | None:
    """The digest of the side files that the annotation format itself has for a stream; None: it is no such one."""
    if entry.side is not None or entry.features is not None:
        return None
    files = {clip.sides[entry.name] for clip in clips if entry.name in clip.sides}
    rows = sorted([relative_name(file, source), file.stat().st_size] for file in files)
    return digest_of(rows) if rows or named else None


def _sides(entry: Asked, source: Path) -> Sides | None:
    if entry.features is not None:
        return Sides(entry.features, "features", source, f"--features {entry.name}")
    if entry.side is not None:
        return Sides(entry.side, entry.kind, source, f"--side {entry.name}")
    if entry.kind == "text":
        try:
            return Sides(source, "subtitles", source, f"--side {entry.name}")
        except MdlError as error:
            raise MdlError(
                f"there are no transcripts beside the videos ({error.what})",
                source,
                f"--side {entry.name}=FOLDER_OR_FILE (CSV, JSON, SRT or WebVTT)",
            ) from None
    return None


def extracted(entry: Asked) -> StreamPlan:
    """The plan of a stream whose tokens are extracted from the raw one. Raises MdlError for bad options."""
    where = f"--set {entry.name}"
    settings = dict(entry.settings)
    name = settings.pop("extractor", DEFAULTS[entry.kind])
    build = OPTIONS[entry.kind]
    raw = with_options(build, _own(settings, build), where)
    raw.check(where)
    base = make_extractor(name, entry.kind, {}, where) if name != "transformers" else None
    fields = _fields(base) if base is not None else ("model", "unit", "longest")
    unknown = [key for key in settings if key not in fields and key not in _fields(build)]
    if unknown:
        raise MdlError(
            f"{entry.kind} streams of {name} have no option '{unknown[0]}'",
            f"{where}.{unknown[0]}",
            did_you_mean(unknown[0], [*_fields(build), *fields, "extractor"]),
        )
    options = {key: value for key, value in settings.items() if key in fields}
    extractor = make_extractor(name, entry.kind, options, where)
    if entry.kind == "audio":
        cast(SoundExtractor, extractor).check_rate(raw.rate, where)
    method, weights = "", ""
    if entry.kind == "flow":
        method, weights = ("frames", "") if entry.side is not None else resolved(raw, entry.name)
    info = StreamInfo(
        entry.kind, extractor.width, name, _recorded(raw, extractor, method, weights), extractor.version, 0
    )
    return StreamPlan(entry.name, info, raw, extractor, entry.side is not None, method, weights)


def _recorded(raw: Any, extractor: Extractor, method: str, weights: str) -> dict[str, Any]:
    """The options that index.json tells; of weights the file's name, which holds a hash for torchvision's own."""
    options = {**dataclasses.asdict(raw), **dataclasses.asdict(extractor)}  # type: ignore[call-overload]
    return options | ({"method": method, "weights": Path(weights).name} if method else {})


def _of_width(plan: StreamPlan, width: int | None) -> StreamPlan:
    """The plan. Raises MdlError where its tokens are of another width than is wanted."""
    name, found = plan.name, plan.info
    if width is not None and found.width != width:
        raise MdlError(
            f"the tokens of '{name}' ({found.extractor}) are {found.width} wide, the recipe wants {width}",
            f"--modality {name}",
            f"change streams.{name}.input in a copy of the recipe, or what makes the tokens",
        )
    return plan


def settings_of(extractor: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a stream again here, of the options that shards recorded.

    Where weights lay, that it came from side files and that flow came as frames belong to the place it was made at.
    """
    options = {key: value for key, value in recorded.items() if key not in ("weights", "side")}
    if options.get("method") == "frames":
        options["method"] = "auto"
    return {**options, "extractor": extractor}


def _own(settings: Mapping[str, Any], build: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in _fields(build)}


def _fields(build: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(build))
