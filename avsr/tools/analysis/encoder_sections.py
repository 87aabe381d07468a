"""The sections of the report on speech encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avsr.tools.analysis import encoder_figures, figures
from avsr.tools.analysis.encoder_figures import WINDOWS
from avsr.tools.analysis.frames import EDGE, REGIONS, SILENT, WORTH
from avsr.tools.analysis.page import Runs, Section, by_run, details, escape, listed, table

_BY_LAYER = (
    "layer={layer}; largest multiple={multiple:.1f}; of all queries={multiple_raw:.1f}; "
    "heads with a sink={sink_heads:.1%}; clips with one={sink_clips:.0%}; sink frames per clip={sink_frames:.2f}; "
    "heads over 30%, raw={raw_heads:.1%}; corrected={corrected_heads:.1%}; attention to sinks={sink_mass:.1%}; "
    "|v| of sinks={sink_value:.2f}"
)
_ACTIVATIONS = (
    "layer={layer}; largest |h|={activation:,.1f}; ratio={ratio:,.0f}; most often at feature={feature}; "
    "in clips={feature_clips:.0%}; clips with massive={massive_clips:.0%}; massive frames per clip={massive_frames:.2f}"
)
_REGIONS = (
    "region={region}; frames={frames:.1%}; attention={mass:.1%}; multiple={multiple:.2f}; "
    "strongest frame={strongest:.1%}; sink rate={sink_rate_relative:.3%}; largest |h|={peak:.1%}"
)
_STRONGEST = (
    "layer={layer}; head={head}; multiple={multiple:,.1f}; share={share:.1%}; second={second:.2f}; region={region}; "
    "clip={clip}"
)
_LARGEST = (
    "layer={layer}; max |h|={value:,.1f}; ratio={ratio:,.0f}; feature={feature}; second={second:.2f}; region={region}; "
    "clip={clip}"
)
_MASSIVE = (
    "layer={layer}; feature={feature}; region={region}; frames={frames}; clips={clips}; largest={value:,.0f}; "
    "its ratio={ratio:,.0f}"
)
_SUMMARY = (  # label, of by_layer, over layers, format
    ("largest multiple of uniform attention, mean over clips, of the highest layer", "multiple", max, "{:.1f}"),
    ("the same of all queries, a frame's own included", "multiple_raw", max, "{:.1f}"),
    ("heads with a frame over 30%, raw", "raw_heads", "mean", "{:.2%}"),
    ("heads with a frame over 30%, corrected", "corrected_heads", "mean", "{:.2%}"),
    (f"heads with a sink ({WORTH:g} s of attention)", "sink_heads", "mean", "{:.2%}"),
    ("clips with one, in the layer with most", "sink_clips", max, "{:.1%}"),
    ("attention to sinks", "sink_mass", "mean", "{:.2%}"),
    ("largest |h|, mean over clips, of the highest layer", "activation", max, "{:,.1f}"),
    ("largest ratio to the median, likewise", "ratio", max, "{:,.0f}"),
    ("clips with a massive activation, in the layer with most", "massive_clips", max, "{:.1%}"),
)


def _summary(runs: Runs) -> str:
    rows = []
    for label, form, value in (
        ("clips", "{}", lambda a: a["clips"]),
        ("seconds in all", "{:,.0f}", lambda a: a["seconds"]),
        ("frames per second", "{}", lambda a: a["identity"]["frames_per_second"]),
        ("layers x heads", "{}", lambda a: f"{a['layers']} x {a['identity']['heads']}"),
        ("frames that are padding", "{:.1%}", lambda a: a["padding_frames"]),
        ("attention of the clip's frames to padding", "{:.1%}", _to_padding),
    ):
        rows.append([label, *(form.format(value(analysis)) for _, analysis in runs)])
    for label, key, over, form in _SUMMARY:
        found = [[row[key] for row in analysis["by_layer"]] for _, analysis in runs]
        rows.append([label, *(form.format(_over(values, over)) for values in found)])
    return table(["", *(name for name, _ in runs)], rows)


def _to_padding(analysis: dict[str, Any]) -> float:
    heads = [value for heads in analysis["heads"]["padding"] or [[0.0]] for value in heads]
    return sum(heads) / len(heads)


def _over(values: list[float], how: Any) -> float:
    return sum(values) / len(values) if how == "mean" else float(how(values))


def _titled(columns: str, key: str, summary: str = "") -> Callable[[Runs], str]:
    """A table of every run, under its name, or folded under ``summary``."""

    def build(runs: Runs) -> str:
        parts = []
        for name, analysis in runs:
            inner = listed(columns, analysis[key])
            parts.append(details(f"{name}: {summary}", inner) if summary else f"<h3>{escape(name)}</h3>{inner}")
        return "".join(parts)

    return build


def _heads(runs: Runs) -> str:
    rows = [encoder_figures.multiples_by_head(runs)]
    found = any(row["sink_heads"] for _, analysis in runs for row in analysis["by_layer"])
    if found:
        rows.append(encoder_figures.shares_by_head(runs, "sinks", "share of clips with a sink"))
    none = "" if found else "<p>No frame is a sink.</p>"
    strongest = _titled(_STRONGEST, "strongest", "the strongest frame of every layer")
    return by_run(runs, *rows) + none + strongest(runs)


def _regions(runs: Runs) -> str:
    groups = [region for region in REGIONS if any(region in analysis["groups"] for _, analysis in runs)]
    parts = [
        by_run(
            runs,
            figures.mass(runs, groups, "a clip's"),
            figures.layer_lines(runs, "multiple", groups, "multiple", log=True, mark=1.0),
        )
    ]
    for name, analysis in runs:
        rows = [{"region": region, **_means(values)} for region, values in analysis["groups"].items()]
        parts.append(f"<h3>{escape(name)}: means over layers</h3>{listed(_REGIONS, rows)}")
    return "".join(parts)


def _means(values: dict[str, Any]) -> dict[str, float]:
    return {key: sum(held) / len(held) if isinstance(held, list) else held for key, held in values.items()}


def _padding(runs: Runs) -> str:
    pictures = encoder_figures.shares_by_head(runs, "padding", "share of attention to padding")
    return by_run(runs, pictures) if any(pictures) else ""


def _massive(runs: Runs) -> str:
    groups = [region for region in REGIONS if any(region in analysis["groups"] for _, analysis in runs)]
    parts = [
        by_run(runs, figures.layer_lines(runs, "max_abs", groups, "max |h|", log=True)),
        _titled(_ACTIVATIONS, "by_layer")(runs),
        _titled(_LARGEST, "largest", "the largest activation of every layer")(runs),
    ]
    for name, analysis in runs:
        if analysis["massive"]:
            parts.append(details(f"{name}: massive activations", listed(_MASSIVE, analysis["massive"])))
        else:
            parts.append(f"<p>{escape(name)}: no massive activation.</p>")
    return "".join(parts)


SECTIONS = [
    Section(
        "summary",
        "Summary",
        "Every frame sees all frames. The multiple is what a frame receives on average from the clip's frames, without "
        "its attention to itself, in units of uniform attention (1 / number of frames, padding counted). A sink takes "
        f"at least as much attention as {WORTH:g} s of the clip have to give. Means are over clips, and rates of heads "
        "over layers.",
        _summary,
    ),
    Section(
        "layers",
        "By layer",
        "Means over clips. Sinks as above, and frames that receive more than 30% of all attention, as in language "
        "models (raw: of all queries; corrected: of the clip's frames, without that to itself). |v| of sinks: norm of "
        "the value relative to the head's mean, below 1 where a sink passes on less than others.",
        _titled(_BY_LAYER, "by_layer"),
    ),
    Section(
        "heads",
        "By head",
        "The largest multiple of a clip, mean over clips (log scale, the same for all), and the share of clips in "
        "which a frame is a sink.",
        _heads,
    ),
    Section(
        "time",
        "Where in time",
        "The multiple of a frame, mean over heads and clips, over the whole clip, in its first and last second, and in "
        "the first and last second of padding. Dashed: uniform attention.",
        lambda runs: by_run(runs, *(encoder_figures.over_time(runs, window) for window in WINDOWS)),
    ),
    Section(
        "regions",
        "Ends, speech, silence, padding",
        f"First and last: {EDGE:g} s at either end. Silence: frames {SILENT:g} dB below the clip's loudest; a clip "
        "without sound has neither speech nor silence between its ends. Attention: the share that goes there, beside "
        "the share of frames that uniform attention would give. Strongest frame: how often a head's is there. Largest "
        "|h|: how often a clip's is there.",
        _regions,
    ),
    Section(
        "padding",
        "Attention to padding",
        "Padded to 30 s as by Hugging Face, which masks nothing: the share of a clip's attention that goes to padding.",
        _padding,
    ),
    Section(
        "massive",
        "Massive activations",
        "The largest |h| of a clip after every layer, mean over clips: its ratio to the median |h| of clip and layer, "
        "and the feature where it is. Massive: a ratio of at least 1000, and |h| above 100. The figure shows the "
        "largest |h| of a frame, mean over the frames of a region.",
        _massive,
    ),
]
