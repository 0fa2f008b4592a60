"""mdltool fuse."""

from __future__ import annotations

from typing import Annotated

import typer

from mdltool.cli import options
from mdltool.errors import MdlError


def register(app: typer.Typer) -> None:
    app.command("fuse", epilog="Example: mdltool fuse artifacts/model/tiny_demo --domain chalk")(fuse)


def fuse(
    model: options.Model = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="The domain to keep (default: the only one).")
    ] = None,
    fold_bn: Annotated[
        bool, typer.Option("--fold-bn/--no-fold-bn", help="Fold BatchNorms into the convolution before them, too.")
    ] = False,
    keep_original: Annotated[
        bool, typer.Option("--keep-original/--no-keep-original", help="Keep the model's files for --undo.")
    ] = True,
    undo: Annotated[
        bool, typer.Option("--undo", help="MODEL is a fused one: give back what it was made from.")
    ] = False,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Fold one domain's adapters into the backbone's weights; what cannot be folded exactly is refused.

    The fused model computes the same and costs what the bare backbone costs.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve

    if undo and (domain is not None or fold_bn or not keep_original):
        raise MdlError("--undo takes the model alone", "--undo", "leave the other options out")
    place = work_dir(work)
    source = resolve(model, "model", place)

    from mdltool.stages import fuse as stage

    name = source.path.resolve().name
    if undo:
        artifact = stage.undo(source, out or place / "model" / f"{name}-undone")
    else:
        target = out or place / "model" / f"{name}-fused{f'-{domain}' if domain else ''}"
        artifact = stage.run(source, domain, target, work=place, fold_bn=fold_bn, keep_original=keep_original)
    console.emit(artifact, as_json)
