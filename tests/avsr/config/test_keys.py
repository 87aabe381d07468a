"""Keys with their allowed values and help, the reference that is made of them, and ``--help-keys``."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from avsr.cli import main
from avsr.config import Config
from avsr.config.composing import leaves
from avsr.config.keys import Rule, check, group, key, keys
from avsr.config.reference import help_text, markdown
from avsr.errors import UserError
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.synth.options import SynthOptions
from avsr.tools.lipreader.pretrain import PretrainConfig


@dataclass
class Inner:
    """What is inside.

    And more.
    """

    kind: str = key("a", "kind of it", choices=("a", "b"))
    share: float = key(0.5, "share", at_least=0, below=1)


@dataclass
class Schema:
    """A schema.

    Attributes:
        plain: without metadata; its
            help goes on here.
    """

    name: str = key(MISSING, "name of it")
    steps: int = key(3, "steps", at_least=1)
    names: list[str] = key(["x"], "names")
    left: Inner = group(Inner)
    right: Inner = group(Inner, {"kind": ("b", "c")})
    plain: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("rule", "fine", "bad", "expected"),
    [
        (Rule(), [0, "x", None, math.nan], [], ""),
        (Rule(choices=(1, 2)), [1, 2], [0, 3, None], "one of 1, 2"),
        (Rule(at_least=1), [1, math.inf], [0, math.nan], "at least 1"),
        (Rule(above=0), [1e-9, math.inf], [0, -1, math.nan], "more than 0"),
        (Rule(at_most=2), [2, -math.inf], [3, math.nan], "at most 2"),
        (Rule(below=2), [1.9], [2, math.nan], "less than 2"),
        (Rule(at_least=0, below=1), [0, 0.9], [1, -0.1, math.nan], "0 <= x < 1"),
        (Rule(above=0, at_most=1), [0.1, 1], [0, 1.1, math.nan], "0 < x <= 1"),
        (Rule(above=-math.inf, below=math.inf), [-1e300], [math.inf, -math.inf, math.nan], "a finite number"),
    ],
)
def test_rules(rule: Rule, fine: list[Any], bad: list[Any], expected: str) -> None:
    assert all(rule.allows(value) for value in fine) and not any(rule.allows(value) for value in bad)
    assert rule.expected() == expected


def test_a_key_is_checked_by_its_own_rule_and_by_that_of_its_group() -> None:
    config = Schema(name="n")
    check(Schema(name="n", right=Inner(kind="c")))
    for change, message in (
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"right": Inner(kind="a")}, "right.kind: expected one of b, c, got 'a'"),
        ({"left": Inner(kind="c")}, "left.kind: expected one of a, b, got 'c'"),
        ({"left": Inner(share=1.0)}, "left.share: expected 0 <= share < 1, got 1.0"),
    ):
        with pytest.raises(UserError) as caught:
            check(Schema(**{"name": "n", **change}))
        assert str(caught.value) == message
    assert Schema().names is not config.names, "a default is not shared"


def test_help_names_every_key_in_aligned_columns() -> None:
    lines = help_text(Schema).splitlines()
    assert lines == [
        "general",
        "name         str             required  name of it",
        "steps        int             3         steps (at least 1)",
        "names        list[str]       [x]       names",
        "plain        dict[str, int]  {}        without metadata; its help goes on here",
        "",
        "left: What is inside.",
        "left.kind    str             a         kind of it (one of a, b)",
        "left.share   float           0.5       share (0 <= x < 1)",
        "",
        "right: What is inside.",
        "right.kind   str             a         kind of it (one of b, c)",
        "right.share  float           0.5       share (0 <= x < 1)",
    ]


@pytest.mark.parametrize("schema", [Config, PretrainConfig, SynthOptions, PrepareOptions])
def test_help_has_every_key_of_a_command(schema: type[Any]) -> None:
    lines = help_text(schema).splitlines()
    starts = {line.split()[0] for line in lines if line}
    assert starts >= {name for name, _ in leaves(schema())}
    assert max(map(len, lines)) <= 150


def test_every_key_of_a_training_has_a_help_and_an_allowed_default() -> None:
    for item in keys(Config()):
        assert item.rule.help, item.name
        assert item.value == MISSING or item.rule.allows(item.value), item.name


def test_the_reference_is_up_to_date() -> None:
    path = Path(__file__).resolve().parents[3] / "configs" / "README.md"
    assert path.read_text(encoding="utf-8") == markdown() + "\n", (
        "run python -m avsr.config.reference > configs/README.md"
    )


def test_help_keys_needs_no_other_argument(capsys: pytest.CaptureFixture[str]) -> None:
    for command, name in (("train", "training.steps"), ("evaluate", "decode.beams"), ("synth", "unseen_voices")):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help-keys"])
        assert not caught.value.code and f"\n{name} " in capsys.readouterr().out


def test_help_keys_into_a_pipe_that_is_closed() -> None:
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "avsr.cli", "train", "--help-keys"]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.returncode, done.stderr) == (0, "")
