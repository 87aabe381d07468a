"""``make demo``: the whole pipeline with real models, with the decorrelation loss off and on.

Synthesizes a corpus, teaches the projector its words once, trains twice from there, evaluates on unseen sentences and
unseen voices, and writes one report.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from avsr.config import load_config
from avsr.errors import UserError, guarded
from avsr.evaluation.run import decode_set, evaluate_model, test_sets
from avsr.models.build import build_model, build_store, load_run, pick_device
from avsr.runtime.folders import write_whole
from avsr.runtime.locks import claim
from avsr.tools.analyze import analyze_model, write_results
from avsr.training.warm_start import warm_projector

RECIPES = {"off": "demo", "on": "demo_decorrelation"}
CORPUS = "data/demo"
FOLDER = "runs/demo"
SYNTH_OPTIONS = ["grid=1000", "open=0", "voices=8", "video=0"]
PROJECTOR, PROJECTOR_STEPS = "projector.safetensors", 400
# With a projector that knows the words, half the batch and three fifths of the recipe's steps are enough. After 200
# steps the loss has not removed the sink yet; with a larger lambda or learning rate, BOS and <audio> swap roles
# (bench/LOG.md).
OVERRIDES = ["training.steps=300", "training.validate_every=100", "training.utterances=4", "training.frames=450"]


class Stages:
    """What a demo has done: ``unfinished.json`` of its folder, until :meth:`end`. A demo that was stopped goes on with
    the same overrides; with others it begins again.

    ``runs``: its runs' folders, and the file that each is recognized by.
    """

    def __init__(self, folder: Path, overrides: list[str], runs: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._began = folder / "unfinished.json", time.monotonic()
        self._kept: dict[str, Any] = {"overrides": overrides, "seconds": 0.0}
        with suppress(OSError, ValueError):
            kept = json.loads(self._path.read_bytes())
            if kept["overrides"] == overrides:
                self._kept = kept
                return
        for name, file in runs.items():
            fresh(folder / name, file)
        (folder / PROJECTOR).unlink(missing_ok=True)
        self._keep()

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of ``make``, or what it was before the demo was stopped."""
        if name not in self._kept:
            self._kept[name] = make()
            self._keep()
        return self._kept[name]

    def train(self, recipe: str, run: Path, overrides: Sequence[str]) -> None:
        """``avsr train``, from the run's last checkpoint if it has one."""
        resumes = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
        if not resumes:
            fresh(run, "config.yaml")
        run_command("train", recipe, f"run={run}", *overrides, *(["resume=true"] if resumes else []))

    def end(self) -> float:
        """The seconds that all took."""
        self._path.unlink()
        return float(self._kept["seconds"]) + time.monotonic() - self._began

    def _keep(self) -> None:
        now = time.monotonic()
        self._kept["seconds"] += now - self._began
        self._began = now
        write_whole(self._path, json.dumps(self._kept).encode())


