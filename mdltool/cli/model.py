"""mdltool model split, merge and rm."""

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
    group.command("split", epilog="Example: mdltool model split field artifacts/model/tiny_demo")(split)
    group.command(
        "merge",
        epilog="Example: mdltool model merge artifacts/domains/tiny_demo.field.safetensors artifacts/model/other",
    )(merge)
    group.command("rm", epilog="Example: mdltool model rm field artifacts/model/tiny_demo")(remove)
    app.add_typer(group, name="model")


def _group() -> None:
    """A finished model's domains."""


def split(
    domain: Annotated[str, typer.Argument(help="The domain to write.", metavar="DOMAIN")],
    model: options.Model = None,
    weights: options.Weights = "last",
    work: options.Work = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file (default: <work>/domains/<model>.<domain>.safetensors)."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write one domain's adapters, statistics and head as a file of their own; the model stays as it is."""
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve
    from mdltool.stages import split_domain as stage

    place = work_dir(work)
    source = resolve(model, "model", place)
    parts = [source.path.resolve().name, domain] + ([] if weights == "last" else [weights])
    target = out or place / "domains" / f"{'.'.join(parts)}.safetensors"
    found = stage.run(source, domain, target, weights=weights, work=place)
    if as_json:
        console.result_json(found)
    else:
        console.result(found["artifact"])


def merge(
    file: Annotated[Path, typer.Argument(help="A file that `model split` wrote.", metavar="FILE")],
    model: options.Model = None,
    name: Annotated[
        str | None,
        typer.Option("--as", help="The domain's name in the model (default: the file's).", metavar="NAME"),
    ] = None,
    weights: options.Weights = "last",
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Write the model with a domain of another one that has the same backbone; every old tensor stays."""
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve
    from mdltool.domain_pack import read_pack
    from mdltool.stages import merge_domain as stage

    place = work_dir(work)
    pack = read_pack(file, verify=True)
    source = resolve(model, "model", place)
    name = name or pack.domain
    target = out or place / "model" / f"{source.path.resolve().name}+{name}"
    console.emit(stage.run(source, pack, name, target, weights=weights, work=place), as_json)


def remove(
    domain: Annotated[str, typer.Argument(help="The domain to take away.", metavar="DOMAIN")],
    model: options.Model = None,
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
