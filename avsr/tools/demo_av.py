"""``make demo-av``: sound, mouth and both on a synthetic corpus, from clean to babble at -5 dB.

Draws a corpus, teaches the small visual encoder to read its mouths, trains one model per task and scores all of them.
The mouths are drawn from the phonemes that the recognizer has to find: the video helps by construction.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from avsr.data.noise import CLEAN
from avsr.evaluation.run import evaluate_model, test_sets
from avsr.models.build import load_run, pick_device
from avsr.tools.demo import Stages, command, fresh, make_table, run_command, say

CORPUS = "data/demo_av"
FOLDER = "runs/demo_av"
SYNTH_OPTIONS = ["grid=2000", "open=0", "voices=8"]
TASKS = ("audio", "video", "audiovisual")
SNR = (CLEAN, 10.0, 5.0, 0.0, -5.0)


def run_demo(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs everything; returns (and writes) the summary."""
    stages = Stages(folder, overrides, {"visual": "pretrain.yaml", **dict.fromkeys(TASKS, "config.yaml")})
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], None]) -> None:
        def measure() -> float:
            before = time.monotonic()
            run()
            return round(time.monotonic() - before, 1)

        seconds[name] = stages.result(f"seconds of {name}", measure)

    say("1/5  a corpus of synthetic speech with drawn mouths")
    timed("corpus", lambda: run_command("synth", CORPUS, *SYNTH_OPTIONS))
    say("2/5  the visual encoder learns the visemes and words of the corpus")
    timed("visual", functools.partial(_pretrain, folder / "visual"))
    wer: dict[str, dict[str, float]] = {}
    for number, task in enumerate(TASKS, 3):
        say(f"{number}/5  training and scoring: {task}")
        run = folder / task
        timed(task, functools.partial(stages.train, f"demo_{task}", run, [*_encoder(task, folder), *overrides]))
        wer[task] = stages.result(f"scores of {task}", functools.partial(_scores, run, task))
    summary = {"wer": wer, "train_seconds": seconds, "seconds": round(stages.end(), 1)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _pretrain(run: Path) -> None:
    fresh(run, "pretrain.yaml")
    run_command("pretrain", "demo_visual", f"run={run}")


def _encoder(task: str, folder: Path) -> list[str]:
    return [] if task == "audio" else [f"model.video.encoder.name={folder / 'visual'}"]


def _scores(run: Path, task: str) -> dict[str, float]:
    """WER by condition; a task without sound has no noise."""
    levels = SNR if task != "video" else (CLEAN,)
    listed = ",".join(".inf" if level == CLEAN else f"{level:g}" for level in levels)
    config, model, store = load_run(run, [f"noise.snr=[{listed}]"], pick_device())
    scores = evaluate_model(config, model, test_sets(config, model, store), run)
    return {name: score.wer for name, score in scores.items()}


def _table(summary: dict[str, Any]) -> Table:
    levels = [f"{level:g} dB" if level != CLEAN else "clean" for level in SNR]
    title = "WER by task and babble, synthetic GRID speech with drawn mouths"
    table = make_table(title, ("", *levels, "unseen voices, clean"))
    for task, scores in summary["wer"].items():
        cells = []
        for level in SNR:
            name = "sentences" if level == CLEAN or task == "video" else f"sentences {level:g} dB"
            cells.append(f"{scores[name]:.3f}")
        table.add_row(task, *cells, f"{scores['unseen_voices']:.3f}")
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in summary["train_seconds"].items())
    table.caption = f"{parts}; all {summary['seconds']:.0f} s"
    return table


def main() -> None:
    command("avsr.tools.demo_av", "Audio, video and both, by noise level.", FOLDER, run_demo, _table)


if __name__ == "__main__":
    main()
