"""mdltool synth: generated domains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdltool.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command("synth", epilog="Example: mdltool synth --out videos --clips-per-class 24 --seed 0")(synth)


def synth(
    out: Annotated[Path, typer.Option("--out", help="Directory for the videos or images.")],
    domains: Annotated[
        str, typer.Option(help="Of chalk, neon, field, paper, dusk, mosaic, sound; comma-separated.")
    ] = "chalk,neon,field",
    clips_per_class: Annotated[int, typer.Option(help="Training clips per class; other splits get half.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
    splits: Annotated[str, typer.Option(help="Comma-separated.")] = "train,val",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes (default: one per core).")] = None,
    images: Annotated[
        bool, typer.Option("--images", help="PNG images, of the classes that a single frame shows.")
    ] = False,
    missing: Annotated[
        float, typer.Option(help="Share of the clips of 'sound' without sound, and of those without transcript.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Write generated video domains: OUT/<domain>/<split>/<class>/<clip>.mp4.

    Half of the classes come in pairs that are exact time reversals of each other, so a model without a sense of
    time cannot tell them apart. The domain 'sound' has videos with an audio track and a transcript (.srt) beside
    each: some of its classes are told by ear alone, some by what is said. Read them with:
    mdltool shard OUT/chalk/train --format folder
    """
    from mdltool import console
    from mdltool.data.synth import write_domains

    names = domains.split(",")
    written = write_domains(out, names, clips_per_class, seed, splits.split(","), workers, images, missing)
    if as_json:
        console.result_json(
            {
                "out": str(written.out),
                "domains": list(written.classes),
                "classes": {domain: list(names) for domain, names in written.classes.items()},
                "clips": written.clips,
            }
        )
    else:
        console.result(str(written.out))
