"""Measures an arm: word errors, sinks, side effects. The result is a row of ``rows.jsonl``."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from avsr.config import Config
from avsr.data.batches import collate, make_batches
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.evaluation.act import Heads, calibrated
from avsr.evaluation.act_search import PAPER_BETA, search
from avsr.evaluation.run import decode_set, test_sets
from avsr.evaluation.wer import score
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.machine import settled_precision
from avsr.training.checkpoint import STATE
from avsr.training.metrics import read_metrics
from bench.study import settled
from bench.study.grid import ARMS, INFERENCE, SEEDS, START, Arm, arm_key
from bench.study.interventions import KINDS, MassiveMeans, intervene
from bench.study.side_effects import int8_inputs, perplexity, plain_text
from bench.study.summary import ANALYSED, curves, plain_arm, sinks
from bench.study.train import FOLDER, config_of, load_arm, train_arm

SEARCHED = 40  # utterances of the validation split on which ACT's heads are searched


def arm_of(key: str) -> Arm:
    """The arm of a row's key, of either study."""
    return {**ARMS, **settled.ARMS}[arm_key(key)]


def row_of(key: str) -> dict[str, Any]:
    """The row of ``key``; trains its arm first unless it is trained."""
    arm = arm_of(key)
    if key.startswith(START):
        return measure_start(arm)
    if key.startswith(INFERENCE):
        return measure_inference(arm)
    config = config_of(arm)
    if not _finished(Path(config.run), config.training.steps):
        train_arm(arm)
    return measure_settled(arm) if arm.settled else measure(arm)


def _finished(run: Path, steps: int) -> bool:
    state = run / "checkpoints" / "last" / STATE
    return state.is_file() and json.loads(state.read_text(encoding="utf-8"))["step"] == steps


def measure(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """The row of a trained arm. WER is a fraction; errors are the edits of every utterance, in the manifest's order."""
    config, model, store = load_arm(arm, folder)
    sets = test_sets(config, model, store)
    row = _begin_row(arm, config)
    if not arm.sink_logits:  # the analysis does not support its attention
        row["sinks"] = sinks(model, _few(config, model, store), config)
    row["scores"] = {"sentences": _score(model, sets["sentences"], config, "sentences")}
    if arm.name.partition("-")[0] in ("off", "paper", "margin"):
        row["scores"]["unseen_voices"] = _score(model, sets["unseen_voices"], config, "unseen_voices")
    with int8_inputs(model.decoder.model):
        row["scores"]["sentences int8"] = _score(model, sets["sentences"], config, "sentences int8")
    row["perplexity"], row["plain_text_tokens"] = perplexity(model, plain_text())
    return row


def measure_settled(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """The row of a trained arm of the settled study, as of :func:`measure`."""
    config, model, store = load_arm(arm, folder)
    row = _begin_row(arm, config)
    row["sinks"] = sinks(model, _few(config, model, store), config)
    sets = test_sets(config, model, store)
    row["scores"] = {name: _score(model, dataset, config, name) for name, dataset in sets.items()}
    row["perplexity"], row["plain_text_tokens"] = perplexity(model, plain_text())
    return row


def _begin_row(arm: Arm, config: Config) -> dict[str, Any]:
    curve = curves(read_metrics(Path(config.run)))
    return {"arm": plain_arm(arm), "key": arm.key, "machine": machine(config), **curve}


def measure_start(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """The sinks of an arm before its training."""
    config, model, store = load_arm(arm, folder, trained=False)
    found = sinks(model, _few(config, model, store), config)
    row: dict[str, Any] = {"arm": plain_arm(arm), "key": START + arm.key, "sinks": found}
    if arm.name == "off" and arm.seed == SEEDS[0]:
        row["perplexity"] = perplexity(model, plain_text())[0]  # of the language model without adapters
    return row


def measure_inference(arm: Arm, folder: Path = FOLDER) -> dict[str, Any]:
    """A trained arm changed at inference only: ACT, and for the first seed changed massive activations."""
    config, model, store = load_arm(arm, folder)
    sets = test_sets(config, model, store)
    heads = act_heads(arm, folder)
    with calibrated(calibrating(config), model, heads):
        scores = {name: _score(model, dataset, config, name) for name, dataset in sets.items()}
    if arm.seed == SEEDS[0] and not arm.settled:
        scores |= _interventions(model, sets["sentences"], config)
    return {"arm": plain_arm(arm), "key": INFERENCE + arm.key, "act_heads": heads, "scores": scores}


def act_heads(arm: Arm, folder: Path) -> Heads:
    """ACT's heads for an arm, on the model of its first seed; searched in float32 unless they are in ``folder``."""
    first = replace(arm, seed=SEEDS[0])
    path = folder / f"act-{first.key.replace(' ', '-')}.json"
    if not path.is_file():
        config, model, store = load_arm(first, folder, "training.precision=fp32")
        data = replace(config.data, limit=SEARCHED)
        dataset = load_dataset(
            data.validation,
            data,
            store,
            model.tokenize,
            title="read validation",
            reading=Reading("audio"),
            refuse=model.layout.unusable,
        )
        found = search(model, dataset, calibrating(config))
        path.write_text(json.dumps({"heads": found.heads, "ce": found.plain, "ce_act": found.best}), encoding="utf-8")
    return [(layer, head) for layer, head in json.loads(path.read_text(encoding="utf-8"))["heads"]]


def calibrating(config: Config) -> Config:
    """``config`` with ACT at the paper's beta and threshold."""
    return replace(config, act=replace(config.act, beta=PAPER_BETA))


def _few(config: Config, model: SpeechLLM, store: FeatureStore) -> SpeechDataset:
    """The analyzed utterances, of the first test set."""
    data = replace(config.data, limit=ANALYSED, test=dict(list(config.data.test.items())[:1]))
    return next(iter(test_sets(replace(config, data=data), model, store).values()))


def machine(config: Config) -> str:
    """Commit, processor and the precision of the training."""
    precision = settled_precision(config.training.precision)
    return f"{commit()}, {platform.machine()} CPU, {precision}, one thread"


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _score(model: SpeechLLM, dataset: SpeechDataset, config: Config, name: str) -> dict[str, Any]:
    _, rows = decode_set(model, dataset, config, name)
    return scored([row["reference"] for row in rows], [row["hypothesis"] for row in rows])


def scored(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """WER, a fraction, the words of the references, and the edits of every utterance."""
    total = score(references, hypotheses)
    errors = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        one = score([reference], [hypothesis])
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
