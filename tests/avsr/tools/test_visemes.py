"""From phoneme times to mouth shapes: classes, co-articulation and timing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avsr.runtime.pool import run_jobs
from avsr.tools.corpora.synth import visemes
from avsr.tools.corpora.synth.espeak import Span
from avsr.tools.corpora.synth.visemes import (
    LEAD,
    PARAMETERS,
    TARGETS,
    VISEMES,
    frames_of,
    loosened,
    viseme_labels,
    viseme_track,
    visemes_of,
)
from avsr.tools.corpora.synth.voices import VOICES

pytestmark = pytest.mark.integration

needs_espeak = pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="needs the extra demo")

HELPER = """
from avsr.runtime.pool import run_jobs
from avsr.tools.corpora.synth.espeak import Espeak
from avsr.tools.corpora.synth.sentences import open_sentences

def heard(voices):
    sentences = open_sentences(40, 3)
    found = {}
    for voice in voices:
        espeak = Espeak(voice, 165, 50, 1)
        for sentence in sentences:
            for phoneme in espeak.speak(sentence).phonemes:
                found.setdefault(phoneme.text, sentence)
    return found
"""


def said(*phonemes: tuple[str, float]) -> list[Span]:
    """Phonemes after each other, with their durations in ms."""
    spans, time = [], 0.0
    for text, ms in phonemes:
        spans.append(Span(text, time, time + ms / 1000))
        time += ms / 1000
    return spans


def column(track: np.ndarray, name: str) -> np.ndarray:
    values: np.ndarray = track[:, PARAMETERS.index(name)]
    return values


def word(*phonemes: str, ms: float = 90.0) -> np.ndarray:
    spans = said(("_", 100), *((phoneme, ms) for phoneme in phonemes), ("_:", 120))
    return viseme_track(spans, frames_of(round(16_000 * spans[-1].end)))


@needs_espeak
@pytest.mark.timeout(120)
def test_every_phoneme_of_every_accent_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "viseme_test_helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import viseme_test_helper  # type: ignore[import-not-found]

    bases = sorted({voice.voice.split("+")[0] for voice in VOICES})
    [(_, found)] = run_jobs(viseme_test_helper.heard, [bases], 1, fresh=True)
    assert len(found) > 60
    bare = {re.sub("^[',%=]+", "", text): sentence for text, sentence in found.items()}
    unknown = {text: sentence for text, sentence in bare.items() if text not in visemes._PHONEMES}
    assert set(unknown) <= {";"}, unknown


def test_unknown_phonemes_and_marks() -> None:
    assert visemes_of("'eI") == ["EH", "IY"]
    assert visemes_of(",aI@") == ["AA", "IY", "AX"]
    assert visemes_of(";") == visemes_of("'") == visemes_of("") == []
    assert visemes_of("p_new") == ["PBM"]  # the longest known beginning
    assert visemes_of("tSx") == ["SH"]
    assert visemes_of("*") == [] and visemes_of("Y") == ["KGH"]
    assert all(name in VISEMES for names in visemes._PHONEMES.values() for name in names)


@pytest.mark.parametrize(
    "group",
    ["p b m", "f v", "T D", "t d n", "s z", "S Z tS dZ", "k g N h"],
)
def test_homophenes_look_the_same(group: str) -> None:
    """pat, bat and mat are one word to the eye when their phonemes take the same time."""
    tracks = [word(first, "a", "t") for first in group.split()]
    labels = [viseme_labels(said((first, 90), ("a", 90), ("t", 90)), 7).tolist() for first in group.split()]
    assert all(np.array_equal(track, tracks[0]) for track in tracks)
    assert all(label == labels[0] for label in labels)


def test_different_visemes_move_differently() -> None:
    """Two consonants in one place, and two vowels, differ somewhere by more than a tenth of a range."""
    consonants = {c: word("a", c, "a") for c in ("p", "f", "T", "t", "s", "S", "l", "r", "w", "k")}
    vowels = {v: word("t", v, "t") for v in ("A:", "a", "V", "E", "i:", "@", "3:", "O:", "U", "u:", "eI", "aI")}
    for tracks in (consonants, vowels):
        names = sorted(tracks)
        for i, one in enumerate(names):
            for other in names[:i]:
                assert np.abs(tracks[one] - tracks[other]).max() > 0.1, (one, other)


def test_what_each_viseme_does() -> None:
    assert column(word("A:", "p", "A:"), "opening")[3:7].min() <= 0.0  # closed in between
    assert column(word("A:", "k", "A:"), "opening")[3:7].min() > 0.6  # hidden
    assert column(word("A:", ms=150), "opening").max() > 0.9
    assert column(word("i:", ms=150), "width").max() > 0.7 > 0 > column(word("u:", ms=150), "width").min() + 0.7
    assert column(word("u:", ms=150), "rounding").max() > 0.9
    assert column(word("E", "f", "E"), "tuck").max() > 0.7
    assert column(word("E", "v", "E"), "teeth").max() > 0.7
    assert column(word("E", "T", "E"), "tip").max() > 0.7
    assert column(word("E", "l", "E"), "tongue").max() > 0.7
    for name in PARAMETERS:
        assert abs(column(viseme_track(said(("_", 800)), 20), name)).max() < 0.05


def test_a_short_closure_between_wide_vowels_is_still_a_closure() -> None:
    for offset in range(0, 40, 5):  # wherever it falls between the frames
        spans = said(("_", 100 + offset), ("A:", 150), ("b", 45), ("A:", 150), ("_", 100))
        track = viseme_track(spans, 14)
        labels = viseme_labels(spans, 14)
        assert column(track, "opening")[4:10].min() < 0.2
        assert VISEMES.index("PBM") in labels


def test_neighbours_shape_a_consonant() -> None:
    """An s is rounder before "oo" than before "ee", and a p does not undo a rounding."""
    rounded, spread = word("_", "s", "u:"), word("_", "s", "i:")
    assert column(rounded, "rounding")[5] > column(spread, "rounding")[5] + 0.15
    assert column(rounded, "width")[5] < column(spread, "width")[5] - 0.2
    assert column(word("u:", "p", "u:"), "rounding")[3:8].min() > 0.6


def test_the_mouth_leads_by_at_most_one_frame() -> None:
    """The lips open half-way between one frame before the sound starts and its start."""
    for start in (0.2, 0.213, 0.231):
        spans = [Span("_", 0.0, start), Span("A:", start, 0.8)]
        opening = column(viseme_track(spans, 20), "opening")
        times = (np.arange(20) + 0.5) / 25
        half = np.interp(0.5, opening[:15], times[:15])
        assert start - 0.045 <= half <= start + 0.005


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(visemes._PHONEMES)), st.integers(5, 300)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_a_later_start_in_whole_frames_only_shifts_the_track(phonemes: list[tuple[str, int]], shift: int) -> None:
    spans = said(("_", 400), *phonemes)
    later = [Span(span.text, span.start + shift / 25, span.end + shift / 25) for span in spans]
    count = frames_of(round(spans[-1].end * 16_000))
    early, late = viseme_track(spans, count), viseme_track(later, count + shift)
    assert np.abs(early - late[shift:]).max() < 1e-9
    assert np.isfinite(early).all() and early.shape == (count, len(PARAMETERS))
    low, high = TARGETS.min(axis=0), TARGETS.max(axis=0)
    assert (early >= low - 1e-9).all() and (early <= high + 1e-9).all()  # a mean stays among its parts


def test_the_track_is_the_weighted_mean_of_its_definition() -> None:
    """Against sums over a grid of 0.1 ms, with the table's dominance and a Gaussian of 25 ms."""
    spans = said(("_", 100), ("b", 60), ("A:", 130), ("s", 90), ("l", 50), ("u:", 140), ("m", 75))
    frames = frames_of(round(spans[-1].end * 16_000)) + 2  # two at rest after the last phoneme
    grid = np.arange(-0.3, frames / 25 + 0.3, 1e-4)
    names = np.full(len(grid), "rest", dtype=object)
    for span in spans:
        names[(grid >= span.start) & (grid < span.end)] = visemes_of(span.text)[0]
    track = viseme_track(spans, frames)
    for frame in range(frames):
        near = np.exp(-0.5 * ((grid - (frame + 0.5) / 25 - LEAD) / 0.025) ** 2)
        for index, kind in enumerate(["jaw"] + ["lips"] * 2 + ["inner"] * 4):
            held = np.array([getattr(visemes._TABLE[name], kind) for name in names])
            target = np.array([visemes._TABLE[name].targets[index] for name in names])
            expected = (near * held * target).sum() / (near * held).sum()
            assert abs(track[frame, index] - expected) < 0.003


