"""The streams of a video file, as shards of it would hold them: what `predict` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mdltool.data.decode import check_video
from mdltool.data.features import extract
from mdltool.data.modalities import Absent, Part
from mdltool.data.modalities.asked import Asked
from mdltool.data.modalities.clip import read_raw
from mdltool.data.modalities.plan import FILES, StreamPlan, extracted, load_features, settings_of
from mdltool.data.modalities.sides import only_one
from mdltool.data.modalities.transcripts import SUBTITLES
from mdltool.data.video import VideoError
from mdltool.errors import MdlError
from mdltool.types import StreamInfo, is_image


@dataclasses.dataclass(frozen=True)
class VideoStream:
    """tokens_MD: float32, M = 0 where `missing` says why there are none."""

    tokens_MD: np.ndarray
    missing: str | None


def streams_of_video(
    video: Path,
    infos: Mapping[str, StreamInfo],
    *,
    trim: tuple[float, float] | None = None,
    sides: Mapping[str, Path] | None = None,
) -> dict[str, VideoStream]:
    """The streams of a video or of [start, stop) of it, in seconds from its first frame.

    infos: what shards say of each (ShardIndex.streams). sides: of a stream its side file: a sound, flow frames, a
    transcript, or the data set's features; a transcript may also lie beside the video, under its name. Values are
    rounded to float16 as shards store them. Raises VideoError, and MdlError for an extractor that is not here.
    """
    part = _part(video, trim)
    found = {}
    for name, info in infos.items():
        side = (sides or {}).get(name)
        if side is None and info.kind == "text" and not info.options.get("side"):
            side = _beside(video)
        try:
            found[name] = VideoStream(_tokens(name, info, part, side), None)
        except Absent as fault:
            found[name] = VideoStream(np.zeros((0, info.width), np.float32), fault.reason)
    return found


def _tokens(name: str, info: StreamInfo, part: Part, side: Path | None) -> np.ndarray:
    if info.extractor == FILES:
        if side is None:
            raise Absent("its features come from files of the data set")
        return load_features(side, info.width).astype(np.float32)
    if side is None and info.options.get("side"):
        raise Absent(f"it comes from a side file: --side {name}=...")
    plan = _plan(name, info, side)
    assert plan.extractor is not None
    try:
        raw = read_raw(plan, part, side, _names(part.video))
    except VideoError as fault:
        raise Absent(fault.reason) from None
    return extract(plan.extractor, raw).tokens_MD.astype(np.float16).astype(np.float32)


def _plan(name: str, info: StreamInfo, side: Path | None) -> StreamPlan:
    """What the shards' options say. Raises MdlError for another version of the extractor."""
    plan = extracted(Asked(name, info.kind, side, None, settings_of(info.extractor, info.options)))
    if plan.info.version != info.version:
        raise MdlError(
            f"'{name}' comes from version {info.version} of {info.extractor}, here is {plan.info.version}",
            None,
            "shard and train again, or use the mdltool that made the shards",
        )
    return plan


def _part(video: Path, trim: tuple[float, float] | None) -> Part:
    if is_image(video):
        return Part(video, 0.0, 0.0, video, is_image=True)
    duration_s = check_video(video, full=False, trim=trim).duration_s
    return Part(video, trim[0] if trim else 0.0, duration_s, video, trim, is_segment=trim is not None)


def _names(video: Path) -> tuple[str, ...]:
    """What a transcript of several videos may call this one: its path below each of its folders, longest first."""
    parts = video.absolute().with_suffix("").parts[1:]
    return tuple("/".join(parts[i:]) for i in range(len(parts)))


def _beside(video: Path) -> Path | None:
    """The subtitles of a video's own name, in its folder. Raises MdlError for two."""
    found = [f for f in video.parent.iterdir() if f.stem == video.stem and f.suffix.lower() in SUBTITLES]
    return only_one(sorted(found), video.stem, "--side")
