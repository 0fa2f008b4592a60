"""`predict`: labels for video files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
from mdltool.tasks import TASKS


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
    """One object per video: {"video", "domain", "top": [{"label", "score"}]}, best first.

    domain may be left out for a model of one domain. Raises MdlError for a video that cannot be decoded.
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
    spec = eval_views(recipe, views)
    model = load_model(model_artifact, weights, work)
    task = TASKS.load(recipe.domains[domain].task)()
    for video in videos:
        try:
            loaded = load_views(video, spec, key=video.stem)
        except VideoError as error:
            raise MdlError(f"the video cannot be used: {error.reason}", video, "give another file") from None
        clip = ClipViews(key=str(video), label=0, views=loaded, error=None)
        found = score_domain(model, [clip], domain, task, average=recipe.views.average)
        values, order = found.scores[0].topk(min(topk, len(domains[domain]["classes"])))
        labels = [domains[domain]["classes"][i] for i in order.tolist()]
        top = [{"label": label, "score": score} for label, score in zip(labels, values.tolist(), strict=True)]
        yield {"video": str(video), "domain": domain, "top": top}