def test_lips_keep_time_only_roughly() -> None:
    spans = said(*[(name, 80) for name in ("_", "p", "A:", "b", "i:", "m", "s", "u:")] * 4)
    shown = [loosened(spans, f"clip{i}") for i in range(200)]
    assert shown[0] == loosened(spans, "clip0") != shown[1]
    for clip in shown:
        assert [span.text for span in clip] == [span.text for span in spans]
        assert clip[0].start == spans[0].start and clip[-1].end == spans[-1].end
        assert all(a.end == b.start and a.start <= a.end for a, b in zip(clip, clip[1:], strict=False))
    moves = np.array([[shown.start - span.start for shown, span in zip(c, spans, strict=True)][1:] for c in shown])
    assert abs(moves).max() <= 0.04 + 1e-9  # in step to one frame
    assert abs(moves.mean()) < 0.002 and 0.015 < moves.std() < 0.022


def test_labels_name_what_the_middle_of_a_long_phoneme_shows() -> None:
    spans = said(("_", 120), ("A:", 200), ("s", 160), ("u:", 200), ("p", 120), ("_:", 200))
    labels = [VISEMES[label] for label in viseme_labels(spans, 25)]
    for span, name in zip(spans, ("rest", "AA", "SZ", "UW", "PBM", "rest"), strict=True):
        assert labels[int(25 * ((span.start + span.end) / 2 - LEAD))] == name
    assert labels[-1] == "rest" and viseme_labels(spans, 25).dtype == np.int64
    assert viseme_labels([], 3).tolist() == [VISEMES.index("rest")] * 3
    halves = [VISEMES[label] for label in viseme_labels(said(("aI", 400)), 10)]
    assert halves[:4] == ["AA"] * 4 and halves[5:9] == ["IY"] * 4


def test_labels_follow_the_mouth_and_keep_a_short_closure() -> None:
    """The mouth is 20 ms ahead, so frame k shows k/25 + 0.02 to k/25 + 0.06 s."""
    for start in (0.495, 0.505, 0.515):  # most of frame 12, which shows 0.50 to 0.54 s, is open
        labels = viseme_labels([Span("_", 0.0, start), Span("A:", start, 1.0)], 25)
        assert np.flatnonzero(labels == VISEMES.index("AA"))[0] == 12
    spans = [Span("A:", 0.0, 0.112), Span("b", 0.112, 0.13), Span("A:", 0.13, 0.4)]
    assert [VISEMES[label] for label in viseme_labels(spans, 5)] == ["AA", "AA", "PBM", "AA", "AA"]


def test_frames_cover_the_wave_to_the_nearest() -> None:
    assert [frames_of(n) for n in (0, 1, 319, 640, 900, 1000, 16_000)] == [1, 1, 1, 1, 1, 2, 25]
