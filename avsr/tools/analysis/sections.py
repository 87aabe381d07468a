"""The sections of the report: each a heading with an id, a caption that says what one sees, and figures or tables."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from avsr.tools.analysis import figures, mechanism, plots
from avsr.tools.analysis.figures import Run

Runs = Sequence[Run]


class Section(NamedTuple):
    """``build`` returns the inner HTML, or "" where the analyses hold nothing for it."""

    id: str
    title: str
    caption: str
    build: Callable[[Runs], str]


def escape(text: object) -> str:
    return html.escape(str(text))


def named(runs: Runs) -> list[str]:
    """What figures draw: the shown groups of all runs, in the order of the rows, text and speech last."""
    groups = list(dict.fromkeys(group for _, analysis in runs for group in analysis["shown"]))
    return sorted(groups, key=lambda group: group in ("speech", "text"))


def grid(runs: Runs, *rows: Sequence[str], wide: bool = False) -> str:
    """Rows of SVG, one a run, side by side where the page is wide enough; ``wide`` ones keep their size and scroll."""
    pairs = [(svg, name) for row in rows for svg, (name, _) in zip(row, runs, strict=True) if svg]
    return _in_grid([_framed(svg, name if len(runs) > 1 else "") for svg, name in pairs], wide)


def _framed(svg: str, title: str = "") -> str:
    return f"<figure>{f'<b>{escape(title)}</b>' if title else ''}<div>{svg}</div></figure>"


def _in_grid(parts: Sequence[str], wide: bool = False) -> str:
    return f"<div class='grid{' wide' if wide else ''}'>{''.join(parts)}</div>" if parts else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=table><table><tr>{top}</tr>{body}</table></div>"


def details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _sinks(runs: Runs) -> str:
    groups = named(runs)
    return grid(
        runs,
        figures.layer_lines(runs, "sink_rate", groups, "sink rate, raw"),
        figures.layer_lines(runs, "sink_rate_corrected", groups, "sink rate, corrected"),
    )


def _where(runs: Runs) -> str:
    return grid(runs, figures.heat_by_token(runs, "sink_rate_corrected", named(runs)), figures.positions(runs))


def _heads(runs: Runs) -> str:
    pairs = [
        (run, group)
        for group in dict.fromkeys(["BOS", *(analysis["strongest"] for _, analysis in runs)])
        for run in runs
        if group in run[1]["heads"]
    ]
    several = len(runs) > 1
    return _in_grid([_framed(figures.heat_by_head(run, group), run[0] if several else "") for run, group in pairs])


def _value(runs: Runs) -> str:
    groups = named(runs)
    return grid(
        runs,
        figures.layer_lines(runs, "received", groups, "attention received"),
        figures.layer_lines(runs, "received_value", groups, "received x |v|"),
        figures.layer_lines(runs, "value_norm", groups, "|v|"),
    )


def _mass(runs: Runs) -> str:
    return grid(runs, figures.mass(runs, named(runs)))


def _massive(runs: Runs) -> str:
    groups = named(runs)
    lines = grid(
        runs,
        figures.layer_lines(runs, "max_abs", groups, "max |h|", log=True),
        figures.layer_lines(runs, "log10_ratio", groups, "log10(max / median)", mark=3.0),
    )
    return lines + "".join(_massive_tables(name, analysis) for name, analysis in runs)


def _massive_tables(name: str, analysis: dict[str, Any]) -> str:
    rows = [
        [
            escape(row["group"]),
            str(row["layer"]),
            str(row["feature"]),
            str(row["count"]),
            f"{row['value']:,.0f}",
            f"{row['log10_ratio']:.2f}",
        ]
        for row in analysis["massive"]
    ]
    head = ["token", "layer", "feature", "tokens", "largest", "its log10 ratio"]
    found = details(f"{name}: massive activations ({len(rows)})", table(head, rows)) if rows else ""
    largest = [
        [
            str(row["layer"]),
            f"{row['value']:,.1f}",
            escape(row["token"]),
            str(row["feature"]),
            f"{row['log10_ratio']:.2f}",
        ]
        for row in analysis["largest"]
    ]
    head = ["layer", "max |h|", "token", "feature", "log10 ratio"]
    none = "" if rows else f"<p>{escape(name)}: no massive activation.</p>"
    return none + found + details(f"{name}: the largest activation of every layer", table(head, largest))


def _having(runs: Runs, key: str) -> Runs:
    """Those with this measurement, which models of one layer have not."""
    return [run for run in runs if key in run[1]]


def _rows(run: Run, key: str = "traced") -> str:
    """How many rows a measurement of causes is of, with the run's name."""
    name, analysis = run
    taken, rows = analysis[key], analysis["utterances"]
    if taken == rows:
        return f"{escape(name)}: all {rows} rows"
    return f"{escape(name)}: {taken} of {rows} rows, at even distances in the order of length"


