"""From the times of phonemes to the shape of the mouth, frame by frame.

A viseme is a class of phonemes that look alike: p, b and m close the lips, k and g hide behind them. The shape is
the mean of the visemes' targets around a moment, weighted by nearness and by how firmly each viseme holds that part
of the mouth (dominance, after Cohen and Massaro 1993): a p closes the lips whatever is next to it, and takes their
width from its neighbors. The numbers were set by hand, after the usual descriptions of English visemes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avsr.data.rates import FRAMES_PER_SECOND, SAMPLES_PER_FRAME
from avsr.tools.corpora.synth.espeak import Span

# The columns of a track. "opening" is the gap between the lips (1 is a wide "ah", below 0 they press), "width" goes
# from -1 (narrow) to 1 (spread), the others from 0 to 1: "rounding" pushes the lips forward, "teeth" and "tongue"
# show them, "tip" puts the tongue between the teeth, "tuck" the lower lip under the upper teeth.
PARAMETERS = ("opening", "width", "rounding", "teeth", "tongue", "tip", "tuck")
_JAW, _LIPS, _INNER = slice(0, 1), slice(1, 3), slice(3, 7)


class _Viseme(NamedTuple):
    """Targets in the order of ``PARAMETERS``, and the dominance over opening, lips and the inside of the mouth."""

    targets: tuple[float, float, float, float, float, float, float]
    jaw: float = 1.0
    lips: float = 1.0
    inner: float = 1.0


_TABLE: dict[str, _Viseme] = {
    "rest": _Viseme((0.02, 0.00, 0.00, 0.00, 0.00, 0.0, 0.0), 0.8, 0.5, 1.0),
    "PBM": _Viseme((-0.25, 0.00, 0.00, 0.00, 0.00, 0.0, 0.0), 4.0, 0.05, 1.0),
    "FV": _Viseme((0.14, 0.10, 0.00, 0.90, 0.00, 0.0, 1.0), 4.0, 0.6, 5.0),
    "TH": _Viseme((0.30, 0.10, 0.00, 0.50, 0.60, 1.0, 0.0), 2.0, 0.5, 5.0),
    "TDN": _Viseme((0.24, 0.15, 0.00, 0.70, 0.75, 0.0, 0.0), 1.5, 0.15, 2.0),
    "SZ": _Viseme((0.16, 0.45, 0.00, 1.00, 0.10, 0.0, 0.0), 2.5, 0.4, 3.0),
    "SH": _Viseme((0.26, -0.40, 0.75, 1.00, 0.10, 0.0, 0.0), 2.0, 3.0, 3.0),
    "L": _Viseme((0.44, 0.10, 0.00, 0.25, 1.00, 0.0, 0.0), 1.5, 0.15, 4.0),
    "R": _Viseme((0.24, -0.35, 0.50, 0.30, 0.30, 0.0, 0.0), 1.2, 1.2, 1.5),
    "W": _Viseme((0.06, -0.90, 1.00, 0.00, 0.00, 0.0, 0.0), 3.0, 4.0, 2.0),
    "KGH": _Viseme((0.30, 0.00, 0.00, 0.30, 0.30, 0.0, 0.0), 0.1, 0.05, 0.1),
    "AA": _Viseme((1.00, 0.00, 0.00, 0.20, 0.15, 0.0, 0.0)),
    "AE": _Viseme((0.80, 0.45, 0.00, 0.60, 0.30, 0.0, 0.0)),
    "AH": _Viseme((0.62, 0.05, 0.00, 0.30, 0.25, 0.0, 0.0)),
    "EH": _Viseme((0.50, 0.35, 0.00, 0.60, 0.35, 0.0, 0.0)),
    "IH": _Viseme((0.34, 0.35, 0.00, 0.65, 0.40, 0.0, 0.0)),
    "IY": _Viseme((0.22, 0.85, 0.00, 0.80, 0.40, 0.0, 0.0)),
    "ER": _Viseme((0.34, -0.30, 0.40, 0.40, 0.40, 0.0, 0.0)),
    "AX": _Viseme((0.34, 0.00, 0.00, 0.35, 0.30, 0.0, 0.0), 0.6, 0.5, 0.6),
    "AO": _Viseme((0.75, -0.50, 0.65, 0.05, 0.10, 0.0, 0.0)),
    "OH": _Viseme((0.50, -0.65, 0.85, 0.00, 0.10, 0.0, 0.0)),
    "UH": _Viseme((0.32, -0.50, 0.65, 0.10, 0.15, 0.0, 0.0)),
    "UW": _Viseme((0.16, -0.85, 1.00, 0.00, 0.00, 0.0, 0.0), 1.3, 1.5, 1.0),
}
VISEMES: tuple[str, ...] = tuple(_TABLE)
TARGETS = np.array([viseme.targets for viseme in _TABLE.values()])  # (visemes, parameters)
REST = VISEMES.index("rest")

# eSpeak NG's mnemonics without stress marks, by viseme; two or three visemes follow each other in a diphthong.
_SOUNDS: dict[str, str] = {
    "rest": "_ _: _| _! _^_",
    "PBM": "p b m m-",
    "FV": "f v",
    "TH": "T D",
    "TDN": "t d n n- t# t2 t[ d# d[",
    "SZ": "s z",
    "SH": "S Z tS dZ",
    "L": "l l# l-",
    "R": "r r- R",
    "W": "w w# W",
    "KGH": "k g N h x ?",
    "AA": "A: A@ aa A",
    "AE": "a",
    "AH": "V",
    "EH": "E",
    "IH": "I I2 I#",
    "IY": "i i: j",
    "ER": "3 3: IR VR",
    "AX": "@ @2 @5 @- a#",
    "AO": "O: O2 0 O@ o@ O",
    "UH": "U",
    "UW": "u u:",
    "EH IY": "eI",
    "AA IY": "aI aI2",
    "AA UW": "aU",
    "AO IY": "OI",
    "OH UW": "oU",
    "IY AX": "i@",
    "IY ER": "i@3",
    "EH AX": "e@",
    "UH AX": "U@",
    "AX L": "@L",
    "AA IY AX": "aI@",
    "AA IY ER": "aI3",
    "AA UW AX": "aU@",
}
_PHONEMES = {mnemonic: names.split() for names, mnemonics in _SOUNDS.items() for mnemonic in mnemonics.split()}

LOOSE = 0.02  # seconds, of the deviation of a boundary that the lips pass; at most twice that
LEAD = 0.02  # seconds by which the mouth is ahead of the sound
_SIGMA = 0.025  # seconds, of the Gaussian in time


def frames_of(samples: int) -> int:
    """The number of 40 ms frames that cover so many samples at 16 kHz, to the nearest one; at least 1."""
    return max(1, round(samples / SAMPLES_PER_FRAME))


def visemes_of(mnemonic: str) -> list[str]:
    """The visemes of a phoneme in order; none for a sign without a sound (";", palatal).

    An unknown phoneme is read as the longest known one that it starts with, else as one that is not seen.
    """
    bare = mnemonic.lstrip("',%=|")
    if not bare.strip(';:~`^*"-'):
        return []
    for end in range(len(bare), 0, -1):
        if bare[:end] in _PHONEMES:
            return _PHONEMES[bare[:end]]
    return ["KGH"]


def viseme_track(phonemes: Sequence[Span], frames: int) -> np.ndarray:
    """(frames, len(PARAMETERS)) float64: the mouth in the middle of each frame of 40 ms."""
    dominance = np.empty_like(TARGETS)
    for row, held in zip(dominance, _TABLE.values(), strict=True):
        row[_JAW], row[_LIPS], row[_INNER] = held.jaw, held.lips, held.inner
    which, starts, ends = (np.array(part) for part in zip(*_covered(_segments(phonemes)), strict=True))
    middles = (np.arange(frames) + 0.5) / FRAMES_PER_SECOND + LEAD
    # (frames, segments): the share of a Gaussian around the frame's middle that falls into each segment
    near = _normal_below(ends[None] - middles[:, None]) - _normal_below(starts[None] - middles[:, None])
    weights = dominance[which]
    return np.asarray((near @ (weights * TARGETS[which])) / (near @ weights))


def loosened(phonemes: Sequence[Span], clip: str) -> list[Span]:
    """The phonemes with every boundary moved a little, the same for the same ``clip``.

    eSpeak NG gives each phoneme a fixed duration, and a person's lips keep time less exactly: without this, the length
    of a closure would tell p from b and m, which look alike.
    """
    draw = np.random.default_rng(list(hashlib.sha256(clip.encode()).digest()))
    edges = np.array([*(phoneme.start for phoneme in phonemes), phonemes[-1].end])
    moved = edges + np.clip(draw.normal(0.0, LOOSE, len(edges)), -2 * LOOSE, 2 * LOOSE)
    moved[0], moved[-1] = edges[0], edges[-1]
    moved = np.maximum.accumulate(np.clip(moved, edges[0], edges[-1])).tolist()
    return [Span(p.text, start, end) for p, start, end in zip(phonemes, moved, moved[1:], strict=False)]


def viseme_labels(phonemes: Sequence[Span], frames: int) -> np.ndarray:
    """(frames,) int64: the index in ``VISEMES`` of what each frame shows most.

    That is its share of the frame times its dominance over the opening, which keeps a short "b" between two vowels.
    """
    shown = np.zeros((frames, len(VISEMES)))
    shown[:, REST] = 1e-9
    edges = np.arange(frames + 1) / FRAMES_PER_SECOND + LEAD
    for index, start, end in _segments(phonemes):
        overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
        shown[:, index] += np.maximum(overlap, 0.0) * max(1.0, _TABLE[VISEMES[index]].jaw)
    return shown.argmax(axis=1).astype(np.int64)


def _segments(phonemes: Sequence[Span]) -> list[tuple[int, float, float]]:
    """(viseme, start, end) of every target; those of a diphthong share its time evenly."""
    segments = []
    for phoneme in phonemes:
        names = visemes_of(phoneme.text)
        edges = np.linspace(phoneme.start, phoneme.end, len(names) + 1).tolist()
        segments += [
            (VISEMES.index(name), start, end) for name, start, end in zip(names, edges, edges[1:], strict=False)
        ]
    return segments


def _covered(segments: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """The segments with rest before, between and after them."""
    covered, time = [], -math.inf
    for viseme, start, end in [*segments, (REST, math.inf, math.inf)]:
        if start > time:
            covered.append((REST, time, start))
        covered.append((viseme, start, end))
        time = max(time, end)
    return covered


def _normal_below(seconds: np.ndarray) -> np.ndarray:
    """The share of a Gaussian of ``_SIGMA`` around zero below each of these times."""
    return np.asarray(0.5 + 0.5 * np.vectorize(math.erf, otypes=[float])(seconds / (_SIGMA * math.sqrt(2))))
