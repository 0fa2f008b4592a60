"""mdltool overlap: source videos that stand in a training list and in a held-out list."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.stages.overlap import Comparison, Overlap, Side

_EXAMPLES_SHOWN = 3


def register(app: typer.Typer) -> None:
    example = "Example: mdltool overlap artifacts/shards/k400-train artifacts/shards/anet-val --list drop.txt"
    app.command("overlap", epilog=example)(overlap)


def overlap(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Shards artifacts, training and held-out ones (default: piped).", metavar="SHARDS..."),
    ] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Write the keys of the training clips concerned, one a line.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Source videos that stand in one domain's training list and in a val or test list, its own or another's."""
    from mdltool import console
    from mdltool.artifact import open_artifact
    from mdltool.cli.inputs import piped_paths

    paths = shards or piped_paths()
    if not paths:
        raise MdlError("no shards are given", "SHARDS", "mdltool overlap TRAIN VAL [SHARDS ...]")
    if list_file is not None and not list_file.parent.is_dir():
        raise MdlError("there is no such directory", list_file.parent, "give another --list FILE")
    if list_file is not None and list_file.is_dir():
        raise MdlError("this is a directory", list_file, "give another --list FILE")

    from mdltool.stages import overlap as stage

    found = stage.run([open_artifact(path, "shards") for path in paths])
    if list_file is not None:
        _write(list_file, found)
    if as_json:
        console.result_json(_json(found))
    else:
        _print(found)


def _write(path: Path, found: Comparison) -> None:
    from mdltool import console
    from mdltool.files import write_text

    keys = {(o.train.domain, key) for o in found.overlaps for key in o.train_keys}
    write_text(path, "".join(f"{key}\n" for key in sorted({key for _, key in keys})))
    domains = sorted({domain for domain, _ in keys})
    console.say(f"wrote {len(keys)} keys to {path}")
    if len(domains) > 1:
        console.warn(f"the keys are of several domains ({', '.join(domains)}): give one training list at a time")


def _print(found: Comparison) -> None:
    from mdltool import console

    for what, lists in (("training", found.train), ("held out", found.test)):
        console.say(f"{what}: {', '.join(f'{_name(side)} ({clips} clips)' for side, clips in lists)}")
    if not found.overlaps:
        console.result("no overlap")
        return
    columns = ("training", "held out", "shared videos", "training clips", "held-out clips", "e.g.")
    rows = [
        (_name(o.train), _name(o.test), len(o.videos), len(o.train_keys), len(o.test_keys), _examples(o))
        for o in found.overlaps
    ]
    console.table("source videos in both lists", columns, rows, to_stdout=True)


def _examples(found: Overlap) -> str:
    more = " ..." if len(found.videos) > _EXAMPLES_SHOWN else ""
    return ", ".join(found.videos[:_EXAMPLES_SHOWN]) + more


def _name(side: Side) -> str:
    return f"{side.domain}-{side.split}"


def _json(found: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "compared": {
            role: [{**asdict(side), "clips": clips} for side, clips in lists]
            for role, lists in (("train", found.train), ("test", found.test))
        },
        "overlaps": [asdict(entry) for entry in found.overlaps],
    }
