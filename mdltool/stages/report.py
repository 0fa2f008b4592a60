"""`report`: eval artifacts -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mdltool.artifact import Artifact, begin, write_text
from mdltool.lineage import trace
from mdltool.published import papers, tables
from mdltool.report.build import Evaluated, Printed, document


def run(evals: Sequence[Artifact], out: Path) -> Artifact:
    """Write `report.html` over the evals, compared side by side."""
    draft = begin(
        out,
        kind="report",
        stage="report",
        inputs=[artifact.as_input("eval") for artifact in evals],
        request={"names": [artifact.name for artifact in evals]},
    )
    if isinstance(draft, Artifact):
        return draft
    evaluated = [_evaluated(artifact) for artifact in evals]
    write_text(draft.path / "report.html", document(evaluated, printed_tables(evaluated)))
    return draft.commit({"evals": [artifact.name for artifact in evals], "page": "report.html"})


def _evaluated(artifact: Artifact) -> Evaluated:
    lineage = trace(artifact.path)
    models = [node.artifact for node in lineage.inputs if node.role == "model" and node.artifact is not None]
    model = models[0] if models else None
    return Evaluated(artifact, model, lineage, _printed(model) if model is not None else ())


def _printed(model: Artifact) -> tuple[Printed, ...]:
    """The printed tables of the recipe's paper that name the recipe, other systems' rows included."""
    recipe = model.load_json("model.json")["recipe"]
    paper = (recipe.get("published") or {}).get("paper")
    if paper not in papers():
        return ()
    found = []
    for table in tables(paper):
        if any(recipe["name"] in row.recipes for row in table.rows):
            rows = [(row.system, *(row.cells.get(column, "") for column in table.columns)) for row in table.rows]
            caption = f"As printed: {paper}, {table.table}, {table.about}"
            found.append(Printed(caption, ("system", *table.columns), rows))
    return tuple(found)


def printed_tables(evaluated: Sequence[Evaluated]) -> list[Printed]:
    """The printed tables that name the evaluated recipes, of the papers that these belong to."""
    recipes: dict[str, set[str]] = {}
    for entry in evaluated:
        recipe = entry.model_json.get("recipe", {})
        paper = (recipe.get("published") or {}).get("paper")
        if paper in papers():
            recipes.setdefault(paper, set()).add(recipe["name"])
    return [
        _printed(f"{paper}, {table.table}: {table.about}", table, names)
        for paper, names in recipes.items()
        for table in load(paper).tables
        if any(names & set(row.recipes) for row in table.rows)
    ]


def _printed(title: str, table: PrintedTable, names: set[str]) -> Printed:
    """names: the recipes whose rows stand out."""
    decimals = {column: digits(table, column) for column in table.columns}
    rows: list[list[str]] = []
    remarks = [table.note] if table.note else []
    own, group = set(), None
    for row in table.rows:
        if row.group and row.group != group:
            rows.append([f"{row.group}:", *([""] * (1 + len(table.columns)))])
        group = row.group
        ours = sorted(names & set(row.recipes))
        if ours:
            own.add(len(rows))
        cells = (text(row.cells.get(column), decimals[column]) for column in table.columns)
        rows.append([row.system, ", ".join(ours), *cells])
        wrong = [f"{column} must be {value}" for column, value in row.corrected.items()]
        if wrong or row.note:
            remarks.append(f"{row.system}: {'; '.join([*wrong, *([row.note] if row.note else [])])}")
    return Printed(title, ["system", "recipe", *map(_heading, table.columns)], rows, frozenset(own), remarks)


def _heading(column: str) -> str:
    return column.replace("parameters_m", "params (M)").replace(".", " ").replace("_", " ")
