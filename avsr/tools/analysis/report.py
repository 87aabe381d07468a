"""``report.html``: one file, no scripts, no network; light and dark; readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from avsr.runtime.folders import write_durably
from avsr.tools.analysis.groups import BOS, mean_over_layers
from avsr.tools.analysis.page import Runs, Section, escape, table
from avsr.tools.analysis.sections import SECTIONS

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
th { white-space: normal; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: normal; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; overflow-wrap: normal; }
"""

_SUMMARY = (
    "Means over layers 1..L-1 and all tokens of the kind. A sink is a token that receives more than 30% of the "
    "attention of the queries that see it; the sections below say which queries count."
)
_BY_GROUP = (  # label, key, format
    ("sink rate, raw", "sink_rate", "{:.3f}"),
    ("sink rate, corrected", "sink_rate_corrected", "{:.3f}"),
    ("max |h|", "max_abs", "{:,.0f}"),
)
_NUMBERS = (
    ("mean cos² of the prompt to BOS", "cos2", "{:.4f}"),
    ("massive tokens per row", "massive_tokens_per_utterance", "{:.2f}"),
    ("rows", "utterances", "{:d}"),
)


def write_report(path: Path, runs: Runs, title: str) -> None:
    """Writes the page. ``runs`` are (name, analysis) pairs; an analysis is what ``avsr.tools.analyze.analyze_model`` or
    ``analyze_subject`` returned, a run's with ``curve`` (metrics rows), ``scores`` (by set), ``settings``, ``errors``.
    """
    write_page(path, runs, title, [Section("summary", "Summary", _SUMMARY, _summary), *SECTIONS])


def write_page(path: Path, runs: Runs, title: str, sections: Sequence[Section]) -> None:
    """Writes a page of those ``sections`` for which the analyses ``runs`` hold something."""
    built = [(s.id, s.title, s.caption, inner) for s in sections if (inner := s.build(runs))]
    links = "".join(f"<li><a href='#{id}'>{escape(heading)}</a></li>" for id, heading, _, _ in built)
    parts = "".join(
        f"<section id={id}><h2>{escape(heading)}</h2><p class=caption>{escape(caption)}</p>{inner}</section>"
        for id, heading, caption, inner in built
    )
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><nav aria-label=Contents><ul>{links}</ul></nav>{parts}</body></html>\n"
    )
    write_durably(path, page.encode("utf-8", errors="replace"))


def _summary(runs: Runs) -> str:
    analyses = [analysis for _, analysis in runs]
    rows = []
    for name in dict.fromkeys(key for a in analyses for key in a.get("scores", {})):
        scores = [a.get("scores", {}).get(name) for a in analyses]
        rows.append([f"WER, {name.replace('_', ' ')}", *(_cell(s and s["wer"], "{:.3f}") for s in scores)])
    for group in dict.fromkeys([BOS, *(a[key] for key in ("intermediate", "strongest") for a in analyses)]):
        for label, key, form in _BY_GROUP:
            means = [mean_over_layers(a["groups"].get(group, {}).get(key)) for a in analyses]
            rows.append([f"{group}: {label}", *(_cell(mean, form) for mean in means)])
    for label, key, form in _NUMBERS:
        if any(a[key] is not None for a in analyses):
            rows.append([label, *(_cell(a[key], form) for a in analyses)])
    return table(["", *(name for name, _ in runs)], rows)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
