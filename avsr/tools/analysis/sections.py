"""The sections of the report: each a heading with an id, a caption that says what one sees, and figures or tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from avsr.tools.analysis import figures, plots
from avsr.tools.analysis.figures import Run
from avsr.tools.analysis.groups import BOS, IMAGE, SPEECH, TEXT
from avsr.tools.analysis.page import Runs, Section, by_run, details, escape, grid, listed

# Tables: headings with the formats of their cells.
_MASSIVE = (
    "token={group}; layer={layer}; feature={feature}; tokens={count}; largest={value:,.0f}; "
    "its log10 ratio={log10_ratio:.2f}"
)
_LARGEST = "layer={layer}; max |h|={value:,.1f}; token={token}; feature={feature}; log10 ratio={log10_ratio:.2f}"
_ORIGIN = "token={label}; massive={massive} of {count}; feature={feature}; made by={origin}; step={step:+,.0f}"
_UNITS = (
    "unit={unit}; share={share:.0%}; gate={gate:,.2f}; up={up:,.2f}; product={product:,.2f}; down={down:,.2f}; "
    "gate, ordinary tokens={ordinary[gate]:,.2f}; product, ordinary tokens={ordinary[product]:,.2f}"
)
_FEATURES = (
    "token={label}; tokens={count}; massive features={features}; exactly as BOS={identical} of {count}; "
    "cosine to BOS={cosine:.3f}; p={p_value:.2g}"
)
_CAUSAL = (
    "token rotated={label}; after layer={layer}; rows={rows}; angle={angle:.0f}°; |h| before={before:,.0f}; "
    "after={after:,.0f}; massive activation={massive}; sink={sink}"
)


def named(runs: Runs) -> list[str]:
    """What figures draw: the shown groups of all runs, in the order of the rows, text, speech and images last."""
    groups = list(dict.fromkeys(group for _, analysis in runs for group in analysis["shown"]))
    return sorted(groups, key=lambda group: group in (SPEECH, IMAGE, TEXT))


def _lines(**curves: str) -> Callable[[Runs], str]:
    """Figures of values by layer: their keys with their labels."""

    def build(runs: Runs) -> str:
        return by_run(runs, *(figures.layer_lines(runs, key, named(runs), label) for key, label in curves.items()))

    return build


def _where(runs: Runs) -> str:
    return by_run(runs, figures.heat_by_token(runs, "sink_rate_corrected", named(runs)), figures.positions(runs))


def _heads(runs: Runs) -> str:
    groups = dict.fromkeys([BOS, *(analysis["strongest"] for _, analysis in runs)])
    return by_run(
        runs,
        *([figures.heat_by_head(run, group) if group in run[1]["heads"] else "" for run in runs] for group in groups),
    )


def _massive(runs: Runs) -> str:
    groups = named(runs)
    parts = [
        by_run(
            runs,
            figures.layer_lines(runs, "max_abs", groups, "max |h|", log=True),
            figures.layer_lines(runs, "log10_ratio", groups, "log10(max / median)", mark=3.0),
        )
    ]
    for name, analysis in runs:
        found = analysis["massive"]
        if found:
            parts.append(details(f"{name}: massive activations ({len(found)})", listed(_MASSIVE, found)))
        else:
            parts.append(f"<p>{escape(name)}: no massive activation.</p>")
        parts.append(details(f"{name}: the largest activation of every layer", listed(_LARGEST, analysis["largest"])))
    return "".join(parts)


def _having(runs: Runs, key: str) -> list[tuple[Run, Any]]:
    """Those with this measurement, which models of one layer do not have, and the measurement."""
    return [(run, run[1][key]) for run in runs if key in run[1]]


def _rows(run: Run, key: str = "traced") -> str:
    """How many rows a measurement of causes is of, with the run's name."""
    name, analysis = run
    taken, rows = analysis[key], analysis["utterances"]
    if taken == rows:
        return f"{escape(name)}: all {rows} rows"
    return f"{escape(name)}: {taken} of {rows} rows, at even distances in the order of length"


