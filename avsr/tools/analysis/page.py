"""What the sections of a report are made of: figures side by side, tables, folded parts."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from avsr.errors import visible
from avsr.tools.analysis.figures import Run

Runs = Sequence[Run]


class Section(NamedTuple):
    """``build`` returns the inner HTML, or "" where the analyses hold nothing for it."""

    id: str
    title: str
    caption: str
    build: Callable[[Runs], str]


def escape(text: object) -> str:
    return html.escape(visible(str(text), "\n\t"))


def grid(pictures: Sequence[str], names: Sequence[str] = (), wide: bool = False) -> str:
    """SVGs side by side where the page is wide enough, each under its name; ``wide`` ones keep their size and scroll.
    Empty ones are left out."""
    framed = [
        f"<figure>{f'<b>{escape(name)}</b>' if name else ''}<div>{svg}</div></figure>"
        for svg, name in zip(pictures, names or [""] * len(pictures), strict=True)
        if svg
    ]
    return f"<div class='grid{' wide' if wide else ''}'>{''.join(framed)}</div>" if framed else ""


def by_run(runs: Runs, *rows: Sequence[str], wide: bool = False) -> str:
    """Rows of SVGs, one for each run, which is named where there are several."""
    names = [name if len(runs) > 1 else "" for name, _ in runs]
    return grid([svg for row in rows for svg in row], names * len(rows), wide)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=table><table><tr>{top}</tr>{body}</table></div>"


def listed(columns: str, items: Iterable[Mapping[str, Any]]) -> str:
    """A table with a row for each item. ``columns``: "heading=format; ..."; a cell is empty where its value is None."""
    heads, forms = zip(*(column.split("=", 1) for column in columns.split("; ")), strict=True)
    return table(heads, ([_filled(form, item) for form in forms] for item in items))


def _filled(form: str, item: Mapping[str, Any]) -> str:
    try:
        return form.format_map(item)
    except TypeError:  # of a None
        return ""


def details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"
