"""mdltool train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.artifact import Artifact


def register(app: typer.Typer) -> None:
    example = "Example: mdltool train --recipe omi_x3dm_all --data ucf101=artifacts/shards/ucf101-train"
    app.command("train", epilog=example)(train)


def train(
    recipe: options.Recipe,
    data: options.Data = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="The domain that a recipe's only one stands for (tiny_single).")
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option("--backbone", help="Backbone artifact (default: the latest).")
    ] = None,
    overrides: options.Set = None,
    resume: options.Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Train a recipe's model: shards + backbone -> model."""
    from mdltool import console
    from mdltool.artifact import open_artifact, work_dir
    from mdltool.cli.inputs import piped_paths, shards_for, workers_or_default
    from mdltool.recipe import load, rename_domain

    loaded = load(recipe, overrides or ())
    loaded = rename_domain(loaded, domain) if domain else loaded
    place = work_dir(work)
    piped = [] if data and backbone else [open_artifact(path) for path in piped_paths() or []]
    chosen = open_artifact(backbone, "backbone") if backbone else None
    entries = list(data or ())
    for artifact in piped:
        if artifact.kind == "backbone" and chosen is None:
            chosen = artifact
        elif artifact.kind == "shards":
            entries.append(f"{artifact.summary.get('domain')}={artifact.path}")
        else:
            raise MdlError(
                f"train cannot use a {artifact.kind} artifact", artifact.path, "pipe shards or a backbone"
            )
    shards = shards_for(entries, place, list(loaded.domains), ("train", "val", "test"))

    from mdltool.stages import train as stage

    target = out or place / "model" / loaded.name
    count = workers_or_default(workers)
    artifact = stage.run(loaded, _one_held_out(shards), chosen, target, work=place, resume=resume, workers=count)
    if not resume and artifact.summary.get("seconds") is not None:
        console.say(f"{artifact.summary['updates']} updates, {artifact.summary['seconds']:.0f} s of training")
    console.emit(artifact, as_json)


def _one_held_out(shards: list[Artifact]) -> list[Artifact]:
    """Of a domain's default val and test shards, val alone validates."""
    has_val = {a.summary.get("domain") for a in shards if a.summary.get("split") == "val"}
    return [a for a in shards if a.summary.get("split") != "test" or a.summary.get("domain") not in has_val]
