"""``report.html``: one file, no scripts, no network; light and dark; readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avsr.tools.analysis.sections import SECTIONS, Runs, escape, table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d0d0d0; --soft: #f4f4f2; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #16181b; --line: #3a3d42; --soft: #202327; --link: #8ab8ec; } }
* { box-sizing: border-box; }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 66rem; padding: 1rem; overflow-wrap: anywhere; }
a { color: var(--link); } h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.4rem 0 .3rem; font-size: 1.25rem; }
nav ul { columns: 14rem; padding-left: 1.2rem; } nav li { break-inside: avoid; }
.caption { max-width: 46rem; margin: .2rem 0 .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.grid.wide { display: flex; flex-wrap: wrap; }
figure { margin: 0; min-width: 0; max-width: 100%; } figure div, .table { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; } .wide svg { width: auto; max-width: none; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th { white-space: normal; } th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem;
  overflow-wrap: normal; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; overflow-wrap: normal; }
"""

_BY_GROUP = (  # label, key, format
    ("sink rate, raw", "sink_rate", "{:.3f}"),
    ("sink rate, corrected", "sink_rate_corrected", "{:.3f}"),
    ("max |h|", "max_abs", "{:,.0f}"),
)
_NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("mean cos² of the prompt to BOS", "cos2", "{:.4f}"),
    ("massive tokens a row", "massive_tokens_per_utterance", "{:.2f}"),
    ("rows", "utterances", "{:d}"),
)


def write_report(path: Path, runs: Sequence[tuple[str, dict[str, Any]]], title: str) -> None:
    """Writes the page. ``runs`` are (name, analysis) pairs; an analysis is what ``avsr.tools.analyze.analyze_model`` or
    ``analyze_subject`` returned, a run's with ``curve`` (metrics rows), ``scores`` (by set), ``settings``, ``errors``.
    """
    links, parts = ["<li><a href='#summary'>Summary</a></li>"], []
    for section in SECTIONS:
        inner = section.build(runs)
        if inner:
            links.append(f"<li><a href='#{section.id}'>{escape(section.title)}</a></li>")
            parts.append(
                f"<section id={section.id}><h2>{escape(section.title)}</h2>"
                f"<p class=caption>{escape(section.caption)}</p>{inner}</section>"
            )
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><nav aria-label=Contents><ul>{''.join(links)}</ul></nav>"
        f"{_summary(runs)}{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _summary(runs: Runs) -> str:
    rows = []
    for name in dict.fromkeys(key for _, a in runs for key in a.get("scores", {})):
        cells = [a.get("scores", {}).get(name) for _, a in runs]
        rows.append([escape(f"WER, {name.replace('_', ' ')}"), *(f"{c['wer']:.3f}" if c else "" for c in cells)])
    for group in dict.fromkeys(["BOS", *(a[key] for key in ("intermediate", "strongest") for _, a in runs)]):
        for label, key, form in _BY_GROUP:
            rows.append([escape(f"{group}: {label}"), *(_cell(_over_layers(a, group, key), form) for _, a in runs)])
    for label, key, form in _NUMBERS:
        if any(a[key] is not None for _, a in runs):
            rows.append([escape(label), *(_cell(a[key], form) for _, a in runs)])
    caption = (
        "Means over layers 1..L-1 and all tokens of the kind. A sink is a token that receives more than 30% of the "
        "attention of the queries that see it; the sections below say which queries count."
    )
    head = ["", *(escape(name) for name, _ in runs)]
    return f"<section id=summary><h2>Summary</h2><p class=caption>{caption}</p>{table(head, rows)}</section>"


def _over_layers(analysis: dict[str, Any], group: str, key: str) -> float | None:
    values = analysis["groups"].get(group, {}).get(key)
    inner = values[:-1] or values if values else []
    return sum(inner) / len(inner) if inner else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
