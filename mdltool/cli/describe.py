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
    paper: Annotated[
        bool, typer.Option("--paper", help="Beside each figure that the paper prints, ours and the difference.")
    ] = False,
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
        _print(loaded.about, found, paper)


def _print(about: str, found: dict[str, Any], paper: bool) -> None:
    from mdltool import console

    counts = found["parameters"]
    console.result(f"{found['recipe']}: {about}\n")
    parts = ["backbone", "heads", "adapters", "total", "norms", "trainable"]
    if counts["projection"]:
        parts.insert(1, "projection")
    if counts["streams"]:
        parts.insert(parts.index("norms"), "streams")
    notes = {
        "total": "backbone + heads + adapters",
        "streams": "the streams' embedders, not in the total",
        "projection": "not used and not in the total; some papers count it",
        "norms": "shared over domains, in no column of the paper",
        "trainable": f"{found['percent_of_backbone']:.1f}% of the backbone",
    }
    rows = [(part, f"{counts[part]:,}", f"{counts[part] / 1e6:.2f}", notes.get(part, "")) for part in parts]
    console.table("Parameters", ("part", "parameters", "M", ""), rows, to_stdout=True)
    domains = [(d, f"{e['adapters']:,}", f"{e['head']:,}") for d, e in found["per_domain"].items()]
    console.table("Per domain", ("domain", "adapters", "head"), domains, to_stdout=True)
    if found["sites"]:
        columns = ("site", "module", "channels", "T x H x W")
        console.table("Sites", columns, _sites(found["sites"]), to_stdout=True)
    flops = found["gflops"]
    console.result(f"GFLOPs: {flops['view']:.2f} a view, {flops['video']:.1f} a video ({flops['views']} views)")
    console.result(f"        ({flops['counting']})")
    console.result(
        f"Kept for the backward pass: {found['saved_for_backward_bytes'] / 2**20:.1f} MiB a clip in float32"
    )
    if len(found["per_domain"]) > 1:
        separate = found["separate_models"]
        console.result(
            f"Separate models, one per domain, would have {separate:,} parameters ({separate / 1e6:.2f} M)"
        )
    if found["published"]:
        _print_published(found["published"], paper)


def _sites(sites: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """The adapters' sites; what repeats from block to block in one row."""
    rows: dict[tuple[str, int, str], list[tuple[str, str]]] = {}
    for site in sites:
        role = site["name"].partition(".")[2] or site["name"]
        key = (role, site["channels"], "x".join(map(str, site["grid"])))
        rows.setdefault(key, []).append((site["name"], site["path"]))
    merged = []
    for (_, channels, grid), names in rows.items():
        (name, path), more = names[0], len(names) > 1
        merged.append(
            (f"{name} ... {names[-1][0]}" if more else name, f"{path} ..." if more else path, channels, grid)
        )
    return merged


def _print_published(published: dict[str, Any], paper: bool) -> None:
    from mdltool import console

    console.result(f"\nPublished ({published['paper']}): {'; '.join(published['rows'])}")
    rows: list[tuple[str, ...]] = []
    for cell, entry in published["parameters"].items():
        own = (f"{entry['printed_m']:g} M", f"{entry['ours_m']:g} M", f"{entry['ours']:,}", entry["remark"])
        rows.append((cell, *own, f"{entry['difference_m']:+g} M"))
    for cell, entry in published["percent"].items():
        of = f"of {published['denominator']:,}" if published["denominator"] else "of the backbone"
        rows.append(_figure(cell, entry, 2, of, " %"))
    if "size" in published:
        rows.append(_figure("size", published["size"], 3, "of one network's convolutions", "x"))
    if "gflops" in published:
        entry = published["gflops"]
        rows.append(_figure("GFLOPs", entry, 1, f"{entry['views']} view(s)"))
    columns = ("figure", "printed", "ours", "", "remark", "difference")
    if rows and paper:
        console.table("", columns, rows, to_stdout=True)
    elif rows:
        console.table("", columns[:-1], [row[:-1] for row in rows], to_stdout=True)
    if published["top1"]:
        console.result("Top-1 printed: " + ", ".join(f"{d} {value:.2f}" for d, value in published["top1"].items()))
    for metric, values in published["scores"].items():
        console.result(f"{metric} printed: " + ", ".join(f"{d} {value:g}" for d, value in values.items()))
    for metric, value in published["overall"].items():
        wrong = f" (must be {published['corrected'][metric]:g})" if metric in published["corrected"] else ""
        console.result(f"{metric} printed: {value:g}{wrong}")
    if published["notes"]:
        console.result(f"Note: {published['notes']}")


def _figure(name: str, entry: dict[str, Any], digits: int, of: str, unit: str = "") -> tuple[str, ...]:
    """A row of the table of printed figures. digits: of ours."""
    ours, difference = f"{entry['ours']:.{digits}f}{unit}", f"{entry['difference']:+.{digits}f}{unit}"
    return name, f"{entry['printed']:g}{unit}", ours, of, entry["remark"], difference