def run_demo(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs everything; returns (and writes) the summary."""
    overrides = [*OVERRIDES, f"training.initial_weights={folder / PROJECTOR}", *overrides]
    stages = Stages(folder, overrides, dict.fromkeys(RECIPES, "config.yaml"))
    say("1/6  a corpus of synthetic speech")
    run_command("synth", CORPUS, *SYNTH_OPTIONS)
    say("2/6  the projector learns to map speech to the embeddings of its words")
    warm_projector(load_config(RECIPES["off"], overrides), folder / PROJECTOR, PROJECTOR_STEPS)
    say("3/6  word error rate before training")
    before = stages.result("before", lambda: _untrained(overrides))
    analyses = {}
    for number, (name, recipe) in enumerate(RECIPES.items(), 4):
        say(f"{number}/6  training with decorrelation {name}")
        run = folder / name
        stages.train(recipe, run, overrides)
        config, model, store = load_run(run, [], pick_device())
        sets = test_sets(config, model, store)
        evaluate_model(config, model, sets, run)
        analyses[name] = analyze_model(config, model, next(iter(sets.values())), run)
    say("6/6  the report")
    write_results(folder, list(analyses.items()))
    summary = summarise(before, analyses, stages.end())
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def summarise(wer_before: float, analyses: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The numbers of ``summary.json``: WER as fractions, means over layers 1..L-1, intermediate = ``<audio>``; a sink
    rate is None if no row is long enough for one."""
    off, on = analyses["off"], analyses["on"]
    summary: dict[str, Any] = {"wer_before": wer_before}
    for name, analysis in analyses.items():
        summary[f"wer_{name}"] = analysis["scores"]["sentences"]["wer"]
        summary[f"wer_{name}_unseen_voices"] = analysis["scores"]["unseen_voices"]["wer"]
    for key in ("cos2", "intermediate_activation", "intermediate_sink_rate"):
        summary[f"{key}_off"], summary[f"{key}_on"] = off[key], on[key]
    summary["lambda"], summary["margin"] = on["lambda"], on["margin"]
    summary["utterances"] = off["utterances"]
    summary["seconds"] = seconds
    for name, analysis in analyses.items():
        steps = sorted(row["seconds"] for row in analysis["curve"])
        summary[f"seconds_per_step_{name}"] = steps[len(steps) // 2]
    summary["peak_memory_mb"] = max(row["peak_memory_mb"] for a in analyses.values() for row in a["curve"])
    return summary


def _untrained(overrides: list[str]) -> float:
    config = load_config(RECIPES["off"], overrides)
    device = pick_device()
    store = build_store(config, device, config.decode.tasks, config.noise.snr)
    model, _ = build_model(config, store, device)
    name, dataset = next(iter(test_sets(config, model.eval(), store).items()))
    return decode_set(model, dataset, config, name)[0].wer


def fresh(run: Path, file: str) -> None:
    """Removes an earlier run of the demo, recognized by its ``file``."""
    if run.exists():
        if not (run / file).is_file():
            raise UserError(f"{run} exists and is not a run of the demo; move it away")
        shutil.rmtree(run)


def run_command(*arguments: str) -> None:
    """Runs ``avsr ...`` in its own process: its memory is measured alone, and synth's workers start fast."""
    command = [sys.executable, "-m", "avsr.cli", *arguments]
    status = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if status:
        raise UserError(f"avsr {' '.join(arguments)} failed with status {status}")


def _table(summary: dict[str, Any]) -> Table:
    title = "Decorrelation loss on Whisper-tiny.en + SmolLM2-135M, synthetic GRID speech"
    table = make_table(title, ("", "off", "on"))
    rows = (
        ("WER, unseen sentences", "wer_{}", "{:.3f}"),
        ("WER, unseen voices", "wer_{}_unseen_voices", "{:.3f}"),
        ("mean cos² to BOS", "cos2_{}", "{:.4f}"),
        ("<audio>: max |h|", "intermediate_activation_{}", "{:,.0f}"),
        ("<audio>: sink rate", "intermediate_sink_rate_{}", "{:.3f}"),
        ("seconds per step", "seconds_per_step_{}", "{:.2f}"),
    )
    for label, key, form in rows:
        values = [summary[key.format(name)] for name in RECIPES]
        table.add_row(label, *("none" if value is None else form.format(value) for value in values))
    table.caption = (
        f"before training: WER {summary['wer_before']:.2f}; "
        f"lambda {summary['lambda']:g}, margin {summary['margin']:g}; "
        f"{summary['utterances']} utterances per set; {summary['seconds']:.0f} s, {summary['peak_memory_mb']:.0f} MB"
    )
    return table


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def make_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table; the nameless column is of labels, the others of numbers."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def command(
    program: str, description: str, folder: str, run: Callable[[Path, list[str]], Any], table: Callable[[Any], Table]
) -> Path:
    """Reads the command line, runs a demo, prints its table and returns its folder."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all trainings")
    parser.add_argument("--folder", default=folder)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with guarded(), claim(Path(arguments.folder)):
        try:
            summary = run(Path(arguments.folder), arguments.overrides)
        except (KeyboardInterrupt, SystemExit):  # the commands that it runs promise that they go on
            say("stopped: the same command goes on where the demo is")
            raise
    Console().print(table(summary))
    return Path(arguments.folder)


def main() -> None:
    folder = command("avsr.tools.demo", "Trains off and on, and writes one report.", FOLDER, run_demo, _table)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
