"""mdltool report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdltool.cli import options


def register(app: typer.Typer) -> None:
    app.command("report", epilog="Example: mdltool report artifacts/eval/tiny_demo-10x3-val")(report)


def report(
    evals: Annotated[
        list[Path] | None,
        typer.Argument(help="Eval artifacts (default: piped, else the latest).", metavar="[EVAL]..."),
    ] = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """One self-contained HTML page: accuracy, learning curves, classes, confusion, parameters, lineage.

    With MST-Adapters also their learned branch weights; with a recipe of a paper also that paper's printed tables.
    """
    from mdltool import console
    from mdltool.artifact import open_artifact, work_dir
    from mdltool.cli.inputs import resolve

    place = work_dir(work)
    chosen = [open_artifact(path, "eval") for path in evals or ()] or [resolve(None, "eval", place)]

    from mdltool.stages import report as stage

    name = chosen[0].name if len(chosen) == 1 else f"{chosen[0].name}-and-{len(chosen) - 1}-more"
    artifact = stage.run(chosen, out or place / "report" / name)
    console.say(f"open {artifact.path / 'report.html'}")
    console.emit(artifact, as_json)
