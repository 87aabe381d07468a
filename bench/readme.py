"""Makes the README's tables and pictures from finished demos: prints Markdown, writes SVG beside this file.

``python -m bench.readme`` reads ``make demo``, ``python -m bench.readme av`` reads ``make demo-av``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from avsr.tools.analysis.figures import lines_by_layer
from avsr.tools.analysis.plots import lines_over

ROWS = (
    ("WER, unseen sentences", "wer_{}", "{:.3f}"),
    ("WER, unseen voices", "wer_{}_unseen_voices", "{:.3f}"),
    ("mean squared cosine to BOS", "cos2_{}", "{:.3f}"),
    ("`<audio>`: largest activation", "intermediate_activation_{}", "{:,.0f}"),
    ("`<audio>`: sink rate", "intermediate_sink_rate_{}", "{:.3f}"),
    ("seconds a step", "seconds_per_step_{}", "{:.2f}"),
)


GREY = "#808080"  # outside a page there is no text colour to follow: a grey that reads on white and on black
LEVELS = ("clean", "10 dB", "5 dB", "0 dB", "-5 dB")


def by_noise(folder: Path) -> None:
    """WER of every task by noise level."""
    wer = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["wer"]
    print(f"| WER | {' | '.join(LEVELS)} | unseen voices |\n|---|{'---:|' * (len(LEVELS) + 1)}")
    curves = []
    for task, scores in wer.items():
        values = [scores.get("sentences" if level == "clean" else f"sentences {level}") for level in LEVELS]
        values = [values[0] if value is None else value for value in values]  # noise does not reach the mouth
        curves.append((task, values))
        print(f"| {task} | {' | '.join(f'{v:.3f}' for v in values)} | {scores['unseen_voices']:.3f} |")
    picture = lines_over(LEVELS, curves, "babble", "word error rate").replace("currentColor", GREY)
    Path(__file__).with_name("demo_av.svg").write_text(picture, encoding="utf-8")


def main() -> None:
    if sys.argv[1:] == ["av"]:
        by_noise(Path("runs/demo_av"))
        return
    folder = Path("runs/demo")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    analyses = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    runs = [(f"decorrelation {name}", analyses[name]) for name in ("off", "on")]
    picture = lines_by_layer(
        runs, "max_abs", ["BOS", "<audio>", "</audio>", "speech", "text"], "largest activation", log=True
    )
    Path(__file__).with_name("demo.svg").write_text(picture.replace("currentColor", GREY), encoding="utf-8")
    print("| | off | on |\n|---|---:|---:|")
    for label, key, form in ROWS:
        values = [summary[key.format(name)] for name in ("off", "on")]
        print(f"| {label} | " + " | ".join("none" if value is None else form.format(value) for value in values) + " |")
    print(f"\n{json.dumps(summary)}")


if __name__ == "__main__":
    main()
