"""Tables and pictures of the README: prints Markdown, writes to ``bench/results``.

``python -m bench.pictures demo`` reads ``runs/demo`` (``make demo``), ``av`` reads ``runs/demo_av`` (``make demo-av``),
``mouths`` draws ``mouths.png`` (speakers by visemes, and the frames of one spoken sentence under its words) and
``mouth.mp4``, the clip of that sentence with sound. ``mouths`` needs the extra ``demo``; its files are reproducible.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avsr.tools.analysis.figures import lines_by_layer
from avsr.tools.analysis.plots import lines_over
from bench import svg
from bench.runner.ledger import RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from avsr.tools.corpora.synth.espeak import Speech

ROWS = (
    ("WER, unseen sentences", "wer_{}", "{:.3f}"),
    ("WER, unseen voices", "wer_{}_unseen_voices", "{:.3f}"),
    ("mean squared cosine to BOS", "cos2_{}", "{:.3f}"),
    ("`<audio>`: largest activation", "intermediate_activation_{}", "{:,.0f}"),
    ("`<audio>`: sink rate", "intermediate_sink_rate_{}", "{:.3f}"),
    ("seconds a step", "seconds_per_step_{}", "{:.2f}"),
)
LEVELS = ("clean", "10 dB", "5 dB", "0 dB", "-5 dB")
SPEAKERS = ("us_f2", "gb_m7", "sc_m4", "us_annie", "us_m2", "gb_quincy")
SHOWN = {
    "rest": "silence", "PBM": "p b m", "FV": "f v", "TH": "th", "TDN": "t d n", "SZ": "s z", "SH": "sh ch",
    "L": "l", "R": "r", "AA": "father", "AE": "cat", "IY": "see", "AO": "law", "OH": "go", "UW": "you",
}  # fmt: skip
EVERY = 3  # frames between those in the strip
SENTENCE, VOICE = "place blue by f two now", "us_f2"


def demo(folder: Path = Path("runs/demo"), results: Path = RESULTS) -> None:
    """Both runs of the demo: table of the summary, largest activation by layer."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    analyses = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    runs = [(f"decorrelation {name}", analyses[name]) for name in ("off", "on")]
    groups = ["BOS", "<audio>", "</audio>", "speech", "text"]
    svg.write(results / "demo.svg", lines_by_layer(runs, "max_abs", groups, "largest activation", log=True))
    print("| | off | on |\n|---|---:|---:|")
    for label, key, form in ROWS:
        values = [summary[key.format(name)] for name in ("off", "on")]
        print(f"| {label} | " + " | ".join("none" if value is None else form.format(value) for value in values) + " |")
    print(f"\n{json.dumps(summary)}")


def av(folder: Path = Path("runs/demo_av"), results: Path = RESULTS) -> None:
    """WER of every task by noise level."""
    wer = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["wer"]
    print(f"| WER | {' | '.join(LEVELS)} | unseen voices |\n|---|{'---:|' * (len(LEVELS) + 1)}")
    curves = []
    for task, scores in wer.items():
        values = [scores.get("sentences" if level == "clean" else f"sentences {level}") for level in LEVELS]
        values = [values[0] if value is None else value for value in values]  # noise does not affect the mouth
        curves.append((task, values))
        print(f"| {task} | {' | '.join(f'{v:.3f}' for v in values)} | {scores['unseen_voices']:.3f} |")
    svg.write(results / "demo_av.svg", lines_over(LEVELS, curves, "babble", "word error rate"))


def mouths(results: Path = RESULTS) -> None:
    """Drawn mouths, still and speaking."""
    from PIL import Image

    from avsr.data.video_writer import write_video
    from avsr.tools.corpora.synth.espeak import Espeak
    from avsr.tools.corpora.synth.mouth import draw_mouth
    from avsr.tools.corpora.synth.sentences import GRID_SAID_AS
    from avsr.tools.corpora.synth.shards import normalise
    from avsr.tools.corpora.synth.visemes import frames_of, viseme_track
    from avsr.tools.corpora.synth.voices import VOICES

    voice = next(voice for voice in VOICES if voice.name == VOICE)
    speech = Espeak(voice.voice, voice.rate, voice.pitch, seed=0).speak(SENTENCE, GRID_SAID_AS)
    track = viseme_track(speech.phonemes, frames_of(len(speech.waveform)))
    frames = draw_mouth(track, VOICE, "sample")
    picture = results / "mouths.png"
    sheet(frames, speech).savefig(picture, dpi=95, metadata={"Software": None})
    with Image.open(picture) as image:  # 40 greys are enough and take a third of the space
        levels = image.convert("L").point(lambda grey: round(round(grey * 39 / 255) * 255 / 39))
    levels.quantize(40).save(picture, optimize=True)
    write_video(results / "mouth.mp4", frames, sound=normalise(speech.waveform))


def sheet(frames: np.ndarray, speech: Speech) -> Figure:
    """Speakers (down) by visemes (across); below, every third frame of the sentence."""
    import matplotlib.pyplot as plt

    from avsr.data.video_writer import FRAMES_PER_SECOND
    from avsr.tools.corpora.synth.mouth import draw_mouth
    from avsr.tools.corpora.synth.visemes import TARGETS, VISEMES

    targets = TARGETS[[VISEMES.index(name) for name in SHOWN]]
    stills = [np.concatenate(list(draw_mouth(targets, name, "still")), axis=1) for name in SPEAKERS]
    figure = plt.figure(figsize=(15.2, 8.0), facecolor="white")
    table = figure.add_axes((0.06, 0.24, 0.935, 0.72))
    table.imshow(np.concatenate(stills), cmap="gray", vmin=0, vmax=255, aspect="equal")
    size = frames.shape[1]
    table.set_xticks(np.arange(len(SHOWN)) * size + size / 2, list(SHOWN.values()))
    table.set_yticks(np.arange(len(SPEAKERS)) * size + size / 2, SPEAKERS)
    strip = figure.add_axes((0.06, 0.03, 0.935, 0.16))
    strip.imshow(np.concatenate(list(frames[::EVERY]), axis=1), cmap="gray", vmin=0, vmax=255, aspect="equal")
    place = [FRAMES_PER_SECOND * (word.start + word.end) / 2 / EVERY * size for word in speech.words]
    strip.set_xticks(place, [word.text for word in speech.words])
    strip.set_yticks([size / 2], ["a clip"])
    for axes in (table, strip):
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=11)
        axes.set_frame_on(False)
    return figure


def main() -> int:
    made = {"demo": demo, "av": av, "mouths": mouths}.get(" ".join(sys.argv[1:]))
    if made is None:
        print(__doc__, file=sys.stderr)
        return 2
    made()
    return 0


if __name__ == "__main__":
    sys.exit(main())
