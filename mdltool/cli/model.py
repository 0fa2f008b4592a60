"""mdltool model rm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdltool.cli import options


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="A finished model's domains.", add_completion=False
    )
    group.callback()(_group)
    group.command("rm", epilog="Example: mdltool model rm field artifacts/model/tiny_demo")(remove)
    app.add_typer(group, name="model")


def _group() -> None:
    """A finished model's domains."""


def remove(
    domain: Annotated[str, typer.Argument(help="The domain to take away.", metavar="DOMAIN")],
    model: Annotated[
        Path | None, typer.Argument(help="A model artifact (default: piped, or the latest).", metavar="[MODEL]")
    ] = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Write the model without a domain; every other tensor stays bit-identical."""
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve
    from mdltool.stages import remove_domain as stage

    place = work_dir(work)
    source = resolve(model, "model", place)
    target = out or place / "model" / f"{source.path.resolve().name}-{domain}"
    console.emit(stage.run(source, domain, target, work=place), as_json)