def _untraced(runs: Runs) -> list[str]:
    return [f"<p>{escape(name)}: left out. {escape(why)}.</p>" for (name, _), why in _having(runs, "untraced")]


def _origin(runs: Runs) -> str:
    parts = _untraced(runs)
    for run, origin in _having(runs, "origin"):
        rows = [
            {"label": label, "origin": f"{found['block']} of layer {found['layer']}", **found}
            | ({} if found["layer"] else {"origin": "the embedding"})
            for label, found in origin["tokens"].items()
        ]
        parts += [f"<p>{_rows(run)}.</p>", grid(figures.contributions(run)), listed(_ORIGIN, rows)]
        parts += [
            details(f"{row['label']}: units of the MLP of layer {inside['layer']}", listed(_UNITS, inside["units"]))
            for row in rows
            if row["massive"] and (inside := row["inside"])
        ]
    return "".join(parts)


def _features(runs: Runs) -> str:
    parts = []
    for run, found in _having(runs, "features"):
        rows = [
            {**one, "label": label, "features": ", ".join(map(str, one["common"])) or "none"}
            for label, one in found["tokens"].items()
        ]
        parts.append(f"<p>{_rows(run)}, layer {found['layer']}: {_sets(found)}</p>{listed(_FEATURES, rows)}")
    return "".join(parts)


def _sets(found: dict[str, Any]) -> str:
    """What the common sets of the labels other than BOS say, those with massive features and those without."""
    others = [one["common"] for label, one in found["tokens"].items() if label != BOS]
    if not others:
        return "nothing stands out but BOS."
    none = sum(not common for common in others)
    said = {True: "all have BOS' set", False: "not all have BOS' set", None: "there are none"}
    return (
        f"of the other tokens that are massive, {said[found['same_massive']]}; "
        f"{none} of {len(others)} kinds of tokens other than BOS have no massive feature."
    )


def _causal(runs: Runs) -> str:
    parts = _untraced(runs)
    for run, causal in _having(runs, "causal"):
        verdicts = [(label, one, "vanished", "vanishes") for label, one in causal["sinks"].items() if one is not None]
        if causal["normal"] is not None:
            verdicts.append(("ordinary", causal["normal"], "appeared", "appears"))
        rows = []
        for label, one, ending, verb in verdicts:
            said = {True: verb, False: "does not", None: "was none"}
            sizes = {"before": one["activation"][0], "after": one["activation"][-1]}
            massive, sink = (said[one[f"{what}_{ending}"]] for what in ("activation", "sink"))
            rows.append({**one, **sizes, "label": label, "massive": massive, "sink": sink})
        embedded = ", ".join(label for label, one in causal["sinks"].items() if one is None)
        left = f" Not rotated, as the embedding makes it: {escape(embedded)}." if embedded else ""
        parts += [f"<p>{_rows(run, 'turned')}.{left}</p>", grid(figures.rotations(run))]
        parts += [listed(_CAUSAL, rows)] if rows else []
    return "".join(parts)


def _maps(runs: Runs) -> str:
    return "".join(
        (f"<h3>{escape(run[0])}</h3>" if len(runs) > 1 else "") + grid(figures.attention_maps(run), wide=True)
        for run in runs
    )


def _training(runs: Runs) -> str:
    return grid(plots.training_curves([(name, held["curve"]) for name, held in runs if held.get("curve")]))


def _texts(key: str, what: str, runs: Runs) -> str:
    """The text under ``key`` of every run, folded."""
    return "".join(
        details(f"{name}: {what}", f"<pre>{escape(analysis[key])}</pre>")
        for name, analysis in runs
        if analysis.get(key)
    )


