"""Figures as inline SVG. Text stays text, so that a page can be searched and small figures stay sharp."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's own text colour, so that a dark page stays readable
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mdltool",  # ids, and so the page, are the same every time
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_MANY_CLASSES = 40
Curve = Sequence[tuple[float, float]]


def curves(by_domain: Mapping[str, Curve], ylabel: str, percent: bool = False, across: str = "updates") -> str:
    """One line per domain of (updates, value); with many points a smoothed line over a pale one.

    across: what the points are told apart by, where it is not updates.
    """
    with plt.rc_context(_STYLE):
        return _svg(_lines(by_domain, ylabel, percent, across))


def _lines(by_domain: Mapping[str, Curve], ylabel: str, percent: bool, across: str) -> Figure:
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.6, 2.7))
        for number, (domain, points) in enumerate(by_domain.items()):
            x, y = np.array(points, dtype=float).T
            y = 100 * y if percent else y
            colour = f"C{number}"
            if len(x) > 60:
                axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.7)
                width = max(3, len(x) // 40)
                x, y = x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid")
            axes.plot(x, y, color=colour, label=domain, marker="o" if len(x) < 20 else None, markersize=3)
        axes.set_xlabel(across)
        axes.set_ylabel(ylabel)
        axes.legend(frameon=False)
        return figure


def sweep(points: Sequence[Mapping[str, Any]]) -> str:
    """Each domain's score against the numbers that its adapters take; points as sweep.json has them."""
    return curves(_by_domain(points), "score, %", True, across="numbers in adapters")


def sweep_png(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """The same as a file."""
    figure = _lines(_by_domain(points), "score, %", True, "numbers in adapters")
    with plt.rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
        plt.close(figure)


def _by_domain(points: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    return {d: [(point["adapters"], point["scores"][d]) for point in points] for d in points[0]["scores"]}


def class_bars(
    per_class: Mapping[str, Mapping[str, Any]], key: str = "accuracy", label: str = "accuracy, %"
) -> str:
    """per_class[name][key] by name, sorted; thin bars without names where there are many.

    label: of the axis; one in % is of fractions.
    """
    percent = label.endswith("%")
    rows = [(name, v[key] * (100 if percent else 1)) for name, v in per_class.items() if v[key] is not None]
    rows.sort(key=lambda row: row[1])
    many = len(rows) > _MANY_CLASSES
    with plt.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(4.6, 3.2 if many else 0.6 + 0.22 * len(rows)))
        axes.barh(range(len(rows)), [value for _, value in rows], height=1.0 if many else 0.7)
        axes.set_yticks([] if many else range(len(rows)), [] if many else [name for name, _ in rows])
        axes.set_xlim(0, 100 if percent else None)
        axes.set_xlabel(label + (f" ({len(rows)} classes)" if many else ""))
        return _svg(figure)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Row-normalised confusion: true classes in rows; counts and names where they are readable."""
    counts = np.array(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= _MANY_CLASSES
    side = 1.6 + 0.3 * len(classes) if few else 6.0
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(side, side))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if few:
            axes.set_xticks(range(len(classes)), classes, rotation=90)
            axes.set_yticks(range(len(classes)), classes)
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
