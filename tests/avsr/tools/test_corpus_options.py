"""The options of ``avsr prepare`` and ``avsr synth``, which ``test_cli_prepare.py`` gives on the command line too."""

from __future__ import annotations

from pathlib import Path

import pytest

from avsr.errors import UserError
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.prepare.options import parse_options as parse_prepare
from avsr.tools.corpora.synth.corpus import SynthOptions, synthesise
from avsr.tools.corpora.synth.corpus import parse_options as parse_synth


def test_defaults_and_types() -> None:
    assert parse_prepare("muavic", []) == PrepareOptions() and parse_synth([]) == SynthOptions()
    given = ["cropped=False", "language=es", "workers=2", "skew=0.5"]
    expected = PrepareOptions(cropped=False, language="es", workers=2, skew=0.5)
    assert parse_prepare("muavic", given) == expected and parse_prepare("muavic", ["cropped=TRUE"]).cropped
    assert parse_synth(["grid=0", "seed=7", "voices=30"]) == SynthOptions(grid=0, seed=7, voices=30)


@pytest.mark.parametrize(
    ("command", "override", "parts"),
    [
        ("lrs3", "seg=0.5", ["seg", "1 to 600", "0.5"]),
        ("lrs3", "seg=nan", ["seg", "nan"]),
        ("lrs3", "seg=long", ["seg", "a number", "'long'"]),
        ("lrs3", "workers=1.5", ["workers", "whole number", "'1.5'"]),
        ("lrs3", "labels=x", ["labels", "vox2"]),
        ("lrs3", "validation=3 validation_ids=x", ["exclude each other"]),
        ("muavic", "cropped=maybe", ["true or false", "'maybe'"]),
        ("muavic", "seg=3", ["seg", "lrs2"]),
        ("videos", "seg", ["key=value", "'seg'"]),
        ("videos", "landmarks=", ["landmarks", "folder"]),
        ("synth", "voises=3", ["voises", "'voices'", "options of synth"]),
        ("synth", "voices=0", ["voices", "1 to 30", "got 0"]),
        ("synth", "voices=31", ["voices", "1 to 30", "got 31"]),
        ("synth", "unseen_voices=11", ["unseen_voices", "1 to 10", "got 11"]),
        ("synth", "test=0", ["test", "1 to"]),
        ("synth", "workers=-1", ["workers", "0 to 1024"]),
        ("synth", "video=2", ["video", "0 to 1", "got 2"]),
        ("synth", "grid=64000", ["grid", "64340", "at most grid=63660"]),
        ("synth", "grid=0 open=0", ["both 0"]),
    ],
)
def test_bad_options_are_named(command: str, override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_synth(override.split()) if command == "synth" else parse_prepare(command, override.split())
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_options_of_a_script_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unseen_voices"):
        synthesise(tmp_path / "x", SynthOptions(unseen_voices=0))
    assert not (tmp_path / "x").exists()