def _untraced(runs: Runs) -> list[str]:
    return [f"<p>{escape(name)}: left out. {escape(held['untraced'])}.</p>" for name, held in _having(runs, "untraced")]


def _origin(runs: Runs) -> str:
    parts = _untraced(runs)
    for run in _having(runs, "origin"):
        tokens = run[1]["origin"]["tokens"]
        rows = [
            [
                escape(label),
                f"{found['massive']} of {found['count']}",
                str(found["feature"]),
                "the embedding" if not found["layer"] else f"{found['block']} of layer {found['layer']}",
                f"{found['step']:+,.0f}",
            ]
            for label, found in tokens.items()
        ]
        head = ["token", "massive", "feature", "made by", "step"]
        drawn = _in_grid([_framed(svg) for svg in mechanism.contributions(run)])
        parts.append(
            f"<p>{_rows(run)}.</p>" + drawn + table(head, rows) + "".join(_units(*item) for item in tokens.items())
        )
    return "".join(parts)


def _units(label: str, found: dict[str, Any]) -> str:
    """Gate, up and down of the units behind one massive activation, beside what they do for ordinary tokens."""
    if not found["massive"]:
        return ""
    rows = [
        [
            str(unit["unit"]),
            f"{unit['share']:.0%}",
            *(f"{unit[key]:,.2f}" for key in ("gate", "up", "product", "down")),
            *(f"{unit['ordinary'][key]:,.2f}" if unit["ordinary"] else "" for key in ("gate", "product")),
        ]
        for unit in found["inside"]["units"]
    ]
    head = ["unit", "share", "gate", "up", "product", "down", "gate, ordinary tokens", "product, ordinary tokens"]
    return details(f"{label}: units of the MLP of layer {found['inside']['layer']}", table(head, rows))


def _features(runs: Runs) -> str:
    parts = []
    for run in _having(runs, "features"):
        found = run[1]["features"]
        rows = [
            [
                escape(label),
                str(one["count"]),
                ", ".join(map(str, one["common"])) or "none",
                f"{one['identical']} of {one['count']}",
                f"{one['cosine']:.3f}",
                "" if one["p_value"] is None else f"{one['p_value']:.2g}",
            ]
            for label, one in found["tokens"].items()
        ]
        head = ["token", "tokens", "massive features", "just as BOS", "cosine to BOS", "p"]
        parts.append(f"<p>{_rows(run)}, layer {found['layer']}: {_sets(found)}</p>" + table(head, rows))
    return "".join(parts)


def _sets(found: dict[str, Any]) -> str:
    """What the common sets of the labels beside BOS say, those with massive features and those without."""
    others = [one["common"] for label, one in found["tokens"].items() if label != "BOS"]
    if not others:
        return "nothing stands out beside BOS."
    none = sum(not common for common in others)
    said = {True: "all have BOS' set", False: "not all have BOS' set", None: "there are none"}
    return (
        f"of those beside BOS that are massive, {said[found['same_massive']]}; "
        f"{none} of {len(others)} kinds of tokens beside BOS have no massive feature."
    )


def _causal(runs: Runs) -> str:
    parts = _untraced(runs)
    for run in _having(runs, "causal"):
        causal = run[1]["causal"]
        normal = causal["normal"]
        rows = [
            _verdict(label, one, "activation_vanished", "sink_vanished", "vanishes")
            for label, one in causal["sinks"].items()
            if one is not None
        ]
        if normal is not None:
            rows.append(_verdict("ordinary", normal, "activation_appeared", "sink_appeared", "appears"))
        head = ["token turned", "behind layer", "rows", "angle", "|h| before", "after", "massive activation", "sink"]
        embedded = ", ".join(label for label, one in causal["sinks"].items() if one is None)
        left = f" Not turned, as the embedding makes it: {escape(embedded)}." if embedded else ""
        drawn = _in_grid([_framed(svg) for svg in mechanism.turning(run)])
        parts.append(f"<p>{_rows(run, 'turned')}.{left}</p>" + drawn + (table(head, rows) if rows else ""))
    return "".join(parts)


def _verdict(label: str, one: dict[str, Any], activation: str, sink: str, verb: str) -> list[str]:
    said = {True: verb, False: "does not", None: "was none"}
    sizes = [f"{one['activation'][index]:,.0f}" for index in (0, -1)]
    return [
        escape(label),
        str(one["layer"]),
        str(one["rows"]),
        f"{one['angle']:.0f}&deg;",
        *sizes,
        said[one[activation]],
        said[one[sink]],
    ]


def _activations(runs: Runs) -> str:
    return grid(runs, figures.activation_bars(runs), wide=True)


def _cosine(runs: Runs) -> str:
    return grid(runs, figures.layer_lines(runs, "cosine", named(runs), "cosine to BOS"))


