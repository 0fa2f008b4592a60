"""`predict`: labels for video files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from mdltool.evaluate.views import load_views
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
    specs = {name: eval_views(recipe, name, views) for name in set(chosen)}
    tasks: dict[str, Task] = {name: task_of(spaces[name]) for name in specs}
    infos = {name: _infos(recipe, name) for name in specs}
    _check_sides(sides or {}, infos)
    model = load_model(model_artifact, weights, work)
    waiting: list[tuple[Path, str, Tensor, dict[str, VideoStream]]] = []

    def scored() -> Iterator[dict[str, Any]]:
        clips = [(domain, frames) for _, domain, frames, _ in waiting]
        given = [{n: torch.from_numpy(s.tokens_MD) for n, s in streams.items()} for *_, streams in waiting]
        scores = score_mixed(model, clips, tasks, recipe.views.average, batch, given)
        for (video, domain, _, streams), scores_N in zip(waiting, scores, strict=True):
            tops = _tops(tasks[domain], spaces[domain], scores_N, topk)
            about = {n: {"tokens": len(s.tokens_MD), "missing": s.missing} for n, s in streams.items()}
            found = {"video": str(video), "domain": domain, "task": tasks[domain].name, **tops}
            yield found | ({"streams": about} if about else {})
        waiting.clear()

    for video, domain in zip(videos, chosen, strict=True):
        try:
            loaded = load_views(video, specs[domain], key=video.stem)
            own = {name: path for name, path in (sides or {}).items() if name in infos[domain]}
            streams = streams_of_video(video, infos[domain], sides=_sides_of(video, own, infos[domain]))
        except VideoError as error:
            yield from scored()
            raise MdlError(f"the video cannot be used: {error.reason}", video, "give another file") from None
        waiting.append((video, domain, loaded.frames, streams))
        if sum(len(frames) for _, _, frames, _ in waiting) >= batch:
            yield from scored()
    yield from scored()


def _infos(recipe: Recipe, domain: str) -> dict[str, StreamInfo]:
    """What made the streams of a domain."""
    return {name: source_of(recipe.streams[name]) for name in recipe.streams_of(domain)}


def _check_sides(sides: Mapping[str, Path], infos: Mapping[str, Mapping[str, StreamInfo]]) -> None:
    known = {name: None for own in infos.values() for name in own}
    for name in sides:
        if name not in known:
            fix = did_you_mean(name, known) if known else "leave it out"
            raise MdlError(f"the model has no stream '{name}' there", f"--side {name}", fix)


def _sides_of(video: Path, sides: Mapping[str, Path], infos: Mapping[str, StreamInfo]) -> dict[str, Path]:
    """The side files of one video; of a folder the file of its name, if there is one."""
    found: dict[str, Path] = {}
    for name, path in sides.items():
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
