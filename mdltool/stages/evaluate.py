"""`eval`: a model on its domains' shards, over T x S views -> eval artifact."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mdltool import console
from mdltool.artifact import Artifact, Draft
from mdltool.data.index import ShardIndex
from mdltool.data.loader import ViewLoader
from mdltool.errors import MdlError
from mdltool.evaluate.decathlon import Decathlon, accuracies_of, check_task
from mdltool.evaluate.metrics import domain_report, mean_over_domains, write_scores
from mdltool.evaluate.scores import DomainScores, score_domain
from mdltool.evaluate.views import parse_views
from mdltool.files import write_text
from mdltool.model import MultiDomainModel
from mdltool.model_store import load_model
from mdltool.registry import did_you_mean
from mdltool.schema import Recipe
from mdltool.stages.fitting import check_domain
from mdltool.stages.plan import eval_views, grid_of, modalities
from mdltool.stages.sources import check_sources
from mdltool.tasks import task_of
from mdltool.train.distributed import gather_objects, join_world
from mdltool.train.together import make_together


def run(
    model_artifact: Artifact,
    shards: Iterable[Artifact],
    out: Path,
    *,
    views: str | None = None,
    weights: str = "last",
    precision: str | None = None,
    decathlon: Decathlon | None = None,
    without: Collection[str] = (),
    work: Path | None = None,
    workers: int = 1,
) -> Artifact:
    """Score every clip once over all processes; rank 0 writes the artifact and every rank returns it.

    views: TxS, default the recipe's. precision: fp32, bf16 or fp16, default the recipe's. decathlon: what the score
    over domains is taken against; None: no such score. without: streams, or kinds of them, that no clip is given.
    """
    content = model_artifact.load_json("model.json")
    recipe = Recipe.model_validate(content["recipe"])
    grid = views or recipe.views.grid
    precision = precision or recipe.train.precision
    parse_views(grid)  # refuses a malformed grid before any work
    indices = _check_shards(content, list(shards))
    if decathlon is not None:
        for domain, (artifact, index) in indices.items():
            check_task(domain, index.task, artifact.path)
        decathlon.check(indices, "--decathlon")
    grids = {domain: grid_of(recipe, domain, views) for domain in indices}
    _check_without(recipe, indices, without)
    for _, index in indices.values():
        check_sources(recipe, index, without)
    request: dict[str, Any] = {"views": grid, "weights": weights, "precision": precision}
    if any(own != grid for own in grids.values()):
        request["grids"] = grids
    if decathlon is not None:  # an eval without it keeps the request that it always had
        request["decathlon"] = asdict(decathlon)
    if without:
        request["without"] = sorted(without)

    def make(draft: Draft | None) -> None:
        with draft or nullcontext():
            model = load_model(model_artifact, weights, work).to(_device()).channels_last()
            found = {
                d: _score(model, recipe, d, index, grids[d], without, precision, workers)
                for d, (_, index) in indices.items()
            }
            if draft is not None:
                head = {"model_digest": model_artifact.digest, "views": grid, "weights": weights}
                report = _report(recipe, found, indices, grids, head, precision)
                _add_streams(report, recipe, indices, without)
                if decathlon is not None:
                    report["metrics"]["decathlon"] = decathlon.score(accuracies_of(report["metrics"], out))
                _write(draft, report, found, indices)

    inputs = [model_artifact.as_input("model")] + [a.as_input("data") for a, _ in indices.values()]
    return make_together(out, make, kind="eval", stage="eval", inputs=inputs, request=request)


def _check_shards(content: dict[str, Any], shards: list[Artifact]) -> dict[str, tuple[Artifact, ShardIndex]]:
    found = {}
    for artifact in shards:
        index = ShardIndex.open(artifact)
        check_domain(artifact, index, content["domains"])
        if index.domain in found:
            raise MdlError(f"two sets of shards for {index.domain}", artifact.path, "give one of them")
        found[index.domain] = (artifact, index)
    if not found:
        raise MdlError("there are no shards to evaluate on", None, "--data DOMAIN=PATH")
    return {d: found[d] for d in content["domains"] if d in found}


def _check_without(recipe: Recipe, domains: Iterable[str], without: Collection[str]) -> None:
    """Raise MdlError for a modality that none of the domains has, which could not be missing."""
    have = {name: recipe.streams[name].kind for domain in domains for name in recipe.streams_of(domain)}
    for word in without:
        if word not in have and word not in have.values():
            named = ", ".join(have) or "no streams"
            fix = did_you_mean(word, {*have, *have.values()}) if have else "leave it out"
            raise MdlError(f"the model reads no '{word}' (it reads {named})", "--without", fix)


def _add_streams(
    report: dict[str, Any],
    recipe: Recipe,
    indices: dict[str, tuple[Artifact, ShardIndex]],
    without: Collection[str],
) -> None:
    """Of a model with streams: which of them were read, and how many clips have each."""
    if recipe.streams:
        for domain, entry in report["metrics"]["domains"].items():
            there = indices[domain][1].streams
            read = modalities(recipe, domain, without)
            entry["streams"] = {name: there[name].clips if name in there else 0 for name in read}


def _score(
    model: MultiDomainModel,
    recipe: Recipe,
    domain: str,
    index: ShardIndex,
    grid: str,
    without: Collection[str],
    precision: str,
    workers: int,
) -> DomainScores | None:
    """One domain's scores over all processes, on rank 0; None elsewhere."""
    world = join_world()
    loader = ViewLoader(
        index,
        eval_views(recipe, domain, grid),
        workers=workers,
        rank=world.rank,
        world=world.size,
        modalities=modalities(recipe, domain, without),
    )
    task = task_of(index.space)
    mine = len(range(world.rank, len(index), world.size))
    with console.progress(f"eval {domain}", mine) as advance:
        own = score_domain(
            model,
            loader,
            domain,
            task,
            average=recipe.views.average,
            device=_device(),
            autocast=lambda: _autocast(precision),
            advance=advance,
        )
    parts = gather_objects(own, world)
    return parts[0].merge(parts[1:]) if parts is not None else None


