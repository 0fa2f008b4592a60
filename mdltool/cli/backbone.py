"""mdltool backbone list|show|fetch|import|pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.schema import Recipe


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, rich_markup_mode=None, help="Weights -> backbone artifacts.", add_completion=False
    )
    group.command("list", epilog="Example: mdltool backbone list")(list_backbones)
    group.command("show", epilog="Example: mdltool backbone show x3d_m")(show)
    group.command("fetch", epilog="Example: mdltool backbone fetch x3d_m")(fetch)
    group.command("import", epilog="Example: mdltool backbone import x3d_m --file X3D_M.pyth")(import_backbone)
    group.command(
        "pretrain", epilog="Example: mdltool backbone pretrain --data chalk=artifacts/shards/chalk-train"
    )(pretrain)
    app.add_typer(group, name="backbone")


def list_backbones(as_json: options.Json = False) -> None:
    """Every backbone with its parameters, input and sites."""
    from mdltool import console
    from mdltool.backbones import BACKBONES

    found = [_describe(name, with_sites=as_json) for name in BACKBONES]
    if as_json:
        console.result_json({"backbones": found})
        return
    rows = []
    for b in found:
        size = f"{b['frames']}x{b['crop']}x{b['crop']}"
        rows.append(
            (b["name"], b["about"], f"{b['parameters']:,}", size, b["kinds"], " ".join(b["weights"]) or "-")
        )
    head = ("name", "about", "parameters", "input", "kinds of sites", "weights")
    console.table("Backbones", head, rows, to_stdout=True)


def show(
    name: Annotated[str, typer.Argument(help="A backbone's name.", metavar="NAME")], as_json: options.Json = False
) -> None:
    """One backbone: parameters, input, sites and where its weights come from."""
    from mdltool import console
    from mdltool.backbones.sources import parse

    found = _describe(name)
    if as_json:
        console.result_json(found)
        return
    console.result(f"{name}: {found['about']}, {found['parameters']:,} parameters without its classifier")
    console.result(f"input: {found['frames']} frames of {found['crop']} x {found['crop']}")
    console.table("Sites", ("site", "kind", "channels", "T x H x W"), _grouped(found["sites"]), to_stdout=True)
    for tag, source in found["weights"].items():
        how = f"fetch {name}" if parse(source) is not None else f"import {name} --file FILE"
        console.result(f"weights '{tag}': {source}; mdltool backbone {how} --tag {tag}")


def _grouped(sites: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """One row for what repeats from block to block: block1 ... block12."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for site in sites:
        grid = "x".join(map(str, site["grid"]))
        rows.setdefault((site["role"] or site["name"], site["kind"], site["channels"], grid), []).append(
            site["name"]
        )
    return [
        (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", kind, channels, grid)
        for (_, kind, channels, grid), names in rows.items()
    ]


def _describe(name: str, with_sites: bool = True) -> dict[str, Any]:
    import dataclasses

    import torch

    from mdltool.backbones import BACKBONES

    factory = BACKBONES.load(name)
    with torch.device("meta"):
        backbone = factory(factory.Options(), factory.default_frames, factory.default_crop)
    kinds = dict.fromkeys(place.kind for place in backbone.places().values())
    found = {
        "name": name,
        "about": factory.about,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "frames": factory.default_frames,
        "crop": factory.default_crop,
        "kinds": ", ".join(kinds),
        "weights": factory.weight_sources,
    }
    if with_sites:
        found["sites"] = [dataclasses.asdict(site) for site in backbone.sites().values()]
    return found


Tag = Annotated[
    str | None, typer.Option("--tag", help="What the weights were trained on (default: the first that show lists).")
]
OwnSet = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the backbone, e.g. window=[16,7,7]; repeat it.", metavar="KEY=VALUE"),
]
Classes = Annotated[
    Path | None, typer.Option("--classes", help="The classifier's class names, one a line, to reuse its head.")
]


