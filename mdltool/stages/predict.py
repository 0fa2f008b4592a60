"""`predict`: labels for video files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdltool.artifact import Artifact
from mdltool.data.decode import VideoError
from mdltool.data.modalities.plan import FILES
from mdltool.data.modalities.sides import Sides
from mdltool.data.modalities.video import VideoStream, streams_of_video
from mdltool.errors import MdlError
from mdltool.evaluate.scores import VIEWS_PER_FORWARD, score_mixed
from mdltool.evaluate.views import ViewSpec, load_views
from mdltool.model_store import label_spaces, load_model
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.plan import eval_views
from mdltool.stages.sources import source_of
from mdltool.tasks import Regression, Task, VerbNoun, task_of
from mdltool.types import LabelSpace, StreamInfo


def run(
    model_artifact: Artifact,
    videos: Iterable[Path],
    domains: Sequence[str] = (),
    *,
    topk: int = 5,
    views: str | None = None,
    weights: str = "last",
    batch: int = VIEWS_PER_FORWARD,
    work: Path | None = None,
    sides: Mapping[str, Path] | None = None,
) -> Iterator[dict[str, Any]]:
    """One object per video: {"video", "domain", "task", "top": [{"label", "score"}]}, best first.

    Of a domain with streams also "streams": {NAME: {"tokens", "missing"}}. sides: of a stream the side file of all
    videos, or a folder of side files by the videos' names.

    domains: one for all videos, or one for each in their order; none for a model of one domain. batch: views, of
    whatever domains, that go through the model together. score: the softmax probability of single_label, the
    sigmoid of multi_label. Of a regression, every target in the model's order with its value, whatever topk. Of
    verb_noun, top has the actions, "verb noun" with p(verb) p(noun), and verbs and nouns stand beside it. Raises
    MdlError for a video that cannot be decoded, after what came before it.
    """
    content = model_artifact.load_json("model.json")
    spaces = label_spaces(content)
    videos = list(videos)
    chosen = _domain_of_each(domains, len(videos), spaces, model_artifact)
    for video in videos:
        if not video.is_file():
            raise MdlError("there is no such video file", video, "check the path")
    recipe = Recipe.model_validate(content["recipe"])
    known = {name: _Domain.of(recipe, name, spaces[name], views) for name in dict.fromkeys(chosen)}
    _check_sides(sides or {}, known.values())
    model = load_model(model_artifact, weights, work)
    tasks = {name: domain.task for name, domain in known.items()}
    pairs = ((video, known[name]) for video, name in zip(videos, chosen, strict=True))
    for clips in _groups(pairs, sides or {}, batch):
        tokens = [clip.tokens() for clip in clips]
        frames = ((clip.domain.name, clip.frames) for clip in clips)
        scores = score_mixed(model, list(frames), tasks, recipe.views.average, batch, tokens)
        for clip, scores_N in zip(clips, scores, strict=True):
            yield clip.about(scores_N, topk)


@dataclass(frozen=True)
class _Domain:
    """How the model sees videos of one domain. streams: what made each."""

    name: str
    space: LabelSpace
    task: Task
    views: ViewSpec
    streams: dict[str, StreamInfo]

    @classmethod
    def of(cls, recipe: Recipe, name: str, space: LabelSpace, views: str | None) -> _Domain:
        streams = {stream: source_of(recipe.streams[stream]) for stream in recipe.streams_of(name)}
        return cls(name, space, task_of(space), eval_views(recipe, name, views), streams)

    def read(self, video: Path, sides: Mapping[str, Path]) -> _Clip:
        """One video. sides: of whatever streams. Raises VideoError where it does not decode."""
        frames = load_views(video, self.views, key=video.stem).frames
        own = _sides_of(video, sides, self.streams)
        return _Clip(video, self, frames, streams_of_video(video, self.streams, sides=own))


@dataclass(frozen=True)
class _Clip:
    """A video that was read. frames: its views [V, 3, T, H, W]."""

    video: Path
    domain: _Domain
    frames: Tensor
    streams: dict[str, VideoStream]

    def tokens(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(stream.tokens_MD) for name, stream in self.streams.items()}

    def about(self, scores_N: Tensor, topk: int) -> dict[str, Any]:
        """What `run` says of it."""
        domain = self.domain
        tops = _tops(domain.task, domain.space, scores_N, topk)
        found = {"video": str(self.video), "domain": domain.name, "task": domain.task.name, **tops}
        about = {n: {"tokens": len(s.tokens_MD), "missing": s.missing} for n, s in self.streams.items()}
        return found | ({"streams": about} if about else {})


def _groups(videos: Iterable[tuple[Path, _Domain]], sides: Mapping[str, Path], batch: int) -> Iterator[list[_Clip]]:
    """The videos read, in groups of `batch` views or more, but for the last; each is there until the next.

    Raises MdlError for a video that cannot be decoded, after the group of what came before it.
    """
    group: list[_Clip] = []
    for video, domain in videos:
        try:
            group.append(domain.read(video, sides))
        except VideoError as error:
            yield group
            raise MdlError(f"the video cannot be used: {error.reason}", video, "give another file") from None
        if sum(len(clip.frames) for clip in group) >= batch:
            yield group
            group.clear()
    yield group


def _check_sides(sides: Mapping[str, Path], domains: Iterable[_Domain]) -> None:
    known = {name: None for domain in domains for name in domain.streams}
    for name in sides:
        if name not in known:
            fix = did_you_mean(name, known) if known else "leave it out"
            raise MdlError(f"the model has no stream '{name}' there", f"--side {name}", fix)


def _sides_of(video: Path, sides: Mapping[str, Path], infos: Mapping[str, StreamInfo]) -> dict[str, Path]:
    """The side files of one video's streams; of a folder the file of its name, if there is one."""
    found: dict[str, Path] = {}
    for name, path in sides.items():
        if name not in infos:
            continue
        kind = "features" if infos[name].extractor == FILES else infos[name].kind
        own = path if path.is_file() else Sides(path, kind, video.parent, f"--side {name}").of(video)
        if own is not None:
            found[name] = own
    return found


