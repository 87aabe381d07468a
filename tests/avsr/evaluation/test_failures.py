"""Loops, empty and cut hypotheses: what counts as one, and what is said about them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from avsr.cli import main
from avsr.config import read_run_config
from avsr.evaluation import decode
from avsr.evaluation.failures import PHRASE, failures, loops, warning
from avsr.evaluation.results import HYPOTHESES, made_by, row_key
from avsr.evaluation.run import evaluate
from avsr.evaluation.transcripts import transcribe_files
from avsr.runtime.rows import Rows


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("okay okay okay okay", "okay", True),
        ("Okay. Okay, okay! OKAY", "", True),
        ("so okay okay okay", "so okay", False),
        ("no no no no", "", True),
        ("no no no no", "No, no no!", False),
        ("no no no no no no", "no no no", True),
        ("thank you " * 5, "thank you", True),
        ("you thank " * 4, "thank you thank you thank you thank you", False),
        ("and i said and i said and i said and i said", "and i said", True),
        ("ha ha ha ho ha ha ha ho ha ha ha ho ha ha ha ho", "ha", True),  # the phrase itself repeats a word
        ("no no no no and bye bye bye bye bye bye bye bye", "no no no no bye", True),  # the second one
        ("do re do re do re do", "", False),
        ("a b c d e f g h " * 4, "", True),
        ("a b c d e f g h i " * 4, "", False),
        ("oh no oh no oh no oh now", "", False),  # whole words
        ("to to to too", "", False),
        (". . . . .", "", False),
        ("", "", False),
        ("a.b a.b a.b a.b", "", True),
    ],
)
def test_what_is_a_loop(text: str, reference: str, expected: bool) -> None:
    assert loops(text, reference) is expected


@pytest.mark.parametrize("seed", range(3))
def test_loops_of_one_word_against_runs(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        text, said = (rng.choices(["a", "b"], k=rng.randint(0, 12)) for _ in range(2))

        def longest(words: list[str], word: str) -> int:
            return max((len([*run]) for key, run in groupby(words) if key == word), default=0)

        one_word = any(longest(text, word) >= max(4, 2 * longest(said, word)) for word in "ab")
        if one_word:
            assert loops(" ".join(text), " ".join(said))
        if len(text) < 8:  # no room for four of two words
            assert loops(" ".join(text), " ".join(said)) == one_word


def test_long_texts_take_no_time() -> None:
    assert loops("a b " * 20_000) and not loops("x" * 100_000)
    assert not loops(" ".join(map(str, range(20_000))), "1 " * 20_000)
    assert PHRASE == 8


def row(reference: str, hypothesis: str, cut: str = "") -> dict[str, object]:
    return {"reference": reference, "hypothesis": hypothesis, "cut": cut, "loop": loops(hypothesis, reference)}


def test_failures_are_counted() -> None:
    rows = [
        row("a b", "a b"),
        row("a b", "a a a a", "budget"),
        row("a b", ""),
        row("a b", "?!", "positions"),
        row("...", ""),  # nothing was said
        row("a a a", "a a a", "budget"),
    ]
    assert failures(rows) == {"loops": 1, "empty": 2, "cut": 3, "cut_by_positions": 1}
    assert failures([]) == {"loops": 0, "empty": 0, "cut": 0, "cut_by_positions": 0}


def test_one_line_names_what_there_is_and_the_keys_that_help() -> None:
    none = failures([])
    assert warning({}) == warning({"a": none}) == ""
    line = warning({"a": none | {"loops": 2, "cut": 3, "cut_by_positions": 1}, "b\n": none | {"empty": 1}, "c": none})
    assert "a: 2 loops, 3 cut, 1 cut by positions" in line and r"b\n: 1 empty" in line and "c:" not in line
    assert "decode.no_repeat_ngram" in line and "decode.base_tokens" in line and "\n" not in line
    full = warning({"a": none | {"cut": 1, "cut_by_positions": 1}})  # a larger budget would not help
    assert "1 cut by positions" in full and "decode." not in full


# By command: evaluate and transcribe


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``say([(text, cut), ...])``: what the next utterances are decoded to, 2 seconds a batch; then decoding ends."""
    now = 0.0
    monkeypatch.setattr("avsr.evaluation.speed.time.perf_counter", lambda: now)

    def set_up(texts: Sequence[tuple[str, str]]) -> None:
        left = list(texts)

        def transcribe_batch(model: Any, batch: Any, config: Any) -> Any:
            nonlocal now
            now += 2.0
            if not left:
                raise ConnectionAbortedError
            return [[decode.Hypothesis(text, 0.0, cut)] for text, cut in (left.pop(0) for _ in batch.utterances)]

        monkeypatch.setattr(decode, "transcribe_batch", transcribe_batch)

    return set_up


