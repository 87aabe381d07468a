"""Tests of what ``avsr synth`` says and of its voices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.errors import UserError
from avsr.tools.corpora.synth import sentences, shards, words
from avsr.tools.corpora.synth.corpus import SynthOptions, synthesise
from avsr.tools.corpora.synth.voices import TRAINING_VOICES, UNSEEN_VOICES, VOICES


def test_grid_has_51_words_and_no_w() -> None:
    vocabulary = [word for choice in sentences.GRID_GRAMMAR for word in choice]
    assert len(vocabulary) == len(set(vocabulary)) == 51
    assert "w" not in vocabulary
    assert sentences.GRID_SIZE == 4 * 4 * 4 * 25 * 10 * 4


def test_grid_sentences_follow_the_grammar_and_can_be_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for sentence in sentences.grid_sentences(200, 0):
        parts = sentence.split(" ")
        assert len(parts) == 6
        assert all(word in choice for word, choice in zip(parts, sentences.GRID_GRAMMAR, strict=True))
    with pytest.raises(ValueError, match="64000"):
        sentences.grid_sentences(sentences.GRID_SIZE + 1, 0)
    monkeypatch.setattr(sentences, "GRID_GRAMMAR", (("a", "b", "c"), ("d", "e"), ("f", "g")))
    assert len(set(sentences.grid_sentences(12, 0))) == 12


@pytest.mark.parametrize("draw", [sentences.grid_sentences, sentences.open_sentences])
def test_draws_are_seeded_unique_and_prefixes_of_longer_draws(draw: Any) -> None:
    long = draw(3000, 5)
    assert len(set(long)) == 3000
    assert draw(500, 5) == long[:500]
    assert draw(500, 6) != long[:500]


def test_open_sentences_are_many_short_and_plain() -> None:
    drawn = sentences.open_sentences(20_000, 1)
    assert len(set(drawn)) == 20_000
    lengths = {len(sentence.split(" ")) for sentence in drawn}
    assert lengths == set(range(5, 13))
    assert all(set(sentence) <= set("abcdefghijklmnopqrstuvwxyz ") for sentence in drawn)
    vocabulary = {word for sentence in drawn for word in sentence.split(" ")}
    assert len(vocabulary) > 800
    slots = {token for template in words.TEMPLATES for token in template.split() if token.isupper()}
    assert slots == set(words.SLOTS)  # no slot is misspelt or unused
    assert all(len(set(phrases)) == len(phrases) for phrases in words.SLOTS.values())


def test_open_sentences_have_the_right_article() -> None:
    pairs = [
        (here, following)
        for sentence in sentences.open_sentences(5000, 2)
        for here, following in zip(sentence.split(), sentence.split()[1:], strict=False)
        if here in ("a", "an")
    ]
    assert {"a", "an"} == {here for here, _ in pairs}
    assert all((here == "an") == (following[0] in "aeiou") for here, following in pairs)


def test_voice_table_is_consistent() -> None:
    assert len(VOICES) >= 32
    assert TRAINING_VOICES + UNSEEN_VOICES == VOICES
    assert len(UNSEEN_VOICES) == len(VOICES) // 4
    assert len({voice.name for voice in VOICES}) == len({voice.voice for voice in VOICES}) == len(VOICES)
    variants = [{voice.voice.split("+")[1] for voice in part} for part in (TRAINING_VOICES, UNSEEN_VOICES)]
    assert not variants[0] & variants[1]
    assert all(120 <= voice.rate <= 200 and 0 <= voice.pitch <= 99 for voice in VOICES)


def test_normalise_sets_a_repeatable_peak() -> None:
    waves = [np.sin(np.arange(2000) * step).astype(np.float32) * 0.01 for step in (0.1, 0.2, 0.3)]
    peaks = [float(np.abs(shards.normalise(wave)).max()) for wave in waves]
    assert peaks == [float(np.abs(shards.normalise(wave.copy())).max()) for wave in waves]
    assert all(0.499 < peak < 0.901 for peak in peaks)
    assert len(set(peaks)) == 3
    assert not shards.normalise(np.zeros(10, np.float32)).any()


def test_without_espeak_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"espeakng_loader.*pip install 'flashsink\[demo\]'"):
        synthesise(tmp_path / "out", SynthOptions())
    assert not (tmp_path / "out").exists()
