"""mdltool add-domain."""

from __future__ import annotations

from typing import Annotated

import typer

from mdltool.cli import options
from mdltool.errors import MdlError


def register(app: typer.Typer) -> None:
    example = "Example: mdltool add-domain artifacts/model/tiny_demo --data dusk=artifacts/shards/dusk-train"
    app.command("add-domain", epilog=example)(add_domain)


def add_domain(
    model: options.Model = None,
    data: options.Data = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="Start as this domain of the model instead of afresh.")
    ] = None,
    overrides: options.Set = None,
    resume: options.Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Train a new domain on a finished model; every old tensor and every old output stays bit-identical.

    Trains the last step of the model's recipe on the new domain's adapters, head and BatchNorm statistics; --set
    changes it, e.g. --set train.steps.0.updates=500.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve, shards_for, workers_or_default

    domains = {entry.partition("=")[0] for entry in data or ()}
    if len(domains) != 1:
        raise MdlError("give the shards of one new domain", "--data", "--data DOMAIN=artifacts/shards/DOMAIN-train")
    (domain,) = domains
    place = work_dir(work)
    source = resolve(model, "model", place)
    shards = shards_for(data, place, [domain], ("val",))

    from mdltool.stages import add_domain as stage

    target = out or place / "model" / f"{source.path.resolve().name}+{domain}"
    count = workers_or_default(workers)
    artifact = stage.run(
        source,
        domain,
        shards,
        target,
        work=place,
        overrides=overrides or (),
        start_from=init_from,
        resume=resume,
        workers=count,
    )
    console.emit(artifact, as_json)
