"""Options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None, typer.Argument(help="A model artifact (default: piped, or the latest).", metavar="[MODEL]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of the result.")]
Work = Annotated[
    Path | None, typer.Option("--work", help="Work directory (default: $MDLTOOL_WORK, else ./artifacts).")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="The artifact directory to make (default: in the work directory)."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="DOMAIN=SHARDS, a path or an http, s3 or gs address; repeat it. The shards tell the split.",
        metavar="D=PATH",
    ),
]
Recipe = Annotated[str, typer.Option("--recipe", help="A recipe's name (mdltool recipe list) or a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one key of the recipe; repeat it.", metavar="KEY=VALUE"),
]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Processes that read and decode.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")]
Weights = Annotated[str, typer.Option("--weights", help="Which of the model's: last, best or ema (averaged).")]
Views = Annotated[
    str | None, typer.Option("--views", help="T positions x S crops (default: the recipe's).", metavar="TxS")
]
