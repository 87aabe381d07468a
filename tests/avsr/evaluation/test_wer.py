"""Error rates against an own Levenshtein distance, and the normalisers."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from avsr.evaluation.wer import alignment, normaliser, plain, score

LETTERS = ["a", "b", "c", "the", "cat", "it's"]


def distance(one: Sequence[str], two: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions from one to two."""
    table = [[i + j if i == 0 or j == 0 else 0 for j in range(len(two) + 1)] for i in range(len(one) + 1)]
    for i in range(1, len(one) + 1):
        for j in range(1, len(two) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (one[i - 1] != two[j - 1]),
            )
    return table[-1][-1]


def sentence(rng: random.Random, least: int = 0) -> str:
    return " ".join(rng.choices(LETTERS, k=rng.randint(least, 7)))


@pytest.mark.parametrize("seed", range(10))
def test_rates_against_levenshtein(seed: int) -> None:
    rng = random.Random(seed)
    references = [sentence(rng, 1), *(sentence(rng) for _ in range(7))]  # some may be empty
    hypotheses = [sentence(rng) for _ in references]
    result = score(references, hypotheses)
    words = sum(len(r.split()) for r in references)
    errors = sum(distance(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    letters = sum(len(r) for r in references)
    letter_errors = sum(distance(r, h) for r, h in zip(references, hypotheses, strict=True))
    assert result.wer == pytest.approx(errors / words, abs=1e-12)
    assert result.cer == pytest.approx(letter_errors / letters, abs=1e-12)
    assert (result.words, result.utterances) == (words, 8)
    assert result.substitutions + result.deletions + result.insertions == errors
    inserted = sum(len(h.split()) - len(r.split()) for r, h in zip(references, hypotheses, strict=True))
    assert result.insertions - result.deletions == inserted


def test_the_rate_is_over_the_set_and_no_mean_of_rates() -> None:
    result = score(["a", "a b c d e f g h i"], ["x", "a b c d e f g h i"])
    assert result.wer == pytest.approx(1 / 10)


def test_perfect_and_empty_hypotheses() -> None:
    assert score(["a b"], ["a b"]).wer == 0.0 == score(["a b"], ["a b"]).cer
    silent = score(["a b", "c"], ["", ""])
    assert (silent.wer, silent.cer, silent.deletions, silent.insertions) == (1.0, 1.0, 3, 0)


def test_a_rate_may_exceed_1() -> None:
    result = score(["a"], ["x y z"])
    assert result.wer == 3.0 and result.substitutions == 1 and result.insertions == 2


def test_empty_references_count_what_was_put_into_them() -> None:
    result = score(["a b", "...", ""], ["a b", "two words", ""])
    assert result.wer == 1.0 and result.insertions == 2 and result.words == 2 and result.utterances == 3
    assert result.cer == pytest.approx(9 / 3)


def test_no_reference_with_a_word_is_an_error() -> None:
    with pytest.raises(ValueError, match="references"):
        score(["", "?"], ["a", "b"])


def test_lists_of_unequal_length_are_an_error() -> None:
    with pytest.raises(ValueError):
        score(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("  many \t spaces\n here ", "many spaces here"),
        ("DON'T", "don't"),
        ("don’t", "don't"),
        ("'quoted' words'", "quoted words"),
        ("rock 'n' roll", "rock n roll"),
        ("the dogs' bone", "the dogs bone"),
        ("twenty-one", "twenty one"),
        ("snake_case", "snake case"),
        ("a.b,c;d:e", "a b c d e"),
        ("3 o'clock, 9 sharp", "3 o'clock 9 sharp"),
        ("“Grüße” – ÉTÉ", "grüße été"),
        ("cafe\u0301", "café"),
        ("Привет, мир!", "привет мир"),
        ("你好，世界", "你好 世界"),
        ("?!...", ""),
        ("", ""),
        ("''", ""),
        ("o nine", "o nine"),
    ],
)
def test_the_plain_normaliser(text: str, expected: str) -> None:
    assert plain(text) == expected
    assert plain(expected) == expected


def test_vowel_signs_stay_in_their_words() -> None:
    assert plain("नमस्ते दुनिया।").split() == ["नमस्ते", "दुनिया"]


def test_the_normaliser_is_applied_to_both_sides() -> None:
    assert score(["Bin Blue, at A-nine."], ["bin blue at a nine"]).wer == 0.0


def test_whispers_normaliser_is_opt_in_and_rewrites() -> None:
    whisper = normaliser("whisper")
    assert normaliser("plain") is plain
    assert whisper("o nine") == "09" != plain("o nine")
    assert whisper("won't, twenty one") == "will not 21"
    assert score(["won't"], ["will not"]).wer > 0
    assert score(["won't"], ["will not"], whisper).wer == 0
    assert score(["twenty one"], ["21"], whisper).wer == 0 < score(["twenty one"], ["21"]).wer


def test_an_alignment_marks_every_error() -> None:
    lines = alignment("Set red, by h four", "set green by by four please").splitlines()
    assert len(lines) == 3 and lines[0].startswith("REF:") and lines[1].startswith("HYP:")
    marks = lines[2].replace(" ", "")
    assert sorted(marks) == sorted("SSI")
    assert lines[0].replace("*", "").split()[1:] == ["set", "red", "by", "h", "four"]
    assert lines[1].replace("*", "").split()[1:] == ["set", "green", "by", "by", "four", "please"]
    assert lines[1].index("green") - 2 <= lines[2].index("S") <= lines[1].index("green") + 5


def test_alignments_at_the_edges() -> None:
    assert "D" in alignment("a b", "").splitlines()[2]
    nothing = alignment("?", "words").splitlines()
    assert nothing[0].startswith("REF:") and "words" in nothing[1]
    same = alignment("a b", "a b").splitlines()
    assert same[0].split()[1:] == ["a", "b"] == same[1].split()[1:]