FAILED = [("okay okay okay okay", "budget"), ("", ""), ("fifty", ""), ("a", "positions"), *[("x", "")] * 3]


def test_failures_and_speed_are_among_the_metrics(
    run_folder: Path, say: Callable[..., None], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    say(FAILED)
    main(["evaluate", str(run_folder), "decode.batch=1"])
    metrics = json.loads((run_folder / "metrics.json").read_text())
    counts = {"loops": 1, "empty": 1, "cut": 2, "cut_by_positions": 1}
    assert metrics["sentences"] | counts == metrics["sentences"]
    assert metrics["unseen_voices"] | dict.fromkeys(counts, 0) == metrics["unseen_voices"]
    (line,) = (record.getMessage() for record in caplog.records if "failed hypotheses" in record.getMessage())
    assert "sentences: 1 loops, 1 empty, 2 cut, 1 cut by positions" in line and "unseen_voices" not in line
    rows = [json.loads(line) for line in (run_folder / HYPOTHESES).read_text().splitlines()]
    assert [(row["hypothesis"], row["cut"]) for row in rows] == FAILED
    assert [row["loop"] for row in rows] == [True, *[False] * 6]
    assert not {"took", "warm", "cached"} & rows[0].keys()
    assert metrics["sentences"]["rtfx"] == pytest.approx(0.6 / 2)
    assert "  RTFx 0.3 without encoders  (" in capsys.readouterr().out
    assert metrics["sentences"]["rtfx_without_encoders"] == ["audio"]  # the recipe has a cache
    assert metrics["sentences"]["wer_plain"] == metrics["sentences"]["wer"]
    assert metrics["sentences"]["wer_whisper"] >= 0
    assert re.search(r"^\d+ substitutions\n", (run_folder / "errors.txt").read_text())
    say([("set", "")] * 7)
    caplog.clear()
    main(["evaluate", str(run_folder), "data.cache=null"])
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["sentences"]["rtfx_without_encoders"] == [] and "RTFx 1.2  (" in capsys.readouterr().out
    assert "failed hypotheses" not in caplog.text


def test_a_stopped_evaluation_knows_its_failures_and_speed(run_folder: Path, say: Callable[..., None]) -> None:
    say(FAILED[:3])
    with pytest.raises(ConnectionAbortedError):
        evaluate(run_folder, ["decode.batch=1"])
    say(FAILED[3:])
    scores = evaluate(run_folder, ["decode.batch=1"])
    metrics = json.loads((run_folder / "metrics.json").read_text())["sentences"]
    assert [metrics[name] for name in ("loops", "empty", "cut", "cut_by_positions")] == [1, 1, 2, 1]
    assert scores["sentences"].rtfx == pytest.approx(2 * 0.6 / 4)  # without the first batch of either process


def test_rows_of_a_version_without_these_keys_are_decoded_again(run_folder: Path, say: Callable[..., None]) -> None:
    made = made_by(run_folder, read_run_config(run_folder))
    new = ("decode.repetition_penalty", "decode.no_repeat_ngram")
    row = {"set": "sentences", "id": "u000", "reference": "x", "hypothesis": "stale", "speaker": "", "seconds": 1.0}
    old = {key: value for key, value in made.items() if key not in new}
    Rows(run_folder / f"{HYPOTHESES}.unfinished", row_key, old).add(row)
    say(FAILED)
    evaluate(run_folder, [])
    assert "stale" not in (run_folder / HYPOTHESES).read_text()


def test_transcribe_warns_of_texts_that_failed(
    run_folder: Path,
    say: Callable[..., None],
    tone: Callable[[Path, float], Path],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Also of those that a stopped command has decoded."""
    names = [str(tone(tmp_path / f"{n}.wav", 0.4 + 0.1 * n)) for n in range(9)]
    settings = ["decode.batch=1"]  # eight files at a time
    say([*FAILED, ("x", "")])
    with pytest.raises(ConnectionAbortedError):
        list(transcribe_files(run_folder, names, settings, tmp_path / "out"))
    caplog.clear()
    say([("y", "budget")])
    found = list(transcribe_files(run_folder, names, settings, tmp_path / "out"))
    assert [text for _, text in found] == [*(text for text, _ in FAILED), "x", "y"]
    lines = [record.getMessage() for record in caplog.records if "its text" in record.getMessage()]
    assert [line.split(": ")[0] for line in lines] == [names[0], names[0], names[3], names[8]]
    assert "repeats itself (decode.no_repeat_ngram" in lines[0] and "decode.base_tokens" in lines[1]
    assert "positions" in lines[2]
