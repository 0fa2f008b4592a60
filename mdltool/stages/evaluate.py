"""`eval`: a model on its domains' shards, over T x S views -> eval artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
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

Indices = dict[str, tuple[Artifact, ShardIndex]]
"""Domain -> its shards, and what they hold."""


@dataclass(frozen=True)
class Scoring:
    """How clips are scored.

    views: TxS, default the recipe's. precision: fp32, bf16 or fp16, default the recipe's. decathlon: what the score
    over domains is taken against; None: no such score. without: streams, or kinds of them, that no clip is given.
    """

    views: str | None = None
    weights: str = "last"
    precision: str | None = None
    decathlon: Decathlon | None = None
    without: tuple[str, ...] = ()


def default_name(model: str, split: str, scoring: Scoring) -> str:
    """The artifact's name in the work directory. model: its name."""
    said = [f"without-{word}" for word in scoring.without]
    said += [scoring.weights] * (scoring.weights != "last") + ["decathlon"] * (scoring.decathlon is not None)
    return "-".join([model, scoring.views or "views", split, *said])


def run(
    model_artifact: Artifact,
    shards: Iterable[Artifact],
    out: Path,
    scoring: Scoring = Scoring(),
    *,
    work: Path | None = None,
    workers: int = 1,
) -> Artifact:
    """Score every clip once over all processes; rank 0 writes the artifact and every rank returns it."""
    content = model_artifact.load_json("model.json")
    recipe = Recipe.model_validate(content["recipe"])
    grid = scoring.views or recipe.views.grid
    parse_views(grid)  # refuses a malformed grid before any work
    indices = _check_shards(content, list(shards))
    grids = {domain: grid_of(recipe, domain, scoring.views) for domain in indices}
    protocol = _Protocol(recipe, scoring, grid, grids, scoring.precision or recipe.train.precision)
    protocol.check(indices)
    decathlon = scoring.decathlon

    def make(draft: Draft | None) -> None:
        with draft or nullcontext():
            model = load_model(model_artifact, scoring.weights, work).to(_device()).channels_last()
            found = {d: _score(model, protocol, index, workers) for d, (_, index) in indices.items()}
            if draft is not None:
                head = {"model_digest": model_artifact.digest, "views": grid, "weights": scoring.weights}
                report = _report(protocol, found, indices, head)
                if decathlon is not None:
                    report["metrics"]["decathlon"] = decathlon.score(accuracies_of(report["metrics"], out))
                _write(draft, report, found, indices)

    inputs = [model_artifact.as_input("model")] + [a.as_input("data") for a, _ in indices.values()]
    return make_together(out, make, kind="eval", stage="eval", inputs=inputs, request=protocol.request())


@dataclass(frozen=True)
class _Protocol:
    """What decides the scores beside model and clips. grids: views by domain; grid: the usual ones."""

    recipe: Recipe
    scoring: Scoring
    grid: str
    grids: dict[str, str]
    precision: str

    def check(self, indices: Indices) -> None:
        """Raise MdlError for domains that the decathlon has not, for a modality that none of the domains has, which
        could not be missing, and for tokens that the model has not learned to read.
        """
        decathlon, without = self.scoring.decathlon, self.scoring.without
        if decathlon is not None:
            for domain, (artifact, index) in indices.items():
                check_task(domain, index.task, artifact.path)
            decathlon.check(indices, "--decathlon")
        streams = self.recipe.streams
        have = {name: streams[name].kind for domain in indices for name in self.recipe.streams_of(domain)}
        for word in without:
            if word not in have and word not in have.values():
                named = ", ".join(have) or "no streams"
                fix = did_you_mean(word, {*have, *have.values()}) if have else "leave it out"
                raise MdlError(f"the model reads no '{word}' (it reads {named})", "--without", fix)
        for _, index in indices.values():
            check_sources(self.recipe, index, without)

    def request(self) -> dict[str, Any]:
        scoring = self.scoring
        request: dict[str, Any] = {"views": self.grid, "weights": scoring.weights, "precision": self.precision}
        if any(own != self.grid for own in self.grids.values()):
            request["grids"] = self.grids
        if scoring.decathlon is not None:  # an eval without it keeps the request that it always had
            request["decathlon"] = asdict(scoring.decathlon)
        if scoring.without:
            request["without"] = sorted(scoring.without)
        return request

    def modalities(self, domain: str) -> dict[str, int]:
        """The streams that a domain's clips are given, and their widths."""
        return modalities(self.recipe, domain, self.scoring.without)


def _check_shards(content: dict[str, Any], shards: list[Artifact]) -> Indices:
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


def _score(model: MultiDomainModel, protocol: _Protocol, index: ShardIndex, workers: int) -> DomainScores | None:
    """One domain's scores over all processes, on rank 0; None elsewhere."""
    world = join_world()
    recipe, domain = protocol.recipe, index.domain
    loader = ViewLoader(
        index,
        eval_views(recipe, domain, protocol.grids[domain]),
        workers=workers,
        rank=world.rank,
        world=world.size,
        modalities=protocol.modalities(domain),
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
            autocast=lambda: _autocast(protocol.precision),
            advance=advance,
        )
    parts = gather_objects(own, world)
    return parts[0].merge(parts[1:]) if parts is not None else None


def _report(
    protocol: _Protocol, found: dict[str, DomainScores | None], indices: Indices, head: dict[str, Any]
) -> dict[str, Any]:
    """The contents of metrics.json and confusion.json, which has the domains of tasks with a confusion.

    Of a model with streams also which of them were read, and how many clips have each.
    """
    domains, confusion = {}, {}
    recipe, grids = protocol.recipe, protocol.grids
    for domain, scores in found.items():
        assert scores is not None
        artifact, index = indices[domain]
        entry, matrix = domain_report(scores, task_of(index.space), index, recipe.views.on_error == "wrong")
        entry |= {
            "split": index.split,
            "split_digest": artifact.digest,
            "precision": protocol.precision,
            "views": grids[domain],
        }
        if recipe.streams:
            there = index.streams
            entry["streams"] = {n: there[n].clips if n in there else 0 for n in protocol.modalities(domain)}
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
    indices: Indices,
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
