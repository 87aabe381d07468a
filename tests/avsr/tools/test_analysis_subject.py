"""What is read of a subject: rows of all lengths, the stream that opens a row, no graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avsr.models.speech_llm import Assembled
from avsr.tools.analysis import subject as module
from avsr.tools.analysis.inputs import ModelOptions, load_text_subject
from avsr.tools.analysis.subject import Subject, speech_subject


@pytest.fixture(scope="module")
def texts(tiny_llm: Path) -> Subject:
    """60 rows of 3 to 62 tokens with BOS, no two alike."""
    return load_text_subject(str(tiny_llm), ["x" * n for n in range(2, 62)], ModelOptions(), torch.device("cpu"))


def lengths(subject: Subject) -> list[int]:
    return [len(names) for rows in subject.batches() for names in rows.names]


@pytest.mark.parametrize("count", [1, 3, 7, 32, 59, 60])
def test_spread_rows_are_of_all_lengths_and_stay_the_same(texts: Subject, count: int) -> None:
    part = texts.spread(count)
    taken = lengths(part)
    assert len(taken) == part.count == count and lengths(part) == taken
    steps = {after - before for before, after in zip(taken, taken[1:], strict=False)}
    assert all(60 // count <= step <= -(-60 // count) for step in steps)
    assert abs(sum(taken) / count - sum(lengths(texts)) / 60) <= 0.5
    assert lengths(part.spread(2)) == [taken[count // 4], taken[3 * count // 4]] or count < 4


def test_spread_rows_are_those_of_the_whole(texts: Subject) -> None:
    whole = {len(row): (rows, b) for rows in texts.batches() for b, row in enumerate(rows.names)}
    for rows in texts.spread(11).batches():
        assert rows.embeddings.shape[:2] == rows.mask.shape == (len(rows.names), max(map(len, rows.names)))
        for b, names in enumerate(rows.names):
            other, place = whole[len(names)]
            assert int(rows.mask[b].sum()) == len(names) and rows.spans[b] == other.spans[place]
            assert torch.equal(rows.embeddings[b, : len(names)], other.embeddings[place, : len(names)])


def test_more_rows_than_there_are(texts: Subject) -> None:
    part = texts.spread(1000)
    assert part.count == 60 and lengths(part) == lengths(texts)


@pytest.mark.parametrize(("task", "opener"), [("audio", "<audio>"), ("video", "<video>"), ("audiovisual", "<audio>")])
def test_the_opener_is_that_of_the_task_that_is_read(monkeypatch: pytest.MonkeyPatch, task: str, opener: str) -> None:
    """Also in a model of more streams; and rows are put together without a graph."""
    monkeypatch.setattr(module, "collate", list)
    weight = torch.ones(4, requires_grad=True)

    def assemble(batch: list[Any], **options: Any) -> Assembled:
        return Assembled(weight * torch.ones(1, 2, 4), torch.ones(1, 2), torch.ones(1), [["BOS", "a"]])

    class Dataset(list[int]):
        sizes = (3,)
        reading = SimpleNamespace(task=task)

    model = SimpleNamespace(streams=("audio", "video"), delimiters=1, llm=None, assemble=assemble)
    config = SimpleNamespace(training=SimpleNamespace(frames=10))
    subject = speech_subject(model, Dataset([1]), config)  # type: ignore[arg-type]
    assert subject.opener == opener
    (rows,) = subject.batches()
    assert not rows.embeddings.requires_grad and torch.is_grad_enabled()
