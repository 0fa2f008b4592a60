"""`compress --sweep`: what each rank costs and scores, before any fine-tuning. No stage itself."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mdltool import console
from mdltool.artifact import Artifact
from mdltool.compress import ranks
from mdltool.compress.factoring import Decomposed, multiplied
from mdltool.compress.ranks import Choice
from mdltool.data.index import ShardIndex
from mdltool.errors import MdlError
from mdltool.files import write_text
from mdltool.model_spec import ModelSpec
from mdltool.model_store import load_model
from mdltool.schema import Recipe
from mdltool.stages.compression import Amount, Svd, choose, read_model_tensors, rows, totals
from mdltool.stages.fitting import check_domain, score_split
from mdltool.stages.sources import check_sources
from mdltool.tasks import TASKS
from mdltool.train.distributed import join_world

RANKS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625)
_POINT = 0.01  # of a headline metric


@dataclass(frozen=True)
class Sweep:
    """Which ranks are scored, on which held-out shards, over the views of the recipe's `val`."""

    shards: Sequence[Artifact]
    ranks: Sequence[float] = RANKS
    workers: int = 1


def check_sweep(sweep: Sweep, content: Mapping[str, Any], amount: Amount) -> dict[str, tuple[Artifact, ShardIndex]]:
    """Domain -> shards to score on. Raises MdlError where there are none, or they are not the model's."""
    found: dict[str, tuple[Artifact, ShardIndex]] = {}
    for artifact in sweep.shards:
        index = ShardIndex.open(artifact)
        if index.split == "train":
            continue
        check_domain(artifact, index, content["domains"])
        check_sources(Recipe.model_validate(content["recipe"]), index)
        if index.domain in found:
            raise MdlError(f"two sets of shards for {index.domain}", artifact.path, "give one of them")
        found[index.domain] = (artifact, index)
    if not found:
        raise MdlError("there is no held-out split to score the ranks on", "--sweep", "--data DOMAIN=SHARDS (val)")
    errors = [d for d in found if not TASKS.load(content["domains"][d]["task"]).higher_is_better]
    if errors and not amount.given:
        what = f"{errors[0]} is scored by an error, of which no point is a percent"
        raise MdlError(what, "--sweep", "say which rank to take: --rank, --energy or --budget")
    return found


def swept(
    source: Artifact,
    decompose: Callable[[], Mapping[str, Decomposed]],
    amount: Amount,
    svd: Svd,
    sweep: Sweep,
    indices: Mapping[str, ShardIndex],
    folder: Path,
    work: Path,
) -> list[dict[str, Any]]:
    """Score the model as it is and at every rank; sweep.json, sweep.csv and sweep.png go to the folder.

    A resumed run finds its sweep there.
    """
    world = join_world()
    path = folder / "sweep.json"
    if path.is_file():
        points: list[dict[str, Any]] = json.loads(path.read_text())["points"]
        return points
    content = source.load_json("model.json")
    recipe, spec = Recipe.model_validate(content["recipe"]), ModelSpec.from_json(content["spec"])
    tensors, found = read_model_tensors(source, spec, fold_bn=svd.fold_bn), decompose()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(source, work=work).to(device).channels_last()
    total = content["parameters"]["total"]
    points = []
    with console.progress("sweep", len(sweep.ranks) + 1, "ranks") as advance:
        for rank in (*sorted(sweep.ranks), None):
            at = replace(amount, rank=rank, energy=None, budget=None)
            dense = {name: Choice(None, 1.0) for name in found}
            choices = dense if rank is None else choose(found, at, svd.weighting)
            model.load_tensors(multiplied(tensors, found, choices), source.path, bool(content["own_backbone"]))
            scores = {d: score_split(recipe, model, d, i, sweep.workers, world) for d, i in indices.items()}
            table = rows(found, choices)
            whole = totals(table)
            points.append(
                {
                    "rank": rank,
                    "adapters": whole["stored"],
                    "parameters": total - whole["dense"] + whole["stored"],
                    "retained": whole["retained"],
                    "scores": {d: _headline(recipe, d, values) for d, values in scores.items()},
                    "metrics": scores,
                }
            )
            advance()
    if world.is_main:
        _write(folder, points, recipe)
    return points


def smallest_good(points: Sequence[Mapping[str, Any]], amount: Amount) -> Amount:
    """The amount that was asked for; else the smallest rank whose mean is within a point of the uncompressed."""
    if amount.given:
        return amount
    *compressed, dense = points
    good = [point for point in compressed if mean_score(point) >= mean_score(dense) - _POINT]
    chosen = min(good, key=lambda point: point["parameters"]) if good else max(compressed, key=mean_score)
    far = "" if good else ", though no rank is within a point of the uncompressed model"
    console.say(f"rank {chosen['rank']:g} is taken{far}")
    return replace(amount, rank=chosen["rank"])


def mean_score(point: Mapping[str, Any]) -> float:
    """Over the domains that were scored."""
    scores = point["scores"]
    return float(sum(scores.values()) / len(scores))


def _headline(recipe: Recipe, domain: str, values: Mapping[str, float]) -> float:
    return values[TASKS.load(recipe.domains[domain].task).headline]


def _write(folder: Path, points: Sequence[Mapping[str, Any]], recipe: Recipe) -> None:
    from mdltool.report.plots import sweep_png

    metrics = {domain: TASKS.load(recipe.domains[domain].task).headline for domain in points[0]["scores"]}
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["rank", "adapters", "parameters", "retained", *(f"{d}.{m}" for d, m in metrics.items()), "mean"]
    )
    for point in points:
        size = [point["adapters"], point["parameters"], f"{point['retained']:.6f}"]
        scores = [f"{value:.6f}" for value in (*point["scores"].values(), mean_score(point))]
        lines.writerow(["dense" if point["rank"] is None else f"{point['rank']:g}", *size, *scores])
    write_text(folder / "sweep.csv", text.getvalue())
    sweep_png(folder / "sweep.png", points)
    # The last: a resumed run takes the sweep for done where it is.
    write_text(folder / "sweep.json", json.dumps({"metrics": metrics, "points": points}, indent=1))


def parse_ranks(text: str) -> tuple[float, ...]:
    """ "0.125,0.25,8" as ranks, whole numbers and fractions. Raises MdlError for anything else."""
    found: list[float] = []
    for part in text.split(","):
        try:
            found.append(int(part) if part.strip().isdigit() else float(part))
        except ValueError:
            raise MdlError(f"'{text}' is no list of ranks", "--sweep-ranks", "e.g. 0.125,0.25,0.5") from None
    for rank in found:
        ranks.by_rank([], rank)
    return tuple(dict.fromkeys(found))