def _domain_of_each(
    given: Sequence[str], videos: int, known: Mapping[str, Any], model_artifact: Artifact
) -> list[str]:
    """Each video's domain."""
    for name in given:
        if name not in known:
            raise MdlError(f"the model has no domain '{name}'", model_artifact.path, did_you_mean(name, known))
    if not given and len(known) > 1:
        raise MdlError("the model has several domains", model_artifact.path, f"--domain {' or '.join(known)}")
    given = given or list(known)
    if len(given) not in (1, videos):
        raise MdlError(
            f"{len(given)} domains were given for {videos} videos",
            "--domain",
            "give one domain for all videos, or one for each, in their order",
        )
    return list(given) * (videos if len(given) == 1 else 1)


def _tops(task: Task, space: LabelSpace, scores_N: Tensor, topk: int) -> dict[str, list[dict[str, Any]]]:
    """ "top", and what else a task has for a list."""
    if isinstance(task, Regression):
        return {"top": _top(space.classes, scores_N, None)}
    if not isinstance(task, VerbNoun):
        return {"top": _top(space.classes, scores_N, topk)}
    verbs, nouns = space.classes[: space.verbs], space.classes[space.verbs :]
    actions = [f"{verbs[verb]} {nouns[noun]}" for verb, noun in space.actions]
    return {
        "top": _top(actions, task.action_scores(scores_N), topk),
        "verbs": _top(verbs, scores_N[: space.verbs], topk),
        "nouns": _top(nouns, scores_N[space.verbs :], topk),
    }


def _top(names: Sequence[str], scores_N: Tensor, topk: int | None) -> list[dict[str, Any]]:
    """The best of the names with their scores, best first; None: all, in their order."""
    order = range(len(names)) if topk is None else scores_N.topk(min(topk, len(names))).indices.tolist()
    return [{"label": names[i], "score": float(scores_N[i])} for i in order]
