"""``report.html``: one file, no scripts, no network; light and dark; readable on a phone."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avsr.analysis import figures

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d0d0d0; --soft: #f4f4f2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #16181b; --line: #3a3d42; --soft: #202327; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; min-width: 20rem; }
figcaption { font-size: .9rem; opacity: .85; } pre { background: var(--soft); padding: .7rem; overflow-x: auto; }
"""

_CAPTIONS = {
    "sinks": "Share of heads in which a token is a sink: it receives more than 30% of the attention of the queries "
    "that may see it. Keys with fewer than 8 such queries are not counted.",
    "sinks_text": "The same over a fixed set of queries, the text tokens: no key counts its attention to itself, and "
    "all keys are judged by the same queries.",
    "heat": "Sink rate by token and layer.",
    "cosine": "Cosine between a token's hidden state and that of BOS, behind every layer. A token at 1 has become a "
    "second BOS.",
    "activation": "Largest absolute activation of a token, behind every layer (mean over tokens and utterances).",
    "map": "Attention of one utterance in the middle layer, mean over heads; queries down, keys across.",
    "curves": "Training. Dots: the validation split.",
}


def write_report(path: Path, runs: Sequence[tuple[str, dict[str, Any]]], title: str) -> None:
    """Writes the page. ``runs`` are (name, analysis) pairs; an analysis holds what ``collect`` returned and
    ``attention_map``, ``curve`` (metrics rows), ``scores`` (by set), ``settings`` and ``errors``."""
    named = _named_groups(runs)
    every = [*named, "speech", "text"]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(runs),
        _figure(figures.lines_by_layer(runs, "sink_rate", every, "sink rate"), "sinks"),
        _figure(figures.lines_by_layer(runs, "sink_rate_text", every, "sink rate, text queries"), "sinks_text"),
        _figure(figures.heatmap_by_position(runs, "sink_rate", every), "heat"),
        _figure(figures.lines_by_layer(runs, "cosine", every, "cosine to BOS"), "cosine"),
        _figure(figures.lines_by_layer(runs, "max_abs", every, "max |h|", log=True), "activation"),
        _largest(runs),
        _figure(figures.attention_maps(runs), "map"),
    ]
    trained = [(name, analysis["curve"]) for name, analysis in runs if analysis.get("curve")]
    if trained:
        parts.append(_figure(figures.curves(trained), "curves"))
    parts += [_errors(name, analysis) for name, analysis in runs if analysis.get("errors")]
    parts.append(_settings(runs))
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _named_groups(runs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """BOS, delimiters and prompt tokens, in the order of the prompt; only the prompt tokens that ever are sinks
    when there are many."""
    groups = runs[0][1]["groups"]
    first = [name for name in groups if name == "BOS" or name.startswith("<")]
    prompt = [name for name in groups if name.startswith("prompt ")]
    prompt.sort(key=lambda name: -max(max(a["groups"].get(name, {"sink_rate": [0]})["sink_rate"]) for _, a in runs))
    return first + prompt[:3]


def _summary(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in runs)
    rows: list[tuple[str, list[str]]] = []
    for name in dict.fromkeys(key for _, a in runs for key in a.get("scores", {})):
        cells = [a.get("scores", {}).get(name) for _, a in runs]
        rows.append((f"WER, {name.replace('_', ' ')}", [f"{c['wer']:.3f}" if c else "" for c in cells]))
    opener = runs[0][1]["intermediate"]
    for label, key, form in (
        ("mean cos&sup2; to BOS (layers 1..L-1)", "cos2", "{:.4f}"),
        (f"{html.escape(opener)}: max |h|", "intermediate_activation", "{:,.0f}"),
        (f"{html.escape(opener)}: sink rate", "intermediate_sink_rate", "{:.3f}"),
        (f"{html.escape(opener)}: sink rate, text queries", "intermediate_sink_rate_text", "{:.3f}"),
        ("BOS: max |h|", "bos_activation", "{:,.0f}"),
        ("BOS: sink rate", "bos_sink_rate", "{:.3f}"),
        ("massive tokens an utterance", "massive_tokens_per_utterance", "{:.2f}"),
        ("utterances", "utterances", "{:d}"),
    ):
        rows.append((label, [form.format(a[key]) for _, a in runs]))
    body = "".join(f"<tr><td>{label}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for label, cells in rows)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _largest(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    parts = []
    for name, analysis in runs:
        rows = "".join(
            f"<tr><td>{row['layer']}</td><td>{row['value']:,.1f}</td><td>{html.escape(row['token'])}</td>"
            f"<td>{row['feature']}</td><td>{row['log10_ratio']:.2f}</td></tr>"
            for row in analysis["largest"]
        )
        parts.append(
            f"<details><summary>Largest activation of every layer: {html.escape(name)}</summary><table><tr>"
            "<th>layer</th><th>max |h|</th><th>token</th><th>feature</th><th>log10(max / median)</th></tr>"
            f"{rows}</table></details>"
        )
    return "".join(parts)


def _errors(name: str, analysis: dict[str, Any]) -> str:
    return (
        f"<details><summary>Worst utterances: {html.escape(name)}</summary>"
        f"<pre>{html.escape(analysis['errors'])}</pre></details>"
    )


def _settings(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    return "".join(
        f"<details><summary>Config: {html.escape(name)}</summary><pre>{html.escape(a['settings'])}</pre></details>"
        for name, a in runs
        if a.get("settings")
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_CAPTIONS[caption]}</figcaption></figure>"
