"""``avsr analyze RUN [RUN2]``: ``analysis.json`` and ``report.html``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from avsr.analysis.collect import attention_map, collect
from avsr.analysis.report import write_report
from avsr.build import load_run, pick_device
from avsr.config import Config, to_yaml
from avsr.data.dataset import SpeechDataset
from avsr.errors import UserError
from avsr.evaluate import test_sets
from avsr.models.speech_llm import SpeechLLM
from avsr.training.metrics import read_metrics


def analyze_model(config: Config, model: SpeechLLM, dataset: SpeechDataset, run: Path) -> dict[str, Any]:
    """Statistics of a loaded run with its curve, scores and errors (as far as it has them)."""
    analysis = collect(model, dataset, config)
    analysis["attention_map"] = attention_map(model, dataset)
    analysis["curve"] = read_metrics(run)
    analysis["settings"] = to_yaml(config)
    analysis["lambda"], analysis["margin"] = config.loss.decorrelation, config.loss.margin
    scores = run / "metrics.json"
    if scores.is_file():
        held = json.loads(scores.read_text(encoding="utf-8"))
        analysis["scores"] = {name: value for name, value in held.items() if "wer" in value}
    errors = run / "errors.txt"
    analysis["errors"] = errors.read_text(encoding="utf-8") if errors.is_file() else ""
    return analysis


def analyze(runs: list[str], overrides: list[str], out: str | None = None) -> Path:
    """Analyses one run or several side by side over the first test set; returns the report's path.

    Everything is written to ``out``, by default the first run's folder.
    """
    analyses: list[tuple[str, dict[str, Any]]] = []
    for run in runs:
        config, model, store = load_run(run, overrides, pick_device())
        first = dict(list(config.data.test.items())[:1])
        config.data.test = first
        dataset = next(iter(test_sets(config, model, store).values()))
        analyses.append((run_label(run, runs), analyze_model(config, model, dataset, Path(run))))
    return write_results(Path(out or runs[0]), analyses)


def write_results(folder: Path, analyses: list[tuple[str, dict[str, Any]]]) -> Path:
    """Writes both files to ``folder`` and returns the report's path."""
    names = " and ".join(name for name, _ in analyses)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "analysis.json").write_text(json.dumps(dict(analyses), indent=1) + "\n", encoding="utf-8")
        write_report(folder / "report.html", analyses, f"Attention sinks: {names}")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error}") from error
    return folder / "report.html"


def run_label(run: str, runs: list[str]) -> str:
    """The folder's name, or the whole path where two runs share one."""
    names = [Path(other).name for other in runs]
    return Path(run).name if names.count(Path(run).name) == 1 else run
