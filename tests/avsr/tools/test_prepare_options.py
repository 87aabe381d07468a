"""The options of ``avsr prepare``, its processes, and the names of clips."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from avsr.errors import UserError
from avsr.tools.corpora.source import Piece, Source
from avsr.tools.prepare import run
from avsr.tools.prepare.options import parse_options
from avsr.tools.prepare.pool import run_jobs


def test_the_names_of_clips_are_compared_both_ways(tmp_path: Path) -> None:
    def source(name: str, *clips: str) -> Source:
        pieces = tuple(Piece(clip, "text") for clip in clips)
        return Source(name, tmp_path / f"{name}.mp4", "", ("all",), pieces, window=None if clips else 2.0)

    windows, whole = source("a"), source("a_00", "a_00")
    for pair, twice in (
        ((windows, whole), True),
        ((whole, windows), True),
        ((source("b", "a_123"), windows), True),
        ((source("a_00"), windows), False),  # windows of windows: a_00_00
        ((source("b", "a_0"), windows), False),
        ((source("b", "a_00", "a_01"), source("c", "a_02")), False),
        ((source("b", "a_00", "a_01"), source("c", "a_01")), True),
    ):
        kept, refused = run._sources(pair)
        assert len(kept) == 2 - twice and kept[0] == pair[0]
        assert [(r.id, r.kind) for r in refused] == [(pair[1].id, "twice")] * twice


def test_a_process_that_dies_takes_only_its_own_job(tmp_path: Path) -> None:
    """``os._exit`` ends the process for a whole number; for a text it raises what is raised here."""
    with pytest.raises(TypeError):
        list(run_jobs(os._exit, ["text"] * 2, 2))
    assert list(run_jobs(os._exit, [3], 2)) == [(3, None)]
    harmless, deadly = signal.SIGCONT, signal.SIGKILL
    jobs = [harmless, harmless, deadly, harmless, harmless, harmless]
    assert sorted(job for job, _ in run_jobs(signal.raise_signal, jobs, 2)) == sorted(jobs)


@pytest.mark.parametrize(
    ("corpus_name", "override", "parts"),
    [
        ("lrs3", "seg=0.5", ["seg", "1 to 600", "0.5"]),
        ("lrs3", "seg=nan", ["seg", "nan"]),
        ("lrs3", "seg=long", ["seg", "a number", "'long'"]),
        ("lrs3", "workers=1.5", ["workers", "whole number"]),
        ("lrs3", "landmark=x", ["'landmark'", "did you mean 'landmarks'"]),
        ("lrs3", "labels=x", ["labels", "vox2"]),
        ("muavic", "cropped=maybe", ["true or false", "'maybe'"]),
        ("muavic", "seg=3", ["seg", "lrs2"]),
        ("videos", "seg", ["key=value", "'seg'"]),
        ("videos", "landmarks=", ["landmarks", "folder"]),
        ("lrs4", "seg=3", ["'lrs4'", "lrs2, lrs3"]),
    ],
)
def test_bad_options(corpus_name: str, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(corpus_name, [override])
    for part in parts:
        assert part in str(caught.value)


def test_options() -> None:
    found = parse_options("muavic", ["cropped=False", "language=es", "workers=2", "skew=0.5"])
    assert (found.cropped, found.language, found.workers, found.skew, found.seg) == (False, "es", 2, 0.5, 16.0)
    with pytest.raises(UserError, match="exclude each other"):
        parse_options("lrs3", ["validation=3", "validation_ids=x"])
