"""`predict`: labels for video files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mdltool.artifact import Artifact
from mdltool.data.decode import VideoError
from mdltool.data.loader import ClipViews
from mdltool.errors import MdlError
from mdltool.evaluate.scores import score_domain
from mdltool.evaluate.views import load_views
from mdltool.model_store import load_model
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.plan import eval_views
from mdltool.tasks import TASKS, Regression, Task


def run(
    model_artifact: Artifact,
    videos: Iterable[Path],
    domain: str | None,
    *,
    topk: int = 5,
    views: str | None = None,
    weights: str = "last",
    work: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One object per video: {"video", "domain", "task", "top": [{"label", "score"}]}, best first.

    score: the softmax probability of single_label, the sigmoid of multi_label. Of a regression, every target in
    the model's order with its value, whatever topk. domain may be left out for a model of one domain. Raises
    MdlError for a video that cannot be decoded.
    """
    content = model_artifact.load_json("model.json")
    domains = content["domains"]
    if domain is None and len(domains) == 1:
        (domain,) = domains
    if domain is None:
        raise MdlError("the model has several domains", model_artifact.path, f"--domain {' or '.join(domains)}")
    if domain not in domains:
        raise MdlError(f"the model has no domain '{domain}'", model_artifact.path, did_you_mean(domain, domains))
    videos = list(videos)
    for video in videos:
        if not video.is_file():
            raise MdlError("there is no such video file", video, "check the path")
    recipe = Recipe.model_validate(content["recipe"])
    spec = eval_views(recipe, domain, views)
    model = load_model(model_artifact, weights, work)
    task = TASKS.load(recipe.domains[domain].task)()
    for video in videos:
        try:
            loaded = load_views(video, spec, key=video.stem)
        except VideoError as error:
            raise MdlError(f"the video cannot be used: {error.reason}", video, "give another file") from None
        clip = ClipViews(key=str(video), views=loaded, error=None)
        found = score_domain(model, [clip], domain, task, average=recipe.views.average)
        top = _top(task, domains[domain]["classes"], found.scores[0], topk)
        yield {"video": str(video), "domain": domain, "task": task.name, "top": top}


def _top(task: Task, classes: Sequence[str], scores_N: Tensor, topk: int) -> list[dict[str, Any]]:
    order = list(range(len(classes)))
    if not isinstance(task, Regression):
        order = scores_N.topk(min(topk, len(classes))).indices.tolist()
    return [{"label": classes[i], "score": float(scores_N[i])} for i in order]
