"""Makes the README's table and picture from a finished ``make demo``: prints Markdown, writes ``bench/demo.svg``."""

from __future__ import annotations

import json
from pathlib import Path

from avsr.analysis.figures import lines_by_layer

ROWS = (
    ("WER, unseen sentences", "wer_{}", "{:.3f}"),
    ("WER, unseen voices", "wer_{}_unseen_voices", "{:.3f}"),
    ("mean squared cosine to BOS", "cos2_{}", "{:.3f}"),
    ("`<audio>`: largest activation", "intermediate_activation_{}", "{:,.0f}"),
    ("`<audio>`: sink rate", "intermediate_sink_rate_{}", "{:.3f}"),
    ("seconds a step", "seconds_per_step_{}", "{:.2f}"),
)


def main() -> None:
    folder = Path("runs/demo")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    analyses = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    runs = [(f"decorrelation {name}", analyses[name]) for name in ("off", "on")]
    picture = lines_by_layer(
        runs, "max_abs", ["BOS", "<audio>", "</audio>", "speech", "text"], "largest activation", log=True
    )
    # outside a page there is no text colour to follow: a grey that reads on white and on black
    Path(__file__).with_name("demo.svg").write_text(picture.replace("currentColor", "#808080"), encoding="utf-8")
    print("| | off | on |\n|---|---:|---:|")
    for label, key, form in ROWS:
        print(f"| {label} | " + " | ".join(form.format(summary[key.format(name)]) for name in ("off", "on")) + " |")
    print(f"\n{json.dumps(summary)}")


if __name__ == "__main__":
    main()
