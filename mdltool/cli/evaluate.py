"""mdltool eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.evaluate.decathlon import Decathlon

Split = Annotated[str, typer.Option("--split", help="Which of the work directory's shards to score.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16.")]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="Score as if clips lacked this modality; repeat it.")
]
Contest = Annotated[bool, typer.Option("--decathlon", help="The Visual Decathlon's score over the domains, too.")]
ContestBaseline = Annotated[
    Path | None,
    typer.Option("--decathlon-baseline", help="Another baseline, a JSON of accuracies (DOMAIN -> percent)."),
]
ContestAdded = Annotated[
    list[str] | None,
    typer.Option("--decathlon-add", help="Accuracy of a domain not measured here; repeat it.", metavar="D=PERCENT"),
]
Scores = Annotated[
    Path | None,
    typer.Option("--scores", help="Score this JSON of accuracies (DOMAIN -> percent), or this eval, instead."),
]


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: mdltool train --recipe tiny_demo | mdltool eval --views 10x3")(evaluate)


def evaluate(
    model: options.Model = None,
    views: options.Views = None,
    data: options.Data = None,
    split: Split = "val",
    weights: options.Weights = "last",
    precision: Precision = None,
    without: Without = None,
    decathlon: Contest = False,
    baseline: ContestBaseline = None,
    added: ContestAdded = None,
    scores: Scores = None,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Score a model on its domains' shards: metrics, per-clip scores, per-class table, confusion.

    Run it under torchrun to share the clips among processes.
    """
    import os

    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve, shards_for, workers_or_default

    contest = _decathlon(decathlon, baseline, added, scores)
    if contest is not None and scores is not None:
        _refuse_beside_scores({"--views": views, "--precision": precision, "--out": out})
        _score(contest, scores, model or data, as_json)
        return
    _check_words(weights, precision)
    place = work_dir(work)
    chosen = resolve(model, "model", place)
    domains = list(chosen.summary["domains"])
    shards = shards_for(data, place, domains, () if data else (split,))
    if not shards:
        fix = f"shard the split '{split}' of a domain, or give --split or --data DOMAIN=PATH"
        raise MdlError("there are no shards to evaluate on", place / "shards" / f"{domains[0]}-{split}", fix)

    from mdltool.stages import evaluate as stage

    scoring = stage.Scoring(views, weights, precision, contest, tuple(without or ()))
    target = out or place / "eval" / stage.default_name(chosen.name, split, scoring)
    artifact = stage.run(chosen, shards, target, scoring, work=place, workers=workers_or_default(workers))
    if int(os.environ.get("RANK", "0")) == 0:
        _table(artifact.load_json("metrics.json"))
        console.emit(artifact, as_json)


def _refuse_beside_scores(given: dict[str, object]) -> None:
    """Raise MdlError for an option of scoring a model, where there is none and no artifact is written."""
    for option, value in given.items():
        if value is not None:
            raise MdlError("--scores takes accuracies that are there already", option, "leave it out")


def _check_words(weights: str, precision: str | None) -> None:
    for value, known, option in ((weights, _WEIGHTS, "--weights"), (precision, _PRECISIONS, "--precision")):
        if value is not None and value not in known:
            raise MdlError(f"'{value}' is not known", option, f"one of: {', '.join(known)}")


_WEIGHTS = ("last", "best", "ema")
_PRECISIONS = ("fp32", "bf16", "fp16")


def _table(metrics: dict[str, Any]) -> None:
    from mdltool import console
    from mdltool.evaluate.metrics import METRICS, shown

    domains = metrics["domains"]
    names = [name for name in METRICS if any(name in entry["metrics"] for entry in domains.values())]
    rows = []
    for domain, entry in domains.items():
        clips = entry["clips"]
        values = [shown(name, entry["metrics"].get(name)) for name in names]
        rows.append((domain, *values, clips["evaluated"], clips["listed"], len(clips["missing"])))
        for subset, own in entry.get("subsets", {}).items():
            values = [shown(name, own.get(name)) for name in names]
            rows.append((f"  {subset}", *values, own["clips"], "", ""))
    if len(domains) > 1 and metrics["mean"]:
        rows.append(("mean", *(shown(name, metrics["mean"].get(name)) for name in names), "", "", ""))
    headings = (f"{name} %" if METRICS[name].endswith("%") else name for name in names)
    columns = ("domain", *headings, "clips", "listed", "missing")
    console.table(f"{metrics['views']} views", columns, rows)
    if metrics["decathlon"] is not None:
        _decathlon_table(metrics["decathlon"])


def _decathlon(
    wanted: bool, baseline: Path | None, added: list[str] | None, scores: Path | None
) -> Decathlon | None:
    """What --decathlon asks for; None without it."""
    from mdltool.evaluate.decathlon import RA17, Decathlon, parse_added, read_baseline

    if not wanted:
        given = {"--decathlon-baseline": baseline, "--decathlon-add": added, "--scores": scores}
        for option, value in given.items():
            if value:
                raise MdlError(f"{option} is about the decathlon's score", option, "add --decathlon")
        return None
    return Decathlon(RA17 if baseline is None else read_baseline(baseline), parse_added(added or ()))


def _score(contest: Decathlon, source: Path, other: Path | list[str] | None, as_json: bool) -> None:
    """The score of accuracies that are there already, in a file or in an eval. other: what would be evaluated."""
    from mdltool import console
    from mdltool.artifact import open_artifact
    from mdltool.evaluate.decathlon import accuracies_of, read_accuracies

    if other:
        raise MdlError("--scores takes the place of a model and its data", "--scores", "leave out one or the other")
    if source.is_dir():
        accuracies = accuracies_of(open_artifact(source, "eval").load_json("metrics.json"), source)
    else:
        accuracies = read_accuracies(source)
    contest.check(accuracies, source)
    found = contest.score(accuracies)
    if as_json:
        console.result_json(found)
    else:
        _decathlon_table(found, to_stdout=True)


def _decathlon_table(found: dict[str, Any], to_stdout: bool = False) -> None:
    from mdltool import console
    from mdltool.evaluate.decathlon import headline, table

    columns, rows = table(found)
    console.table(f"Visual Decathlon, against {found['baseline']}", columns, rows, to_stdout)
    (console.result if to_stdout else console.say)(headline(found))
