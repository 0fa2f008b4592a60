"""mdltool recipe list|show|copy|validate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdltool.cli import options
from mdltool.errors import MdlError

if TYPE_CHECKING:
    from mdltool.published import PrintedTable

Name = Annotated[str, typer.Argument(help="A recipe's name or YAML file.", metavar="RECIPE")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="The recipes that ship, and your own.",
        add_completion=False,
    )
    group.command("list", epilog="Example: mdltool recipe list --family omi")(list_recipes)
    group.command("show", epilog="Example: mdltool recipe show omi_x3dm_all")(show)
    group.command("copy", epilog="Example: mdltool recipe copy tiny_demo mine.yaml")(copy)
    group.command("validate", epilog="Example: mdltool recipe validate mine.yaml")(validate)
    app.add_typer(group, name="recipe")


def list_recipes(
    paper: Annotated[
        str | None, typer.Argument(help="With --published: only this paper, e.g. omi_mdl.", metavar="PAPER")
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="Only this family, e.g. omi.")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The papers' printed tables instead, other systems included.")
    ] = False,
    ours: Annotated[
        bool, typer.Option("--ours", help="Beside the published parameters ours, counted from shapes.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Every recipe with what it stands for and the numbers that its paper prints."""
    if published:
        if family is not None:
            raise MdlError("--family and --published do not go together", "--family", "name a paper instead")
        if ours:
            raise MdlError("--ours and --published do not go together", "--ours", "mdltool recipe list --ours")
        _list_published(paper, as_json)
        return
    if paper is not None:
        raise MdlError("a paper goes with --published", paper, f"mdltool recipe list --published {paper}")
    from mdltool import console
    from mdltool.recipe import ALIASES

    rows = _rows(family, ours)
    if as_json:
        console.result_json({"recipes": rows, "aliases": ALIASES})
        return
    for group in sorted({row["family"] for row in rows}):
        _print_family(group, [row for row in rows if row["family"] == group], ours)
    for alias, name in ALIASES.items():
        console.result(f"{alias} = {name}")
    if ours:
        console.result("ours: what the paper prints is summed as it sums, else total = backbone + heads + adapters")
    console.result("mdltool recipe list --published shows every printed row of the papers, other systems too")


def _rows(family: str | None, ours: bool) -> list[dict[str, Any]]:
    """What the list says of each recipe. ours: with our counts, which takes a moment for each."""
    from mdltool.recipe import read, shipped
    from mdltool.registry import did_you_mean

    files = shipped()
    families = sorted({path.parent.name for path in files.values()})
    if family is not None:
        if family not in families:
            raise MdlError(f"there is no family '{family}'", "--family", did_you_mean(family, families))
        files = {name: path for name, path in files.items() if path.parent.name == family}
    contents = {name: read(name) for name in files}
    rows = [{"name": name, "family": files[name].parent.name, **_summary(c)} for name, c in contents.items()]
    return [row | {"ours": count} for row, count in zip(rows, _count(contents), strict=True)] if ours else rows


def _count(contents: dict[str, dict[str, Any]]) -> list[dict[str, int]]:
    """Our parameters of each recipe, on the meta device."""
    from mdltool import console
    from mdltool.recipe import find, validate
    from mdltool.stages.describe import parameters

    found = []
    with console.progress("count", len(contents), "recipes") as advance:
        for name, content in contents.items():
            found.append(parameters(validate(content, find(name))))
            advance()
    return found


def _print_family(title: str, rows: list[dict[str, Any]], ours: bool) -> None:
    """ours: with our counts, in the place of what each recipe is about: a folded name cannot be copied."""
    from mdltool import console

    columns = ["recipe", "about", "paper's rows", "published"]
    cells = [[r["name"], r["about"], "; ".join(r["rows"]), _figures(r)] for r in rows]
    if ours:
        counts = [_numbers({part: count / 1e6 for part, count in r["ours"].items()}) for r in rows]
        columns = ["recipe", *columns[2:], "ours, M"]
        cells = [[line[0], *line[2:], count] for line, count in zip(cells, counts, strict=True)]
    console.table(title, columns, cells, to_stdout=True)


def _list_published(paper: str | None, as_json: bool) -> None:
    from mdltool import console
    from mdltool.published import load, papers

    found = [load(name) for name in ([paper] if paper is not None else papers())]
    if as_json:
        console.result_json({"papers": [entry.model_dump(mode="json") for entry in found]})
        return
    for entry in found:
        console.result(f"{entry.paper}: {entry.title}\n")
        for table in entry.tables:
            _print_table(table)


