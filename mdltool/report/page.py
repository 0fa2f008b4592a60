"""The report as one HTML page: no script, no network, readable on screen and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #66707f; --line: #d8dde4; --paper: #fff; --tint: #f4f6f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ee; --soft: #98a2b3; --line: #3a4352; --paper: #161b22; --tint: #1e252f } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: 2.5rem auto; padding: 0 1.5rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p, li { max-width: 46rem } .soft, caption { color: var(--soft) }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .3rem }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top }
th { font-weight: 600 } td.n, th.n { text-align: right } tr.sum td { font-weight: 600 }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
figure { margin: 0; max-width: 100%; overflow-x: auto } figcaption { color: var(--soft); font-size: .9rem }
svg { max-width: 100%; height: auto } code { background: var(--tint); padding: 0 .25em; border-radius: 3px }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--soft) }
@media print { body { margin: 0; max-width: none } h2, figure, table { break-inside: avoid } }
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole document."""
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    )
    body = f"<h1>{escape(title)}</h1><p class='soft'>{escape(lead)}</p>{''.join(sections)}"
    return f"<!doctype html><html lang='en'><head>{head}<style>{_CSS}</style></head><body>{body}</body></html>\n"


def section(title: str, *parts: str) -> str:
    """A titled part; empty parts are left out, and an empty section is nothing."""
    content = "".join(parts)
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", sums: int = 0) -> str:
    """A table; cells are text, numbers go right; the last `sums` rows stand out."""
    if not rows:
        return ""
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[Any], tag: str, mark: str = "") -> str:
        parts = (
            f"<{tag}{' class=n' if right else ''}>{escape('' if cell is None else str(cell))}</{tag}>"
            for cell, right in zip(cells, numeric, strict=True)
        )
        return f"<tr{mark}>{''.join(parts)}</tr>"

    head = line(columns, "th")
    body = "".join(line(row, "td", " class=sum" if i >= len(rows) - sums else "") for i, row in enumerate(rows))
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{top}<thead>{head}</thead><tbody>{body}</tbody></table>"


def figures(named: Mapping[str, str]) -> str:
    """SVGs with captions, side by side where they fit."""
    parts = (f"<figure>{svg}<figcaption>{escape(name)}</figcaption></figure>" for name, svg in named.items() if svg)
    joined = "".join(parts)
    return f"<div class='figures'>{joined}</div>" if joined else ""


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _is_number(cell: Any) -> bool:
    text = str("" if cell is None else cell).replace(",", "").replace(".", "").lstrip("+-")
    return text == "" or text.isdigit()
