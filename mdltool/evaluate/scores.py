"""The one evaluation loop: views in, one score vector per clip out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mdltool.data.index import ShardIndex
from mdltool.data.loader import ClipViews
from mdltool.data.tokens import padded
from mdltool.errors import MdlError
from mdltool.model import MultiDomainModel
from mdltool.tasks import Task
from mdltool.types import StreamTokens

VIEWS_PER_FORWARD = 32


@dataclass
class DomainScores:
    """Scores of the clips of one domain that this process saw; `score_domain` fills it.

    scores: one [N] tensor a clip, probabilities or the mean of logits made probabilities. logits: likewise, the
    mean over views. missing: (key, reason).
    """

    keys: list[str] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    distinct_views: int | None = None
    backends: set[str] = field(default_factory=set)

    def merge(self, others: Iterable[DomainScores]) -> DomainScores:
        """This process's scores and the others', ordered by key: the same whatever the number of processes."""
        parts = [self, *others]
        rows = [row for part in parts for row in zip(part.keys, part.scores, part.logits, strict=True)]
        rows.sort(key=lambda row: row[0])
        distinct = [part.distinct_views for part in parts if part.distinct_views is not None]
        return DomainScores(
            keys=[row[0] for row in rows],
            scores=[row[1] for row in rows],
            logits=[row[2] for row in rows],
            missing=sorted(entry for part in parts for entry in part.missing),
            distinct_views=min(distinct) if distinct else None,
            backends=set().union(*(part.backends for part in parts)),
        )


def score_domain(
    model: MultiDomainModel,
    clips: Iterable[ClipViews],
    domain: str,
    task: Task,
    *,
    average: str = "probs",
    device: torch.device | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    advance: Callable[..., None] | None = None,
) -> DomainScores:
    """Score every clip of one domain: the mean over its views of probabilities, or of logits (`average: logits`).

    Clips with few views share a forward pass; a clip's views are never split over two. Raises MdlError for scores
    that are not finite.
    """
    found = DomainScores()
    model.eval()
    with torch.inference_mode():
        for group in _groups(clips, found):
            frames = torch.cat([clip.views.frames for clip in group if clip.views is not None])
            frames = frames.to(device or "cpu").contiguous(memory_format=torch.channels_last_3d)
            streams = _streams(group, device)
            with autocast():
                logits = model(frames, domain, streams)
            logits = logits.float().cpu()
            sizes = [len(clip.views.frames) for clip in group if clip.views is not None]
            for clip, part in zip(group, logits.split(sizes), strict=True):
                _check_finite(part, clip.key, domain)
                found.keys.append(clip.key)
                found.scores.append(_over_views(part, task, average))
                found.logits.append(_mean(part))
            if advance is not None:
                advance(len(group))
    return found


def score_mixed(
    model: MultiDomainModel,
    clips: Sequence[tuple[str, Tensor]],
    tasks: Mapping[str, Task],
    average: str = "probs",
    batch: int = VIEWS_PER_FORWARD,
    streams: Sequence[Mapping[str, Tensor]] | None = None,
) -> list[Tensor]:
    """One [N] score vector for each clip, (domain, its views [V, 3, T, H, W]), as score_domain's; in their order.

    All views of all clips of one size go through the model `batch` at a time, whatever their domains. streams: of
    each clip, by name, float32 [M, D]. Raises MdlError for scores that are not finite.
    """
    given = streams or [{}] * len(clips)
    scores: dict[int, Tensor] = {}
    for size in dict.fromkeys(views.shape[1:] for _, views in clips):
        rows = [row for row, (_, views) in enumerate(clips) if views.shape[1:] == size]
        parts = [clips[row] for row in rows], [given[row] for row in rows]
        found = _score_alike(model, *parts, tasks, average, batch)
        scores |= dict(zip(rows, found, strict=True))
    return [scores[row] for row in range(len(clips))]


def _score_alike(
    model: MultiDomainModel,
    clips: Sequence[tuple[str, Tensor]],
    streams: Sequence[Mapping[str, Tensor]],
    tasks: Mapping[str, Task],
    average: str,
    batch: int,
) -> list[Tensor]:
    """score_mixed of clips whose views are of one size."""
    model.eval()
    domains = [domain for domain, views in clips for _ in range(len(views))]
    frames = torch.cat([views for _, views in clips])
    own = [streams[row] for row, (_, views) in enumerate(clips) for _ in range(len(views))]
    rows: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(domains), batch):
            part = frames[start : start + batch].contiguous(memory_format=torch.channels_last_3d)
            rows += model(part, domains[start : start + batch], padded(own[start : start + batch]))
    scores, start = [], 0
    for domain, views in clips:
        logits_VN = torch.stack(rows[start : start + len(views)]).float()
        _check_finite(logits_VN, "a clip", domain)
        scores.append(_over_views(logits_VN, tasks[domain], average))
        start += len(views)
    return scores


def _streams(group: Sequence[ClipViews], device: torch.device | None) -> dict[str, StreamTokens]:
    """The streams of clips, for each of their views."""
    found = padded([clip.streams for clip in group if clip.views is not None for _ in clip.views.frames])
    where = device or "cpu"
    return {name: StreamTokens(s.tokens_BMD.to(where), s.mask_BM.to(where)) for name, s in found.items()}


def _check_finite(logits_VN: Tensor, key: str, domain: str) -> None:
    if not logits_VN.isfinite().all():
        raise MdlError(
            f"the model's scores of {key} are not finite", f"domain {domain}", "compute in fp32, or train it anew"
        )


def _over_views(logits_VN: Tensor, task: Task, average: str) -> Tensor:
    """[N]: the mean over views of probabilities, or of logits, made probabilities then."""
    if average == "probs":
        return _mean(task.probabilities(logits_VN))
    return task.probabilities(_mean(logits_VN))


def _mean(views_VN: Tensor) -> Tensor:
    return views_VN.double().mean(dim=0).float()


def _groups(clips: Iterable[ClipViews], found: DomainScores) -> Iterator[list[ClipViews]]:
    group: list[ClipViews] = []
    views = 0
    for clip in clips:
        if clip.views is None:
            found.missing.append((clip.key, clip.error or "cannot be decoded"))
            continue
        count = len(clip.views.frames)
        found.backends.add(clip.views.backend)
        found.distinct_views = min(found.distinct_views or clip.views.distinct, clip.views.distinct)
        if group and views + count > VIEWS_PER_FORWARD:
            yield group
            group, views = [], 0
        group.append(clip)
        views += count
    if group:
        yield group


def tensors_of(found: DomainScores, index: ShardIndex, count_missing: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [M, N], labels [M] or [M, N] as the index has them, wrong [M]).

    Missing clips come last, with zero scores, when they count.
    """
    missing = [key for key, _ in found.missing] if count_missing else []
    scores = torch.zeros(len(found.keys) + len(missing), len(index.classes))
    for row, given in zip(scores, found.scores, strict=False):
        row.copy_(given)
    labels = torch.from_numpy(labels_of(index, [*found.keys, *missing]))
    return scores, labels, torch.arange(len(scores)) >= len(found.keys)


def labels_of(index: ShardIndex, keys: Iterable[str]) -> np.ndarray:
    """The labels of these clips, in this order."""
    rows = {key: row for row, key in enumerate(index.keys)}
    return index.labels[np.array([rows[key] for key in keys], dtype=np.int64)]
