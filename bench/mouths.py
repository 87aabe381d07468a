"""The picture of drawn mouths and the sample clip in the README: ``python -m bench.mouths bench/mouths.png``.

Writes the picture (speakers by visemes, and the frames of one spoken sentence under its words) and, beside it, the
clip of the sentence with its sound, ``mouth.mp4``. Needs the extra ``demo``; the same code gives the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from avsr.data.rates import FRAMES_PER_SECOND
from avsr.data.video_writer import write_video
from avsr.tools.corpora.synth.espeak import Espeak, Speech
from avsr.tools.corpora.synth.mouth import draw_mouth
from avsr.tools.corpora.synth.sentences import GRID_SAID_AS
from avsr.tools.corpora.synth.shards import normalise
from avsr.tools.corpora.synth.visemes import TARGETS, VISEMES, frames_of, viseme_track
from avsr.tools.corpora.synth.voices import VOICES

SPEAKERS = ("us_f2", "gb_m7", "sc_m4", "us_annie", "us_m2", "gb_quincy")
SHOWN = {
    "rest": "silence", "PBM": "p b m", "FV": "f v", "TH": "th", "TDN": "t d n", "SZ": "s z", "SH": "sh ch",
    "L": "l", "R": "r", "AA": "father", "AE": "cat", "IY": "see", "AO": "law", "OH": "go", "UW": "you",
}  # fmt: skip
EVERY = 3  # frames between those in the strip
SENTENCE, VOICE = "place blue by f two now", "us_f2"


def main() -> None:
    picture = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/mouths.png")
    voice = next(voice for voice in VOICES if voice.name == VOICE)
    speech = Espeak(voice.voice, voice.rate, voice.pitch, seed=0).speak(SENTENCE, GRID_SAID_AS)
    track = viseme_track(speech.phonemes, frames_of(len(speech.waveform)))
    frames = draw_mouth(track, VOICE, "sample")
    figure = draw(frames, speech)
    figure.savefig(picture, dpi=95, metadata={"Software": None})
    with Image.open(picture) as image:  # 40 greys are enough and take a third of the space
        levels = image.convert("L").point(lambda grey: round(round(grey * 39 / 255) * 255 / 39))
    levels.quantize(40).save(picture, optimize=True)
    write_video(picture.with_name("mouth.mp4"), frames, sound=normalise(speech.waveform))


def draw(frames: np.ndarray, speech: Speech) -> Figure:
    """Speakers (down) by visemes (across); below, every third frame of the sentence."""
    figure = plt.figure(figsize=(15.2, 8.0), facecolor="white")
    sheet = figure.add_axes((0.06, 0.24, 0.935, 0.72))
    sheet.imshow(contact_sheet(), cmap="gray", vmin=0, vmax=255, aspect="equal")
    size = frames.shape[1]
    sheet.set_xticks(np.arange(len(SHOWN)) * size + size / 2, list(SHOWN.values()))
    sheet.xaxis.tick_top()
    sheet.set_yticks(np.arange(len(SPEAKERS)) * size + size / 2, SPEAKERS)
    strip = figure.add_axes((0.06, 0.03, 0.935, 0.16))
    row = np.concatenate(list(frames[::EVERY]), axis=1)
    strip.imshow(row, cmap="gray", vmin=0, vmax=255, aspect="equal")
    place = [FRAMES_PER_SECOND * (word.start + word.end) / 2 / EVERY * size for word in speech.words]
    strip.set_xticks(place, [word.text for word in speech.words])
    strip.xaxis.tick_top()
    strip.set_yticks([size / 2], ["a clip"])
    for axes in (sheet, strip):
        axes.tick_params(length=0, labelsize=11)
        axes.set_frame_on(False)
    return figure


def contact_sheet() -> np.ndarray:
    """(speakers * 96, visemes * 96) uint8: each viseme held still."""
    targets = TARGETS[[VISEMES.index(name) for name in SHOWN]]
    return np.concatenate([np.concatenate(list(draw_mouth(targets, name, "still")), axis=1) for name in SPEAKERS])


if __name__ == "__main__":
    main()
