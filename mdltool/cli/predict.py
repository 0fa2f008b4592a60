"""mdltool predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

Paths = Annotated[
    list[Path],
    typer.Argument(help="A model artifact (default: piped, else the latest), then video or image files."),
]
Domain = Annotated[
    list[str] | None,
    typer.Option("--domain", help="Whose adapters and labels: once for all videos, or once a video, in order."),
]
Topk = Annotated[int, typer.Option("--topk", min=1, help="How many labels a video (a regression: all).")]
BatchSize = Annotated[
    int, typer.Option("--batch", min=1, help="Views, of whatever domains, in one pass through the model.")
]
Side = Annotated[
    list[str] | None,
    typer.Option(
        "--side",
        help="Of a stream, the side file of all videos, or a folder of files by their names.",
        metavar="STREAM=PATH",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("predict", epilog="Example: mdltool predict artifacts/model/tiny_demo walk.mp4 --domain chalk")(
        predict
    )


def predict(
    paths: Paths,
    domain: Domain = None,
    topk: Topk = 5,
    views: options.Views = None,
    batch: BatchSize = 32,
    weights: options.Weights = "last",
    side: Side = None,
    work: options.Work = None,
    as_json: options.Json = False,
) -> None:
    """Labels for video and image files, a line each: `video<TAB>label<TAB>score`; with --json one object a video.

    Of a domain with several labels a clip the scores are each class's own; of a regression, every target's value.
    Of verbs and nouns the actions are listed; --json has the verbs and the nouns too.
    """
    from mdltool.artifact import partial_path, work_dir
    from mdltool.cli.inputs import resolve

    place, first = work_dir(work), paths[0]
    unfinished = first.name.endswith(".partial") or (not first.exists() and partial_path(first).exists())
    given = first if first.is_dir() or unfinished else None
    if given is None and not first.exists():
        raise MdlError("there is no such model, video or image", first, "check the path")
    videos = paths[1:] if given else paths
    if not videos:
        raise MdlError("no video was given", "VIDEO", "mdltool predict [MODEL] VIDEO... --domain D")
    chosen = resolve(given, "model", place)

    from mdltool.data.modalities.asked import paths_of
    from mdltool.stages import predict as stage

    results = stage.run(
        chosen,
        videos,
        domain or (),
        topk=topk,
        views=views,
        weights=weights,
        batch=batch,
        work=place,
        sides=paths_of("--side", side or ()),
    )
    for found in results:
        _show(found, as_json)


def _show(found: dict[str, Any], as_json: bool) -> None:
    """One video's labels on stdout; what it was read without on stderr."""
    import json

    from mdltool import console

    for name, stream in found.get("streams", {}).items():
        if stream["missing"]:
            console.say(f"{found['video']}: without {name} ({stream['missing']})")
    if as_json:
        console.result(json.dumps(found, ensure_ascii=False))
        return
    for entry in found["top"]:
        console.result(f"{found['video']}\t{entry['label']}\t{entry['score']:.4f}")
