"""Tables of errors: their sums are those of the score, and spellings are told from other errors."""

from __future__ import annotations

import random
import re

import pytest

from avsr.evaluation.confusions import SHOWN, confusions, spellings, stretches
from avsr.evaluation.wer import normaliser, plain, score


def row(reference: str, hypothesis: str) -> dict[str, str]:
    return {"reference": reference, "hypothesis": hypothesis}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["plain", "whisper"])
def test_the_sums_are_those_of_the_score(seed: int, name: str) -> None:
    rng = random.Random(seed)
    words = ["a", "b", "it's", "fifty", "two", "Mr.", "..."]
    texts = [" ".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(40)]
    rows = [row(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    counted = score(texts[::2], texts[1::2], normaliser(name))
    page = confusions(rows, normaliser(name))
    for kind in ("substitutions", "deletions", "insertions"):
        assert f"{getattr(counted, kind)} {kind}\n" in page
    errors = [pair for stretch in stretches(rows, normaliser(name)) for pair in stretch.errors]
    assert len(errors) == counted.substitutions + counted.deletions + counted.insertions
    assert all(said != found for said, found in errors)


def test_a_stretch_ends_at_the_words_that_agree() -> None:
    rows = [row("set the red fifty five now", "set red 55 now"), row("a", "a please"), row("?", "two words")]
    found = list(stretches(rows, plain))
    assert {(stretch.said, stretch.found) for stretch in found} == {
        ("the", ""),
        ("fifty five", "55"),
        ("", "please"),
        ("", "two words"),
    }
    assert list(stretches([row("a b", "A b."), row("", "")], plain)) == []


@pytest.mark.parametrize(
    ("said", "found", "alike"),
    [
        ("fifty", "50", True),
        ("50", "fifty", True),
        ("twenty one", "21", True),
        ("o nine", "09", True),
        ("o nine", "9", False),
        ("mr", "mister", True),
        ("i'm", "i am", True),
        ("won't", "will not", True),
        ("first", "1st", True),
        ("fifty", "15", False),
        ("colour", "color", False),  # transformers ships no list of these
        ("red", "read", False),
        ("uh", "", True),
        ("the", "", False),
    ],
)
def test_spellings_are_told_from_other_errors(said: str, found: str, alike: bool) -> None:
    counted, errors = spellings([row(f"say {said} please", f"say {found} please")] * 3 + [row("a", "b")])
    assert counted == ({(said, found): 3} if alike else {})
    assert errors == (3 * max(len(said.split()), len(found.split())) if alike else 0)


def test_the_most_frequent_come_first_in_an_order_that_nothing_else_changes() -> None:
    rows = [row(f"x{n:02d}", f"y{n:02d}") for n in range(SHOWN + 5)] + [row("fifty", "50")] * 2 + [row("a b", "b")]
    page = confusions(rows)
    assert confusions(rows[::-1]) == page
    lines = page.split("\n\n")[0].splitlines()
    assert lines[0] == f"{SHOWN + 7} substitutions" and lines[1] == "      2  fifty / 50"
    assert lines[2:-1] == [f"      1  x{n:02d} / y{n:02d}" for n in range(SHOWN - 1)]
    assert lines[-1].split() == ["and", "6", "others"]
    assert re.search(r"1 deletions\n +1  a\n", page) and "insertions" not in page
    assert re.search(r"2 errors in spelling, numbers and fillers, by Whisper's normaliser\n +2  fifty / 50\n", page)
    assert confusions([row("a", "a")]) == confusions([]) == ""
