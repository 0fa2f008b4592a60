"""`report`: eval artifacts -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mdltool.artifact import Artifact, begin
from mdltool.files import write_text
from mdltool.lineage import trace
from mdltool.published import digits, papers, tables, text
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
    with draft:
        write_text(draft.path / "report.html", document([_evaluated(artifact) for artifact in evals]))
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
            decimals = {column: digits(table, column) for column in table.columns}
            rows = [(row.system, *(text(row.cells.get(c), decimals[c]) for c in decimals)) for row in table.rows]
            caption = f"As printed: {paper}, {table.table}, {table.about}"
            found.append(Printed(caption, ("system", *table.columns), rows))
    return tuple(found)
