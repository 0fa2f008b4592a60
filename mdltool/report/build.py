"""From eval artifacts to the sections of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mdltool.artifact import Artifact
from mdltool.evaluate import decathlon
from mdltool.evaluate.metrics import METRICS, shown
from mdltool.lineage import Node
from mdltool.report import branches, page, plots

_HEADLINES = {"top1": "top-1, %", "action_top1": "action top-1, %", "map": "mAP, %", "mse": "MSE"}
_OURS = {"mean_mse": "mse"}  # a paper's name of a metric: ours
_FRACTIONS = ("map",)
# By task: the key in per_class, how it is called, and what it is of.
_PER_CLASS = {
    "single_label": ("accuracy", "accuracy, %", "class"),
    "multi_label": ("average_precision", "average precision, %", "class"),
    "regression": ("mse", "MSE", "target"),
    "verb_noun": ("accuracy", "accuracy, %", "verb or noun"),
}


@dataclass(frozen=True)
class Printed:
    """A table as a paper prints it, rows of other systems included."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class Evaluated:
    """One eval with its model where that is still there.

    lineage: of the eval. printed: the paper's tables in which its recipe has a row.
    """

    artifact: Artifact
    model: Artifact | None
    lineage: Node
    printed: tuple[Printed, ...] = ()

    @property
    def label(self) -> str:
        return self.artifact.name

    @property
    def metrics(self) -> dict[str, Any]:
        return self.artifact.load_json("metrics.json")

    @property
    def model_json(self) -> dict[str, Any]:
        return self.model.load_json("model.json") if self.model is not None else {}


def document(evals: Sequence[Evaluated]) -> str:
    """The page of one or several evals."""
    names = ", ".join(e.label for e in evals)
    sections = [
        page.section("Accuracy", headline(evals), decathlons(evals), published(evals)),
        page.section("Parameters", parameters(evals)),
        *(page.section(f"Learning: {e.label}", learning(e)) for e in evals if e.model is not None),
        *(page.section(f"Branches: {e.label}", branch_weights(e)) for e in evals if e.model is not None),
        *(page.section(f"Compression: {e.label}", compression(e)) for e in evals if e.model is not None),
        *(page.section(f"Classes: {e.label}", classes(e)) for e in evals),
        page.section("Where it comes from", *(lineage(e) for e in evals)),
    ]
    return page.page("Action recognition report", f"mdltool report of {names}", sections)


def headline(evals: Sequence[Evaluated]) -> str:
    """Model x domain, with what each figure was measured on."""
    rows: list[tuple[Any, ...]] = []
    means: list[tuple[Any, ...]] = []
    entries = [entry for e in evals for entry in e.metrics["domains"].values()]
    names = [name for name in METRICS if any(name in entry["metrics"] for entry in entries)]
    for e in evals:
        metrics = e.metrics
        for domain, entry in metrics["domains"].items():
            clips = entry["clips"]
            values = [shown(name, entry["metrics"].get(name)) for name in names]
            measured = (metrics["views"], entry["distinct_views"], entry["decoder"], entry["precision"])
            counts = (clips["evaluated"], clips["listed"], len(clips["missing"]))
            rows.append((e.label, domain, *values, *counts, *measured))
            for subset, own in entry.get("subsets", {}).items():
                values = [shown(name, own.get(name)) for name in names]
                rows.append((e.label, f"{domain}, {subset}", *values, own["clips"], "", "", *measured))
        if len(metrics["domains"]) > 1 and metrics["mean"]:
            values = [shown(name, metrics["mean"].get(name)) for name in names]
            means.append((e.label, "mean over domains", *values, "", "", "", metrics["views"], "", "", ""))
    measured_on = ("clips", "listed", "missing", "views", "distinct", "decoder", "precision")
    columns = ("model", "domain", *(METRICS[name] for name in names), *measured_on)
    return page.table(columns, [*rows, *means], sums=len(means))


def decathlons(evals: Sequence[Evaluated]) -> str:
    """The Visual Decathlon's score of the evals that have it."""
    parts = []
    for e in evals:
        found = e.metrics["decathlon"]
        if found is not None:
            caption = f"Visual Decathlon, {e.label}, against {found['baseline']}"
            parts.append(page.table(*decathlon.table(found), caption) + page.paragraph(decathlon.headline(found)))
    return "".join(parts)


def published(evals: Sequence[Evaluated]) -> str:
    """Every figure of a domain that the recipe's paper prints for its row, beside ours where we measure it."""
    rows = []
    for e in evals:
        recipe = e.model_json.get("recipe", {})
        source = recipe.get("published") or {}
        for metric, values in {"top1": source.get("top1", {}), **source.get("scores", {})}.items():
            own = _OURS.get(metric, metric)
            for domain, printed in values.items():
                ours = e.metrics["domains"].get(domain, {}).get("metrics", {}).get(own)
                cells = (METRICS.get(own, metric), _printed(own, printed), shown(own, ours))
                rows.append((recipe["name"], "; ".join(source["rows"]), domain, *cells))
    columns = ("recipe", "row of the paper", "domain", "metric", "published", "ours")
    whole = {t.caption: page.table(t.columns, t.rows, t.caption) for e in evals for t in e.printed}
    folded = page.folded("the printed tables", "".join(whole.values())) if whole else ""
    return page.table(columns, rows, "Published rows") + folded


def _printed(metric: str, value: float) -> str:
    """A published figure under the metric's heading: papers print mAP as a fraction, other shares in percent."""
    if metric in _FRACTIONS:
        return shown(metric, value)
    return f"{value:.2f}" if METRICS.get(metric, "").endswith("%") else f"{value:g}"