def fetch(
    name: Annotated[str, typer.Argument(help="A backbone's name.", metavar="NAME")],
    tag: Tag = None,
    url: Annotated[str | None, typer.Option("--url", help="Another address: http, https or file.")] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="What the file must hash to, or its first 8 hex digits or more.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Take this downloaded file; its official sha256 is checked.")
    ] = None,
    classes: Classes = None,
    overrides: OwnSet = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Download official weights into a backbone artifact. Nothing in the file is executed.

    A cut download continues where it stopped. $MDLTOOL_CACHE, $MDLTOOL_MIRROR, $HF_HOME and $HF_ENDPOINT are
    heeded.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.stages import fetch as stage
    from mdltool.stages.weights import check_tag, default_tag

    tag = check_tag(tag or default_tag(name))
    target = out or work_dir(work) / "backbone" / f"{name}-{tag}"
    artifact = stage.fetch(
        name,
        target,
        tag=tag,
        url=url,
        sha256=sha256,
        file=file,
        classes=_lines(classes),
        options=_options(overrides),
    )
    console.emit(artifact, as_json)


def import_backbone(
    name: Annotated[str, typer.Argument(help="The backbone that the file was made for.", metavar="NAME")],
    file: Annotated[
        Path, typer.Option("--file", help="A checkpoint: .pyth, .pth, .safetensors or a transformers directory.")
    ],
    tag: Tag = None,
    classes: Classes = None,
    overrides: OwnSet = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Read an official checkpoint into a backbone artifact. Nothing in the file is executed."""
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.stages.weights import check_tag, default_tag, import_weights

    tag = check_tag(tag or default_tag(name))
    target = out or work_dir(work) / "backbone" / f"{name}-{tag}"
    artifact = import_weights(name, file, target, tag=tag, classes=_lines(classes), options=_options(overrides))
    console.emit(artifact, as_json)


def _lines(classes: Path | None) -> list[str] | None:
    """Class names, one a line."""
    if classes is None:
        return None
    if not classes.is_file():
        raise MdlError("there is no such file", classes, "give a text file with one class a line")
    return [line.strip() for line in classes.read_text().split("\n") if line.strip()]


def _options(overrides: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE words, each value read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    for word in overrides or ():
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise MdlError(f"'{word}' is no option of a backbone", "--set", "write --set key=value")
        try:
            found[key.removeprefix("backbone.")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise MdlError(f"the value is not valid YAML: {error}", f"--set {word}", "quote it") from None
    return found


def pretrain(
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe with one domain.")] = "tiny_pretrain",
    data: options.Data = None,
    adapters: Annotated[
        str | None,
        typer.Option("--adapters", help="none, or series: trained with it and kept (default: the recipe's)."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", help="So many of the data's classes, drawn by the seed.", metavar="N")
    ] = None,
    overrides: options.Set = None,
    resume: options.Resume = False,
    workers: options.Workers = None,
    work: options.Work = None,
    out: options.Out = None,
    as_json: options.Json = False,
) -> None:
    """Train a classifier on one domain's shards and keep its backbone.

    The recipe's one domain stands for whichever domain the shards are of. Series residual adapters are a part of
    the network that is pretrained: train copies them into every domain.
    """
    from mdltool import console
    from mdltool.artifact import work_dir
    from mdltool.cli.inputs import piped_shards, shards_for, workers_or_default
    from mdltool.recipe import rename_domain

    loaded = _with_adapters(recipe, overrides or [], adapters)
    place = work_dir(work)
    entries = list(data or ()) or piped_shards()
    if not entries:
        raise MdlError("no shards to pretrain on", "--data", "--data DOMAIN=artifacts/shards/DOMAIN-train")
    domain = entries[0].partition("=")[0]
    loaded = rename_domain(loaded, domain)
    shards = shards_for(entries, place, [domain], ("val",))

    from mdltool.stages import backbone as stage

    suffix = ("-series" if loaded.adapters else "") + (f"-{classes}classes" if classes is not None else "")
    target = out or place / "backbone" / f"{loaded.backbone.name}-{domain}{suffix}"
    count = workers_or_default(workers)
    artifact = stage.pretrain(loaded, shards, target, classes=classes, resume=resume, workers=count)
    console.emit(artifact, as_json)


def _with_adapters(name: str, overrides: list[str], adapters: str | None) -> Recipe:
    """The recipe with series adapters, its own where it has them, or with none; None: as it is."""
    from mdltool.recipe import load

    if adapters not in (None, "none", "series"):
        raise MdlError(f"'{adapters}' is not known", "--adapters", "none or series")
    loaded = load(name, overrides)
    if adapters is None or (adapters == "series" and loaded.adapters):
        return loaded
    entries = "[]" if adapters == "none" else "[{type: series}]"
    return load(name, [*overrides, f"adapters={entries}"])
