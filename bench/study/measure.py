"""What a trained arm is worth: word errors, sinks, side effects. A row of ``rows.jsonl``."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from avsr.config import Config
from avsr.data.batches import collate, make_batches
from avsr.data.dataset import SpeechDataset
from avsr.data.features import FeatureStore
from avsr.evaluation.act import calibrated
from avsr.evaluation.run import decode_set, test_sets
from avsr.evaluation.wer import score
from avsr.models.speech_llm import SpeechLLM
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.inputs import speech_subject
from avsr.training.metrics import read_metrics
from bench.study.act import act_heads, calibrating
from bench.study.arms import INFERENCE, SEEDS, START, Arm
from bench.study.interventions import KINDS, MassiveMeans, intervene
from bench.study.plain_text import perplexity, plain_text
from bench.study.quantise import int8_inputs
from bench.study.train import FOLDER, load_arm

ANALYSED = 100  # utterances whose attention is looked at
CURVE = ("ce", "decorrelation", "grad_norm", "grad_norm_ce", "grad_norm_decorrelation", "grad_cosine")


def measure(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """The row of a trained arm. WER are fractions; errors are edits of every utterance, in the manifest's order."""
    config, model, store = load_arm(arm, folder)
    sets = test_sets(config, model, store)
    row: dict[str, Any] = {"arm": _plain(arm), "key": arm.key, "machine": machine(), **_curves(Path(config.run))}
    if not arm.sink_logits:  # whose attention the analysis does not know
        row["sinks"] = sinks(model, _few(config, model, store), config)
    row["scores"] = {"sentences": _score(model, sets["sentences"], config, "sentences")}
    if arm.name.partition("-")[0] in ("off", "paper", "margin"):
        row["scores"]["unseen_voices"] = _score(model, sets["unseen_voices"], config, "unseen_voices")
    with int8_inputs(model.decoder.model):
        row["scores"]["sentences int8"] = _score(model, sets["sentences"], config, "sentences int8")
    row["perplexity"], row["plain_text_tokens"] = perplexity(model, plain_text())
    return row


def measure_start(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """The sinks of an arm before its training."""
    config, model, store = load_arm(arm, folder, trained=False)
    found = sinks(model, _few(config, model, store), config)
    row: dict[str, Any] = {"arm": _plain(arm), "key": START + arm.key, "sinks": found}
    if arm.name == "off" and arm.seed == SEEDS[0]:
        row["perplexity"] = perplexity(model, plain_text())[0]  # of the language model without adapters
    return row


def measure_inference(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """What is done to a trained arm at inference alone: ACT, and for the first seed massive activations changed."""
    config, model, store = load_arm(arm, folder)
    sets = test_sets(config, model, store)
    heads = act_heads(arm.rate, folder)
    with calibrated(calibrating(config), model, heads):
        scores = {name: _score(model, dataset, config, name) for name, dataset in sets.items()}
    if arm.seed == SEEDS[0]:
        scores |= _interventions(model, sets["sentences"], config)
    return {"arm": _plain(arm), "key": INFERENCE + arm.key, "act_heads": heads, "scores": scores}


def _few(config: Config, model: SpeechLLM, store: FeatureStore) -> SpeechDataset:
    """The utterances of the first test set whose attention is looked at."""
    data = replace(config.data, limit=ANALYSED, test=dict(list(config.data.test.items())[:1]))
    return next(iter(test_sets(replace(config, data=data), model, store).values()))


def sinks(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> dict[str, Any]:
    """The analysis in few numbers: every token group's means over layers 1..L-1, its share of the text's attention, its
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


def machine() -> str:
    """Commit and processor."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    return f"{commit.strip()}, {platform.machine()} CPU, one thread"


def _score(model: SpeechLLM, dataset: SpeechDataset, config: Config, name: str) -> dict[str, Any]:
    total, rows = decode_set(model, dataset, config, name)
    errors = []
    for row in rows:
        one = score([row["reference"]], [row["hypothesis"]])
        errors.append(one.substitutions + one.deletions + one.insertions)
    return {"wer": total.wer, "words": total.words, "errors": errors}


def _interventions(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> dict[str, Any]:
    means = MassiveMeans()
    with torch.no_grad(), intervene(model, "watch", means):
        for indices in make_batches(dataset.sizes, config.training.frames, config.decode.batch):
            model.hidden_states(model.assemble(collate([dataset[i] for i in indices]), with_text=False))
    scores = {}
    for kind in KINDS:
        with intervene(model, kind, means):
            scores[f"massive {kind}"] = _score(model, dataset, config, kind)
    return scores


def _curves(run: Path) -> dict[str, Any]:
    rows = read_metrics(run)
    validated = [(row["step"], round(row["validation_ce"], 4)) for row in rows if row.get("validation_ce") is not None]
    kept = [row for row in rows if "grad_norm_ce" in row or row["step"] % 50 == 0]
    curve = [{"step": r["step"], **{k: float(f"{r[k]:.4g}") for k in CURVE if r.get(k) is not None}} for r in kept]
    return {"validation": validated, "curve": curve, "seconds": round(sum(row["seconds"] for row in rows))}


def _plain(arm: Arm) -> dict[str, Any]:
    """The arm without what is left at its default."""
    defaults = asdict(Arm(arm.name))
    return {name: value for name, value in asdict(arm).items() if name == "name" or value != defaults[name]}