def parameters(evals: Sequence[Evaluated]) -> str:
    """What the models consist of."""
    rows, per_domain = [], []
    for e in evals:
        counts = e.model_json.get("parameters", {})
        if counts:
            parts = ("backbone", "heads", "adapters", "total", "norms", "streams", "trainable")
            rows.append((e.label, *(f"{counts.get(part, 0):,}" for part in parts)))
            for domain, own in counts.get("per_domain", {}).items():
                per_domain.append((e.label, domain, f"{own['adapters']:,}", f"{own['head']:,}"))
    columns = ("model", "backbone", "heads", "adapters", "total", "shared norms", "streams", "trainable")
    whole = page.table(columns, rows, "total = backbone + heads + adapters; streams: the embedders of modalities")
    return whole + page.table(("model", "domain", "adapters", "head"), per_domain, "Per domain")


def learning(e: Evaluated) -> str:
    """Loss and validation against updates, and when the best came."""
    assert e.model is not None
    loss: dict[str, list[tuple[float, float]]] = {}
    validation: dict[str, dict[str, list[tuple[float, float]]]] = {metric: {} for metric in _HEADLINES}
    if "metrics.jsonl" in e.model.files:
        for line in e.model.file("metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            keyed = [("loss", loss), *((f"val_{metric}", curves) for metric, curves in validation.items())]
            for key, curves in keyed:
                if key in entry and "domain" in entry:
                    curves.setdefault(entry["domain"], []).append((entry["step"], entry[key]))
    drawn = {}
    if loss:
        drawn["training loss"] = plots.curves(loss, "loss")
    for metric, curves in validation.items():
        if curves:
            label = _HEADLINES[metric]
            drawn[f"validation, one centre view: {label}"] = plots.curves(curves, label, label.endswith("%"))
    summary = e.model.summary
    text = ""
    if summary.get("updates") is not None:
        text = f"{summary['updates']:,} updates in {summary['seconds']:,.0f} s."
        if summary.get("best_step") is not None:
            text += f" Best validation after {summary['best_step']:,} updates, {summary['seconds_to_best']:,.0f} s."
    return (page.paragraph(text) if text else "") + page.figures(drawn)


def branch_weights(e: Evaluated) -> str:
    """What the branches of MST-Adapters learned, in the weights that were evaluated."""
    assert e.model is not None
    return branches.section(e.model, e.artifact.request.get("weights", "last"))


def compression(e: Evaluated) -> str:
    """Of a compressed model: what other ranks would cost and score, where that was measured, and its weights."""
    assert e.model is not None
    parts = []
    if "sweep.json" in e.model.files:
        sweep = e.model.load_json("sweep.json")
        points, metrics = sweep["points"], sweep["metrics"]
        rows = [
            (
                "dense" if point["rank"] is None else f"{point['rank']:g}",
                f"{point['adapters']:,}",
                f"{point['parameters']:,}",
                f"{100 * point['retained']:.1f}",
                *(shown(metrics[domain], value) for domain, value in point["scores"].items()),
            )
            for point in points
        ]
        headings = (f"{domain} {METRICS[metric]}" for domain, metric in metrics.items())
        columns = ("rank", "adapters", "parameters", "energy, %", *headings)
        parts.append(page.figures({"before fine-tuning": plots.sweep(points)}) + page.table(columns, rows))
    if "compression.json" in e.model.files:
        weights = [
            (
                row["site"],
                row["parameter"],
                row["form"],
                "" if row["rank"] is None else row["rank"],
                row["full"],
                f"{100 * row['retained']:.1f}",
                f"{row['stored']:,}",
                f"{row['dense']:,}",
            )
            for row in e.model.load_json("compression.json")["weights"]
        ]
        columns = ("site", "weight", "form", "rank", "of", "energy, %", "stored", "dense")
        parts.append(page.folded("weights", page.table(columns, weights)))
    return "".join(parts)


def classes(e: Evaluated) -> str:
    """Per domain: bars, of single labels the confusion, and the table behind a fold."""
    confusion = e.artifact.load_json("confusion.json")
    parts = []
    for domain, entry in e.metrics["domains"].items():
        key, label, unit = _PER_CLASS[entry["task"]]
        drawn = {f"{label} per {unit}": plots.class_bars(entry["per_class"], key, label)}
        if domain in confusion:
            own = confusion[domain]
            drawn["confusion, true classes in rows"] = plots.confusion(own["matrix"], own["classes"])
        rows = [(name, _of_class(v[key], label), v["clips"]) for name, v in entry["per_class"].items()]
        listing = page.folded("table", page.table((unit, label, "clips"), rows))
        missing = [(key, reason) for key, reason in entry["clips"].get("reasons", {}).items()]
        lost = page.table(("missing clip", "reason"), missing)
        parts.append(page.heading(domain) + page.figures(drawn) + listing + lost)
    return "".join(parts)


def lineage(e: Evaluated) -> str:
    """Every artifact behind an eval, with what shards lost to quarantine."""
    rows = []
    for node, depth in e.lineage.indented():
        summary = node.artifact.summary if node.artifact is not None else {}
        note = "; ".join(node.faults)
        if node.kind == "shards" and summary:
            note = f"{summary.get('clips', '?')} clips, {summary.get('quarantined', 0)} quarantined"
        rows.append((" \u2192 " * depth + (node.role or "eval"), node.kind, node.path.name, node.digest[:12], note))
    return page.heading(e.label) + page.table(("used as", "kind", "name", "digest", ""), rows)


def _of_class(value: float | None, label: str) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" if label.endswith("%") else f"{value:.4f}"