def _report(
    recipe: Recipe,
    found: dict[str, DomainScores | None],
    indices: dict[str, tuple[Artifact, ShardIndex]],
    grids: dict[str, str],
    head: dict[str, Any],
    precision: str,
) -> dict[str, Any]:
    """The contents of metrics.json and confusion.json, which has the domains of tasks with a confusion."""
    domains, confusion = {}, {}
    for domain, scores in found.items():
        assert scores is not None
        artifact, index = indices[domain]
        entry, matrix = domain_report(scores, task_of(index.space), index, recipe.views.on_error == "wrong")
        entry |= {
            "split": index.split,
            "split_digest": artifact.digest,
            "precision": precision,
            "views": grids[domain],
        }
        domains[domain] = entry
        if matrix is not None:
            confusion[domain] = {"classes": index.space.row_names, "matrix": matrix}
        _say_collapsed(domain, scores, grids[domain])
    metrics = {**head, "domains": domains, "mean": mean_over_domains(domains), "decathlon": None}
    return {"metrics": metrics, "confusion": confusion}


def _summary(metrics: dict[str, Any]) -> dict[str, Any]:
    domains = {domain: entry["metrics"] for domain, entry in metrics["domains"].items()}
    summary = {"views": metrics["views"], "domains": domains, "mean": metrics["mean"]}
    if metrics["decathlon"] is not None:
        summary["decathlon"] = metrics["decathlon"]["score"]
    return summary


def _write(
    draft: Draft,
    report: dict[str, Any],
    found: dict[str, DomainScores | None],
    indices: dict[str, tuple[Artifact, ShardIndex]],
) -> None:
    write_text(draft.path / "metrics.json", json.dumps(report["metrics"], indent=1))
    write_text(draft.path / "confusion.json", json.dumps(report["confusion"]))
    scores = {d: f for d, f in found.items() if f is not None}
    write_scores(draft.path / "scores.parquet", scores, {d: index for d, (_, index) in indices.items()})
    draft.commit(_summary(report["metrics"]))


def _say_collapsed(domain: str, scores: DomainScores, grid: str) -> None:
    temporal, spatial = map(int, grid.split("x"))
    if scores.distinct_views is not None and scores.distinct_views < temporal * spatial:
        console.say(
            f"{domain}: some clips are so short or narrow that their {temporal * spatial} views are only "
            f"{scores.distinct_views} distinct ones"
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(precision: str) -> AbstractContextManager[None]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(_device().type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
