"""Error rates by speaker, length and normaliser: parts add up to the whole, whatever the rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avsr.evaluation.breakdown import by_length, by_normaliser, by_speaker
from avsr.evaluation.wer import normaliser, score


def row(reference: str, hypothesis: str, speaker: str | None = "a", seconds: float = 1.0) -> dict[str, object]:
    return {"reference": reference, "hypothesis": hypothesis, "speaker": speaker, "seconds": seconds}


def test_speakers() -> None:
    rows = [
        row("one two", "one two", "b"),
        row("one two three", "one", "a"),
        row("four", "four five", "b"),
        row("six", "seven", None),
        row("six", "six", ""),
    ]
    assert by_speaker(rows) == {
        "a": {"wer": pytest.approx(2 / 3), "words": 3, "utterances": 1},
        "b": {"wer": pytest.approx(1 / 3), "words": 3, "utterances": 2},
        "unknown": {"wer": pytest.approx(1 / 2), "words": 2, "utterances": 2},
    }
    assert list(by_speaker(rows)) == ["a", "b", "unknown"]


@pytest.mark.parametrize(
    ("words", "name"),
    [(1, "1-5"), (5, "1-5"), (6, "6-10"), (10, "6-10"), (11, "11-20"), (20, "11-20"), (21, "21+"), (90, "21+")],
)
def test_bins_of_words(words: int, name: str) -> None:
    text = " ".join(["word"] * words)
    assert by_length([row(text, text)])["words"] == {name: {"wer": 0.0, "words": words, "utterances": 1}}


@pytest.mark.parametrize(
    ("seconds", "name"), [(0.1, "0-2"), (2.0, "0-2"), (2.01, "2-4"), (8.0, "4-8"), (16.0, "8-16"), (16.5, "16+")]
)
def test_bins_of_seconds(seconds: float, name: str) -> None:
    assert list(by_length([row("a", "b", seconds=seconds)])["seconds"]) == [name]


def test_words_are_those_of_the_normalised_reference() -> None:
    rows = [row("Well, - \u2013 ... yes!", "well yes")]
    assert by_length(rows)["words"] == {"1-5": {"wer": 0.0, "words": 2, "utterances": 1}}
    rows = [row("it's it's it's it's", "it is it is it is it is")]
    assert list(by_length(rows, normaliser("whisper"))["words"]) == ["6-10"]
    assert by_length(rows, normaliser("whisper"))["words"]["6-10"]["wer"] == 0.0


def test_references_without_a_word() -> None:
    rows = [row("...", "noise", "a"), row("one", "one", "b")]
    assert by_speaker(rows)["a"] == {"wer": None, "words": 0, "utterances": 1}
    assert by_length(rows)["words"] == {
        "0": {"wer": None, "words": 0, "utterances": 1},
        "1-5": {"wer": 0.0, "words": 1, "utterances": 1},
    }
    assert by_length([]) == {"words": {}, "seconds": {}}


_TEXT = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=25).map(" ".join)


@given(st.lists(st.tuples(_TEXT, _TEXT, st.sampled_from("xyz"), st.floats(0.1, 30)), min_size=1, max_size=12))
def test_parts_add_up_to_the_whole(items: list[tuple[str, str, str, float]]) -> None:
    rows = [row(*item) for item in items]
    whole = score([item[0] for item in items], [item[1] for item in items])
    lengths = by_length(rows)
    for parts in (by_speaker(rows), lengths["words"], lengths["seconds"]):
        assert sum(part["words"] for part in parts.values()) == whole.words
        assert sum(part["utterances"] for part in parts.values()) == whole.utterances
        errors = sum(part["wer"] * part["words"] for part in parts.values())
        assert errors == pytest.approx(whole.wer * whole.words)


def test_both_normalisers_have_a_rate() -> None:
    assert by_normaliser([row("fifty one", "51"), row("a b", "a b")]) == {"wer_plain": 0.5, "wer_whisper": 0.0}
    assert by_normaliser([row("um", "um")]) == {"wer_plain": 0.0, "wer_whisper": None}
