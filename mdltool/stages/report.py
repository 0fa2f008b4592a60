"""`report`: eval artifacts -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mdltool.artifact import Artifact, begin, write_text
from mdltool.lineage import trace
from mdltool.report.build import Evaluated, document


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
    write_text(draft.path / "report.html", document([_evaluated(artifact) for artifact in evals]))
    return draft.commit({"evals": [artifact.name for artifact in evals], "page": "report.html"})


def _evaluated(artifact: Artifact) -> Evaluated:
    lineage = trace(artifact.path)
    models = [node.artifact for node in lineage.inputs if node.role == "model" and node.artifact is not None]
    return Evaluated(artifact, models[0] if models else None, lineage)
