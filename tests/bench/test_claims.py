"""The claims as a whole: the GPU set can be built without a GPU, and every claim is measured or says why not."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import run
from bench.claims import MODULES
from bench.claims.flag_attention import own_pass
from bench.runner import ledger
from bench.runner.measure import Bench, Comparison, DeviceLost
from bench.workloads import attention
from bench.workloads.shapes import Model

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
TINY = Model("tiny", 2, 1, 16, 32, 2, 48, 50)


class Gpu(Bench):
    """Claims to be a GPU."""

    cuda = True


@pytest.mark.parametrize("name", [name for name in MODULES if name != "loss_memory"])
def test_the_gpu_set_is_complete(name):
    module = importlib.import_module(f"bench.claims.{name}")
    comparisons = list(module.comparisons(Gpu(CPU, 0.0, print)))
    assert {c.claim for c in comparisons} == {claim.name for claim in module.CLAIMS}
    for comparison in comparisons:
        assert {p.ours for p in comparison.providers} == {True, False}, comparison
        ledger.verdict(comparison.target, 1.0)
    for claim in module.CLAIMS:
        targets = {c.target for c in comparisons if c.claim == claim.name} - {""}
        assert targets, f"{claim.name} has a target on a GPU"


@pytest.mark.parametrize("lengths", [None, (20, 13)])
def test_captured_statistics_need_no_launch_after_the_backward(lengths):
    from flashsink.triton.launch import observe

    problem = attention.Problem(TINY, 1, 33, CPU, torch.float32, lengths)
    kernels = {}
    for how in ("", "captured", "pass"):
        names = kernels[how] = []
        step = attention.ours(problem, "triton", how).make()
        with observe(lambda launch, names=names: names.append(launch.kernel.__name__) or True):
            kernels[how + " result"] = step()
    assert "received_kernel" not in kernels["captured"] and kernels["captured"] == kernels[""]
    assert kernels["pass"].count("received_kernel") == 1
    torch.testing.assert_close(kernels["captured result"][4], kernels["pass result"][4], rtol=1e-4, atol=1e-5)


def test_the_pass_alone_is_the_pass_alone():
    from flashsink.triton.launch import observe

    forward, read = own_pass(attention.Problem(TINY, 1, 33, CPU, torch.float32), "triton").make()
    names = []
    for _ in range(2):
        forward()
        with observe(lambda launch: names.append(launch.kernel.__name__) or True):
            read()
    assert names == ["received_kernel"] * 2


@pytest.mark.parametrize(("error", "lost"), [(RuntimeError("broken"), False), (DeviceLost("broken"), True)])
def test_a_claim_that_raises_is_a_row_and_a_lost_device_ends_the_run(monkeypatch, error, lost):
    def fails(bench):
        yield Comparison("norm", "S1", torch.float32)
        raise error

    module = SimpleNamespace(__doc__="A claim.", CLAIMS=[SimpleNamespace(name="norm")], comparisons=fails)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    rows, kept = [], []
    assert run.measure(Bench(CPU, 0.0, rows.append), ["norm", "long_rows"], float("inf"), kept.append) is lost
    started = [entry["started"] for entry in kept if "started" in entry]
    assert started == (["norm"] if lost else ["norm", "long_rows"])
    assert [entry["finished"] for entry in kept if "finished" in entry] == ([] if lost else started)
    assert all(row["verdict"].startswith("error: ") and "broken" in row["verdict"] for row in rows)
    assert len(rows) == len(started)


def test_a_later_run_measures_only_what_is_left(tmp_path, monkeypatch):
    measured, late = [], [True]

    def comparisons(bench):
        for shape in ("S1", "S2"):
            measure = functools.partial(lambda shape: measured.append(shape) or {"verdict": "report"}, shape)
            yield Comparison("norm", shape, torch.float32, measure=measure)
            if late[0]:
                bench.deadline = 0.0

    module = SimpleNamespace(__doc__="A claim.", CLAIMS=[SimpleNamespace(name="norm")], comparisons=comparisons)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    store = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run", "norm", "--dry", "--rows", str(store)])
    assert run.main() == 0 and measured == ["S1"]
    assert not any("finished" in entry for entry in run.entries(store))
    store.write_text(store.read_text() + '{"done": "half a line\n')
    late[0] = False
    assert run.main() == 0 and measured == ["S1", "S2"]
    assert [entry["finished"] for entry in run.entries(store) if "finished" in entry] == ["norm"]


def test_in_order_of_worth_a_module_has_half_of_what_is_left(monkeypatch):
    shares = []

    def comparisons(bench):
        shares.append(bench.deadline - time.monotonic())
        return iter(())

    module = SimpleNamespace(__doc__="A claim.", CLAIMS=[SimpleNamespace(name="norm")], comparisons=comparisons)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    names = ["norm", "training_step", "norm", "norm"]  # of weights 1, 4, 1, 1
    whole = 10_000.0  # so much that a busy machine does not matter
    for least, expected in ((0.0, [1 / 7, 4 / 6, 1 / 2, 1]), (0.5, [1 / 2, 4 / 6, 1 / 2, 1])):
        shares.clear()
        run.measure(Bench(CPU, 0.0, print), names, whole, lambda entry: None, least)
        assert shares == pytest.approx([whole * share for share in expected], rel=0.01)


def test_a_run_prints_keeps_and_appends_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "ledger.csv")
    arguments = ["norm", "--budget", "0", "--rows", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    assert run.main() == 0
    (row,) = ledger.read(tmp_path / "ledger.csv")
    assert (row["claim"], row["verdict"]) == ("norm", "no time left") and "no time left" in capsys.readouterr().out
    kept = [json.loads(text) for text in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept[0] == {"started": "norm"} and kept[1]["verdict"] == "no time left"
    monkeypatch.setattr("sys.argv", ["run", *arguments, "--dry"])
    assert run.main() == 0 and len(ledger.read(tmp_path / "ledger.csv")) == 1
    monkeypatch.setattr("sys.argv", ["run", "nothing"])
    with pytest.raises(SystemExit):
        run.main()