def _print_table(table: PrintedTable) -> None:
    """A printed table, each row's recipes under its name; corrections and notes follow it."""
    from mdltool import console
    from mdltool.published import decathlon_of, digits, text

    decimals = {column: digits(table, column) for column in table.columns}
    rows: list[list[str]] = []
    group = None
    for row in table.rows:
        if row.group and row.group != group:
            rows.append([f"{row.group}:", *("" for _ in table.columns)])
        group = row.group
        # one column for both: names of recipes are long, and a folded one cannot be copied
        name = "\n".join([row.system, *(f"= {recipe}" for recipe in row.recipes)])
        rows.append([name, *(text(row.cells.get(column), decimals[column]) for column in table.columns)])
    if rows:
        first = "system\n= recipe" if any(row.recipes for row in table.rows) else "system"
        headings = [first, *(_heading(column) for column in table.columns)]
        console.table(f"{table.table}: {table.about}", headings, rows, to_stdout=True)
    else:
        console.result(f"{table.table}: {table.about}")
    for row in table.rows:
        remarks = [f"{column} must be {value}" for column, value in row.corrected.items()]
        remarks += [row.note] if row.note else []
        if remarks:
            console.result(f"{row.system}: {'; '.join(remarks)}")
    if "decathlon_score" in table.columns:
        scores = ", ".join(f"{row.system} {decathlon_of(row):.0f}" for row in table.rows)
        console.result(f"decathlon_score by our formula, from the printed accuracies: {scores}")
    console.result(f"{table.note}\n" if table.note else "")


def _heading(column: str) -> str:
    """A column's name on several short lines, since tables have many columns."""
    return column.replace("parameters_m", "params (M)").replace(".", "\n").replace("_", "\n")


def _summary(content: dict[str, Any]) -> dict[str, Any]:
    published = content.get("published") or {}
    figures = {key: published.get(key) for key in ("gflops", "gflops_views", "size")}
    parts = ("top1", "scores", "overall", "parameters_m", "percent", "corrected")
    return {
        "about": content.get("about", ""),
        "paper": published.get("paper"),
        "rows": published.get("rows", []),
        **{part: published.get(part, {}) for part in parts},
        **figures,
        "digits": published.get("digits", 2),
    }


def _figures(row: dict[str, Any]) -> str:
    """All that the paper prints of a row, a line for each kind of figure."""
    lines = [("top-1", _numbers(row["top1"]))]
    lines += [(metric, _numbers(values, None)) for metric, values in row["scores"].items()]
    lines += [(metric, f"{value:g}") for metric, value in row["overall"].items()]
    lines += [("M", _numbers(row["parameters_m"], row["digits"]))]
    lines += [("%", _numbers(row["percent"], 1))]
    views = f" ({row['gflops_views']} views)" if (row["gflops_views"] or 1) > 1 else ""
    lines += [("GFLOPs", f"{row['gflops']:g}{views}" if row["gflops"] else "")]
    lines += [("size", f"{row['size']:g}x" if row["size"] else "")]
    lines += [("must be", _numbers(row["corrected"], None))]
    return "\n".join(f"{kind}: {text}" for kind, text in lines if text)


def _numbers(values: dict[str, float], digits: int | None = 2) -> str:
    """digits: decimals; None as many as each has."""
    return ", ".join(
        f"{key} {value:g}" if digits is None else f"{key} {value:.{digits}f}" for key, value in values.items()
    )


def show(recipe: Name, as_json: options.Json = False) -> None:
    """The recipe's file; with --json the validated content, defaults filled in."""
    from mdltool import console
    from mdltool.recipe import find, load

    if as_json:
        console.result_json(load(recipe).model_dump(mode="json"))
    else:
        console.result(find(recipe).read_text().rstrip())


def copy(
    recipe: Name,
    target: Annotated[Path, typer.Argument(help="The new YAML file.", metavar="FILE")],
    as_json: options.Json = False,
) -> None:
    """Copy a recipe to a file of your own, to edit."""
    from mdltool import console
    from mdltool.files import write_text
    from mdltool.recipe import find

    source = find(recipe)
    if target.exists():
        raise MdlError("the file is there already", target, "give another name")
    if not target.parent.is_dir():
        raise MdlError("there is no such folder", target.parent, "make it first")
    write_text(target, source.read_text())
    if as_json:
        console.result_json({"recipe": str(target)})
    else:
        console.result(str(target))


def validate(
    recipe: Annotated[list[str], typer.Argument(help="Names or YAML files.", metavar="RECIPE...")],
    overrides: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Check recipes; every fault is named with its path and the nearest valid key."""
    from mdltool import console
    from mdltool.recipe import load
    from mdltool.stages.plan import check

    names = []
    for name in recipe:
        loaded = load(name, overrides or ())
        check(loaded)
        names.append(loaded.name)
    if as_json:
        console.result_json({"valid": names})
    else:
        for name in names:
            console.result(f"{name}: valid")
