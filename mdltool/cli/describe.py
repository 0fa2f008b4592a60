"""mdltool describe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mdltool.cli import options


def register(app: typer.Typer) -> None:
    app.command("describe", epilog="Example: mdltool describe omi_x3dm_all --set domains.hmdb51.classes=20")(
        describe
    )


def describe(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or YAML file.", metavar="RECIPE")],
    views: Annotated[
        str | None, typer.Option("--views", help="TxS for the cost of a video.", metavar="TxS")
    ] = None,
    overrides: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Parameters, GFLOPs and sites of a recipe; needs no data and no weights."""
    from mdltool import console
    from mdltool.recipe import load
    from mdltool.stages import describe as stage

    loaded = load(recipe, overrides or ())
    found = stage.run(loaded, views)
    if as_json:
        console.result_json(found)
    else:
        _print(loaded.about, found)


def _print(about: str, found: dict[str, Any]) -> None:
    from mdltool import console

    counts = found["parameters"]
    console.result(f"{found['recipe']}: {about}\n")
    parts = ("backbone", "heads", "adapters", "total", "norms", "trainable")
    notes = {
        "total": "backbone + heads + adapters",
        "norms": "shared over domains, in no column of the paper",
        "trainable": f"{found['percent_of_backbone']:.1f}% of the backbone",
    }
    rows = [(part, f"{counts[part]:,}", f"{counts[part] / 1e6:.2f}", notes.get(part, "")) for part in parts]
    console.table("Parameters", ("part", "parameters", "M", ""), rows, to_stdout=True)
    domains = [(d, f"{e['adapters']:,}", f"{e['head']:,}") for d, e in found["per_domain"].items()]
    console.table("Per domain", ("domain", "adapters", "head"), domains, to_stdout=True)
    if found["sites"]:
        sites = [(s["name"], s["path"], s["channels"], "x".join(map(str, s["grid"]))) for s in found["sites"]]
        console.table("Sites", ("site", "module", "channels", "T x H x W"), sites, to_stdout=True)
    flops = found["gflops"]
    console.result(f"GFLOPs: {flops['view']:.2f} a view, {flops['video']:.1f} a video ({flops['views']} views)")
    console.result(f"        ({flops['counting']})")
    if len(found["per_domain"]) > 1:
        separate = found["separate_models"]
        console.result(
            f"Separate models, one per domain, would have {separate:,} parameters ({separate / 1e6:.2f} M)"
        )
    if found["published"]:
        _print_published(found["published"])


def _print_published(published: dict[str, Any]) -> None:
    from mdltool import console

    console.result(f"\nPublished ({published['paper']}): {'; '.join(published['rows'])}")
    rows = []
    for cell, entry in published["parameters"].items():
        remark = f"the paper's cell is wrong: {entry['corrected_m']:.2f}" if "corrected_m" in entry else ""
        rows.append((cell, f"{entry['printed_m']:.2f}", f"{entry['ours_m']:.2f}", f"{entry['ours']:,}", remark))
    if rows:
        console.table("", ("part", "printed, M", "ours, M", "ours", ""), rows, to_stdout=True)
    if published["top1"]:
        console.result("Top-1 printed: " + ", ".join(f"{d} {value:.2f}" for d, value in published["top1"].items()))
    if published["notes"]:
        console.result(f"Note: {published['notes']}")
