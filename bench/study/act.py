"""ACT on the models of the arm "off": heads searched once a rate, on the first seed's model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from avsr.config import Config
from avsr.data.dataset import Reading, load_dataset
from avsr.evaluation.act import Heads
from avsr.evaluation.act_search import PAPER_BETA, search
from bench.study.arms import SEEDS, Arm
from bench.study.train import load_arm

UTTERANCES = 40  # of the validation split


def act_heads(rate: int, folder: Path) -> Heads:
    """The heads for a rate; searched in float32 when they are not in ``folder`` yet."""
    path = folder / f"act-{rate}.json"
    if not path.is_file():
        config, model, store = load_arm(Arm("off", rate, SEEDS[0]), folder, "training.precision=fp32")
        data = replace(config.data, limit=UTTERANCES)
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
    """With ACT at the paper's beta and threshold."""
    return replace(config, act=replace(config.act, beta=PAPER_BETA))