def _maps(runs: Runs) -> str:
    parts = []
    for run in runs:
        title = f"<h3>{escape(run[0])}</h3>" if len(runs) > 1 else ""
        parts.append(title + _in_grid([_framed(svg) for svg in figures.attention_maps(run)], True))
    return "".join(parts)


def _training(runs: Runs) -> str:
    trained = [(name, analysis["curve"]) for name, analysis in runs if analysis.get("curve")]
    return _in_grid([_framed(svg) for svg in plots.training_curves(trained)]) if trained else ""


def _errors(runs: Runs) -> str:
    return "".join(
        details(f"{name}: worst utterances", f"<pre>{escape(analysis['errors'])}</pre>")
        for name, analysis in runs
        if analysis.get("errors")
    )


def _settings(runs: Runs) -> str:
    return "".join(
        details(f"{name}: config", f"<pre>{escape(analysis['settings'])}</pre>")
        for name, analysis in runs
        if analysis.get("settings")
    )


# In the order of the page; a new measurement adds its own entry.
SECTIONS = [
    Section(
        "sinks",
        "Sink rate by layer",
        "How often a token is an attention sink, as the share of heads, layer by layer. Raw: it receives more than 30% "
        "of the attention of all queries that may see it, on average; keys with fewer than 8 such queries are not "
        "counted. Corrected: the same, asked of the text tokens alone and without a token's attention to itself, so "
        "that all tokens face like queries; a row with fewer than 8 text tokens counts for its prompt alone.",
        _sinks,
    ),
    Section(
        "where",
        "Where the sinks are",
        "The corrected rate by token and layer, and both rates by position, as a share of all layers and heads. A "
        "position's rates end where too few tokens follow.",
        _where,
    ),
    Section(
        "heads",
        "Sinks by head",
        "The share of tokens in which BOS (one a row), and the strongest sink beside it, is a sink (corrected) of one "
        "head in one layer. Yellow heads look at it almost always.",
        _heads,
    ),
    Section(
        "value",
        "What a sink hands on",
        "Attention received from an average text query, and the same times the norm of the value vector |v|: what the "
        "attention brings. A sink with a value near zero takes attention and does nothing with it.",
        _value,
    ),
    Section(
        "mass",
        "Where the text's attention goes",
        "All attention of the text tokens, their own included, by the token that gets it; mean over heads. Every bar "
        "adds up to 1.",
        _mass,
    ),
    Section(
        "massive",
        "Massive activations",
        "The largest absolute value |h| of a token's hidden state behind every layer, and its ratio to the median |h| "
        "of all tokens of the same row and layer (mean over tokens). Massive: at least 1000 times the median (dashed) "
        "and above 100.",
        _massive,
    ),
    Section(
        "activations",
        "Activations of one row",
        "The largest |h| of every token of one row, behind the layer with the largest of all. Dashed: 1000 times the "
        "median. A long row is drawn in 96 pieces, each by its largest and named after its first token.",
        _activations,
    ),
    Section(
        "origin",
        "Where massive activations are made",
        "What attention and MLP of every layer add to the feature in which a token is massive (mean over the tokens of "
        "these rows that stand out). Below, the units of the MLP that adds most: a unit's product is act(gate) x up, "
        "and product x down is what it writes. A gate that opens for sinks alone is the paper's origin.",
        _origin,
    ),
    Section(
        "features",
        "A fixed set of features",
        "In which features the sinks and massive tokens of these rows are massive, behind the layer where they are "
        "largest. p: how likely so much overlap with BOS is when features are drawn at random.",
        _features,
    ),
    Section(
        "causal",
        "Cause: turning a state",
        "Before the layer that makes the massive activation, a sink's state is turned towards the nearest ordinary "
        "token, and an ordinary token's towards BOS (dashed), with its length kept; then the rest of the network runs. "
        "Vanishes: below a tenth; no sink any more, which is one in at least 10% of the (layer, head) pairs of the "
        "later layers, by the raw rate. Appears: above ten times and massive, and drawing at least half the attention "
        "of the row's sinks.",
        _causal,
    ),
    Section(
        "cosine",
        "Alignment with BOS",
        "Cosine between a token's hidden state and that of BOS behind every layer. At 1 it has become a second BOS.",
        _cosine,
    ),
    Section(
        "maps",
        "Attention maps",
        "Attention of one row, queries down and keys across, from dark (0) to light (1): the mean over heads, and the "
        "head in which a token other than BOS gets most. A bright column is a sink. A long row is drawn in 96 pieces, "
        "their keys summed and their queries averaged.",
        _maps,
    ),
    Section("training", "Training", "Loss and gradient norm by step. Dots: the validation split.", _training),
    Section("errors", "Errors", "The utterances with most word errors.", _errors),
    Section("settings", "Settings", "The resolved config of the run.", _settings),
]
