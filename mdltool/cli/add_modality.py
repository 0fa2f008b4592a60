"""mdltool add-modality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.stages.add_modality import Start

Modality = Annotated[
    list[str], typer.Option("--modality", help="audio, flow, text, or a stream's name; repeat it.", metavar="M")
]
Plan = Annotated[
    str | None, typer.Option("--recipe", help="Take streams, cross-attention and training from this recipe.")
]
InitFrom = Annotated[
    str | None,
    typer.Option("--init-from", help="Start as the streams of this domain of a model.", metavar="MODEL:DOMAIN"),
]
TrainHead = Annotated[bool, typer.Option("--train-head", help="Train the heads beside the new streams.")]
EndToEnd = Annotated[
    bool, typer.Option("--end-to-end", help="Train all adapters and the head of the domains together.")
]


def register(app: typer.Typer) -> None:
    example = "Example: mdltool add-modality artifacts/model/mine --modality audio"
    app.command("add-modality", epilog=example)(add_modality)


def add_modality(
    model: options.Model = None,
    modality: Modality = [],  # noqa: B006 - typer copies it
    data: options.Data = None,
    recipe: Plan = None,
    init_from: InitFrom = None,
    end_to_end: EndToEnd = False,
    train_head: TrainHead = False,
    overrides: options.Set = None,
    resume: options.Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Train cross-attention to a new modality on a finished model; all that it was stays bit-identical.

    Clips without the modality keep their logits. --set changes the training, e.g. --set train.steps.0.updates=500.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import resolve, shards_for, workers_or_default
    from mdltool.recipe import load
    from mdltool.stages.modalities import Wanted

    if not modality:
        raise MdlError("nothing is said to be added", "--modality", "--modality audio, flow or text")
    place = work_dir(work)
    source = resolve(model, "model", place)
    plan = load(recipe) if recipe else None
    named = list(dict.fromkeys(entry.partition("=")[0] for entry in data or ()))
    shards = shards_for(
        data, place, named or list(source.summary["domains"]), ("val",) if named else ("train", "val")
    )

    from mdltool.stages import add_modality as stage

    words, sets = tuple(dict.fromkeys(modality)), tuple(overrides or ())
    wanted = Wanted(words, plan, sets, end_to_end, train_head, all_found=not named)
    name = "+".join([source.path.resolve().name, *wanted.modalities])
    artifact = stage.run(
        source,
        wanted,
        shards,
        out or place / "model" / name,
        work=place,
        start=_start(init_from),
        resume=resume,
        workers=workers_or_default(workers),
    )
    console.emit(artifact, as_json)


def _start(text: str | None) -> Start | None:
    from mdltool.artifact import open_artifact
    from mdltool.stages.add_modality import Start

    if text is None:
        return None
    path, colon, domain = text.rpartition(":")
    if not colon or not path or not domain:
        raise MdlError(f"'{text}' is no MODEL:DOMAIN", "--init-from", "e.g. artifacts/model/mine+audio:kitchen")
    return Start(open_artifact(path, "model"), domain)