# In the order of the page; a new measurement adds its own entry.
SECTIONS = [
    Section(
        "sinks",
        "Sink rate by layer",
        "How often a token is an attention sink, as the share of heads, layer by layer. Raw: it receives more than 30% "
        "of the attention of all queries that may see it, on average; keys with fewer than 8 such queries are not "
        "counted. Corrected: the same, but only over the text tokens as queries and without a token's attention to "
        "itself, so that all tokens face the same kind of query; in a row with fewer than 8 text tokens only the "
        "prompt is counted.",
        _lines(sink_rate="sink rate, raw", sink_rate_corrected="sink rate, corrected"),
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
        "The share of tokens in which BOS (one per row), and the strongest other sink, is a sink (corrected) of one "
        "head in one layer. Yellow heads attend to it almost always.",
        _heads,
    ),
    Section(
        "value",
        "What a sink passes on",
        "Attention received from an average text query, and the same times the norm of the value vector |v|: what the "
        "attention contributes. A sink whose value is near zero takes attention and does nothing with it.",
        _lines(received="attention received", received_value="received x |v|", value_norm="|v|"),
    ),
    Section(
        "mass",
        "Where the text's attention goes",
        "All attention of the text tokens, including that to themselves, by the token that receives it; mean over "
        "heads. Every bar adds up to 1.",
        lambda runs: by_run(runs, figures.mass(runs, named(runs))),
    ),
    Section(
        "massive",
        "Massive activations",
        "The largest absolute value |h| of a token's hidden state after every layer, and its ratio to the median |h| "
        "of all tokens of the same row and layer (mean over tokens). Massive: at least 1000 times the median (dashed) "
        "and above 100.",
        _massive,
    ),
    Section(
        "activations",
        "Activations of one row",
        "The largest |h| of every token of one row, after the layer with the largest of all. Dashed: 1000 times the "
        "median. A long row is drawn in 96 pieces, each by its largest value and named after its first token.",
        lambda runs: by_run(runs, figures.activation_bars(runs), wide=True),
    ),
    Section(
        "origin",
        "Where massive activations are made",
        "What attention and MLP of every layer add to the feature in which a token is massive (mean over the tokens of "
        "these rows that stand out). Below, the units of the MLP that adds most: a unit's product is act(gate) x up, "
        "and product x down is what it writes. A gate that opens only for sinks is the origin the paper describes.",
        _origin,
    ),
    Section(
        "features",
        "A fixed set of features",
        "In which features the sinks and massive tokens of these rows are massive, after the layer where they are "
        "largest. p: how likely so much overlap with BOS is when features are drawn at random.",
        _features,
    ),
    Section(
        "causal",
        "Causal test: rotating a state",
        "Before the layer that makes the massive activation, a sink's state is rotated toward the nearest ordinary "
        "token, and an ordinary token's toward BOS (dashed), with its norm kept; then the rest of the network runs. "
        "An activation vanishes when it falls below a tenth, and appears when it grows more than tenfold and becomes "
        "massive. A sink, which is one in at least 10% of the (layer, head) pairs of the later layers by the raw rate, "
        "vanishes when it no longer is one; one appears where a token draws at least half the attention of the row's "
        "sinks.",
        _causal,
    ),
    Section(
        "cosine",
        "Alignment with BOS",
        "Cosine between a token's hidden state and that of BOS after every layer. At 1 it has become a second BOS.",
        _lines(cosine="cosine to BOS"),
    ),
    Section(
        "maps",
        "Attention maps",
        "Attention of one row, queries down and keys across, from dark (0) to light (1): the mean over heads, and the "
        "head in which a token other than BOS receives most. A bright column is a sink. A long row is drawn in 96 "
        "pieces, their keys summed and their queries averaged.",
        _maps,
    ),
    Section("training", "Training", "Loss and gradient norm by step. Dots: the validation split.", _training),
    Section(
        "errors",
        "Errors",
        "Which words are taken for which others, which errors are a matter of spelling, and the utterances with the "
        "most word errors.",
        partial(_texts, "errors", "confusions and worst utterances"),
    ),
    Section("settings", "Settings", "The resolved config of the run.", partial(_texts, "settings", "config")),
]
