"""One clip's streams: raw, tokens, and what the clip's metadata say of them.

Torch comes with the extractors that need it, not with this module: workers start faster without.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mdltool.data.encode import Job, Prepared, prepare
from mdltool.data.features import Tokens, extract
from mdltool.data.modalities import Absent, Flow, Part, Raw, Sound
from mdltool.data.modalities.flow import computed_flow, encode_flow, published_flow
from mdltool.data.modalities.plan import FILES, ClipStream, StreamPlan, load_features
from mdltool.data.modalities.sound import encode_sound, read_sound
from mdltool.data.modalities.transcripts import encode_text, read_text
from mdltool.data.video import VideoError
from mdltool.data.workers import OUT_OF_SPACE
from mdltool.errors import MdlError
from mdltool.types import Clip

TORCH_KINDS = ("audio", "flow")  # whose extractors bring it along


@dataclass(frozen=True)
class StoredStream:
    """A clip's stream. members: what follows the clip's JSON, extension -> bytes; raw: (extension, bytes) of what
    lies last. tokens: M. missing: why there are none, else None. raw_in: the extension of the member that holds the
    raw stream."""

    name: str
    members: dict[str, bytes]
    raw: tuple[str, bytes] | None
    raw_in: str | None
    tokens: int
    missing: str | None

    @property
    def meta(self) -> dict[str, Any]:
        """Its entry in the clip's JSON."""
        return {"tokens": self.tokens, "raw": self.raw_in, "missing": self.missing}


def prepare_with_streams(job: Job) -> Prepared:
    """As `prepare`, in a worker, with the clip's streams. Raises MdlError for side files that are wrong."""
    if any(stream.plan.info.kind in TORCH_KINDS for stream in job.streams):
        import torch

        torch.set_num_threads(1)  # there is a worker for every core
    prepared = prepare(job)
    part = _part(job.clip, prepared)
    return replace(prepared, streams=tuple(stored_stream(stream, part) for stream in job.streams))


def _part(clip: Clip, prepared: Prepared) -> Part:
    duration_s = float(prepared.meta["duration_s"])
    if clip.end_s is not None:
        duration_s = min(duration_s, clip.end_s - (clip.start_s or 0.0))
    trim = prepared.meta.get("trim")
    return Part(
        clip.video,
        clip.start_s or 0.0,
        duration_s,
        prepared.path,
        (float(trim[0]), float(trim[1])) if trim else None,
        clip.is_image,
        clip.is_segment,
    )


def stored_stream(stream: ClipStream, part: Part) -> StoredStream:
    """A clip's stream, or the reason why it has none. Raises MdlError for files that are wrong for every clip."""
    name = stream.plan.name
    try:
        return _from_files(stream, part) if stream.plan.info.extractor == FILES else _extracted(stream, part)
    except (Absent, VideoError) as fault:
        reason = fault.reason
    except (MdlError, MemoryError):
        raise
    except Exception as fault:  # of a decoder or an extractor: it costs the stream, not the clip
        if getattr(fault, "errno", None) in OUT_OF_SPACE:
            raise
        reason = f"{type(fault).__name__}: {getattr(fault, 'strerror', None) or fault}"
    return StoredStream(name, {}, None, None, 0, reason)


def _extracted(stream: ClipStream, part: Part) -> StoredStream:
    raw = read_raw(stream.plan, part, stream.source, stream.names)
    assert stream.plan.extractor is not None
    name, tokens = stream.plan.name, extract(stream.plan.extractor, raw)
    about = {"source": _source(stream, part), "version": stream.plan.info.version}
    if isinstance(raw, Sound):
        store = stream.plan.raw.store
        return _stored(name, tokens, about, (store, encode_sound(raw, store)))
    if isinstance(raw, Flow):
        pairs = {"pairs": [[round(t, 6) for t in pair] for pair in raw.times_P2.tolist()]}
        return _stored(name, tokens, about | pairs, ("mp4", encode_flow(raw)))
    return _stored(name, tokens, about | {"utterances": encode_text(raw)}, None, "json")


def read_raw(plan: StreamPlan, part: Part, source: Path | None, names: tuple[str, ...]) -> Raw:
    """The raw stream of a part of a video. Raises Absent where there is none, and VideoError."""
    if plan.info.kind == "audio":
        if source is None and plan.side:
            raise Absent("there is no side file of this video")
        return read_sound(part, source, plan.raw)
    if plan.info.kind == "text":
        return read_text(part, source, names, plan.raw)
    if plan.method == "frames":
        if source is None:
            raise Absent("there are no flow frames of this video")
        return published_flow(part, source, plan.raw)
    return computed_flow(part, plan.method, plan.weights, plan.raw)


def _stored(
    name: str, tokens: Tokens, about: dict[str, Any], raw: tuple[str, bytes] | None, raw_in: str | None = None
) -> StoredStream:
    if not len(tokens.tokens_MD):
        return StoredStream(name, {}, None, None, 0, "the extractor found nothing in it")
    times = [[round(time, 6) for time in token] for token in tokens.times_M2.tolist()]
    members = {
        f"{name}.npy": _npy(tokens.tokens_MD.astype(np.float16)),
        f"{name}.json": json.dumps({"t": times, **about}, ensure_ascii=False).encode(),
    }
    extension = raw[0] if raw else raw_in
    return StoredStream(
        name, members, (f"{name}.{raw[0]}", raw[1]) if raw else None, extension, len(tokens.tokens_MD), None
    )


def _from_files(stream: ClipStream, part: Part) -> StoredStream:
    """The data set's own features, as they are; of a whole video's those whose times overlap the clip."""
    name = stream.plan.name
    if stream.source is None:
        raise Absent("there is no feature file of this clip")
    tokens_MD = load_features(stream.source, stream.plan.info.width)
    times_M2 = _times(stream.source, len(tokens_MD))
    if stream.whole and part.is_segment:
        if times_M2 is None:
            raise Absent(
                f"{stream.source.name} is of the whole video, and {stream.source.stem}.json has no times 't'"
            )
        own = (times_M2[:, 0] < part.stop_s) & (times_M2[:, 1] > part.start_s)
        tokens_MD, times_M2 = tokens_MD[own], times_M2[own] - part.start_s
    if not len(tokens_MD):
        raise Absent(f"{stream.source.name} has no tokens of the clip")
    about = {"source": stream.source.name, "version": stream.plan.info.version}
    times = {} if times_M2 is None else {"t": [[round(t, 6) for t in token] for token in times_M2.tolist()]}
    members = {f"{name}.npy": _npy(tokens_MD), f"{name}.json": json.dumps({**times, **about}).encode()}
    return StoredStream(name, members, None, None, len(tokens_MD), None)


def _times(features: Path, count: int) -> np.ndarray | None:
    """float64 [M, 2] of the JSON file beside features. Raises MdlError where it is not of them."""
    path = features.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        times = np.array(json.loads(path.read_text("utf-8"))["t"], np.float64)
        fits = times.shape == (count, 2) and bool(np.isfinite(times).all())
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise MdlError(
            f"this gives no times of the {count} tokens of {features.name}", path, '{"t": [[start_s, end_s], ...]}'
        )
    return times


def _source(stream: ClipStream, part: Part) -> str:
    return (stream.source or part.video).name.encode("utf-8", "replace").decode()  # as keys have it


def _npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, np.ascontiguousarray(array))
    return target.getvalue()
