"""What a row of ``rows.jsonl`` says of a training: its arm, its curves, and the sinks of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from avsr.config import Config
from avsr.models.speech_llm import SpeechLLM
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.inputs import speech_subject
from bench.study.grid import Arm

if TYPE_CHECKING:
    from avsr.data.dataset import SpeechDataset

ANALYSED = 100  # utterances whose attention is analyzed
CURVE = ("ce", "decorrelation", "grad_norm", "grad_norm_ce", "grad_norm_decorrelation", "grad_cosine")


def sinks(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> dict[str, Any]:
    """A summary of the analysis: for every token group the means over layers 1..L-1, its share of the text's attention,
    ``peak`` (the largest mean over tokens of any of these layers) and ``massive`` (the largest share of its tokens that
    are massive in any of them)."""
    analysis, _ = collect(speech_subject(model, dataset, config))
    inner = analysis["layers"] - 1
    massive: dict[tuple[str, int], int] = {}
    for found in analysis["massive"]:
        place = found["group"], found["layer"]
        massive[place] = massive.get(place, 0) + (found["count"] if found["layer"] <= inner else 0)
    groups = {}
    for name, group in analysis["groups"].items():
        means = {key: _inner_mean(group[key]) for key in ("cosine", "sink_rate", "sink_rate_corrected", "mass")}
        groups[name] = {key: value for key, value in means.items() if value is not None}
        groups[name]["peak"] = round(max(group["max_abs"][:inner]), 1)
        most = max((count for (other, _), count in massive.items() if other == name), default=0)
        groups[name]["massive"] = round(most / group["tokens"], 4)
    features = {(m["group"], m["feature"]) for m in analysis["massive"] if m["layer"] <= inner}
    return {"cos2": analysis["cos2"], "features": sorted(features), "groups": groups}


def _inner_mean(by_layer: list[float] | None) -> float | None:
    return None if by_layer is None else round(sum(by_layer[:-1]) / len(by_layer[:-1]), 5)


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The validation curve, every 50th step and those with the norms of both terms, and the seconds of all steps, of a
    run's metrics."""
    validated = [(row["step"], round(row["validation_ce"], 4)) for row in rows if row.get("validation_ce") is not None]
    kept = [row for row in rows if "grad_norm_ce" in row or row["step"] % 50 == 0]
    curve = [{"step": r["step"], **{k: float(f"{r[k]:.4g}") for k in CURVE if r.get(k) is not None}} for r in kept]
    return {"validation": validated, "curve": curve, "seconds": round(sum(row["seconds"] for row in rows))}


def plain_arm(arm: Arm) -> dict[str, Any]:
    """The arm's fields that differ from their defaults."""
    defaults = asdict(Arm(arm.name))
    return {name: value for name, value in asdict(arm).items() if name == "name" or value != defaults[name]}
