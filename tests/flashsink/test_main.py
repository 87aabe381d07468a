"""``python -m flashsink``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import flashsink
from flashsink.__main__ import main

pytestmark = pytest.mark.integration


def test_backends_are_listed_in_columns(capsys):
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines}
    for name, state in flashsink.backends().items():
        assert rows["backend", name].endswith(state)
    assert {("package", name) for name in ("torch", "triton", "transformers")} <= rows.keys()
    column = lines[0].index("state")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def numbers(table):
    """position -> (sink rate, mean received, largest activation, cosine) of the first printed table."""
    found = {}
    for line in table.splitlines()[2:5]:
        words = line.split()
        found[words[0]] = [float(word) for word in words[-4:]]
    return found


def test_the_demo_plants_a_sink_and_the_loss_removes_it(capsys):
    pytest.importorskip("transformers")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    before, after = (numbers(out[out.index(word) :]) for word in ("before: ", "after 80 steps: "))
    for place in ("0", "12"):  # BOS and the delimiter
        rate, received, largest, cosine = before[place]
        assert rate > 0.5 and received > 0.3 and largest > 10 * before["others"][2] and cosine > 0.9
    assert before["others"][0] < 0.1
    assert after["12"][0] < before["12"][0] / 2 and after["12"][3] < before["12"][3] / 2


@pytest.mark.parametrize(
    "argv", [[], ["nothing"], ["demo", "--steps", "-1"], ["demo", "--weight", "x"], ["backends", "x"]]
)
def test_bad_usage_is_one_line_and_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m flashsink") and error.count("\n") == 1 and "error: " in error


def test_without_transformers_the_demo_says_so_in_one_line():
    code = (
        "import sys; sys.modules['transformers'] = None; from flashsink.__main__ import main; sys.exit(main(['demo']))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "transformers" in done.stderr
