"""The check of the kernels: right ones pass it, and every kind of fault is found and named."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import flashsink
from flashsink import dispatch, selfcheck
from flashsink.__main__ import main
from flashsink.selfcheck import Kernel
from flashsink.triton import launch

pytestmark = [pytest.mark.integration, pytest.mark.interpreter]

CPU = torch.device("cpu")
HALF = torch.float16
needs_interpreter = pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter")


def kernel(family, dtype=HALF):
    return Kernel(family, dtype, 16 if family in selfcheck.ATTENTION else 24)


@contextlib.contextmanager
def tampered(name, change):
    """``change`` gets the arguments of every launch of a kernel; where it returns False nothing is launched."""

    def watch(seen):
        return change(seen.arguments) is not False if seen.kernel.__name__ == name else True

    with launch.observe(watch):
        yield


def scaled(name):
    return lambda arguments: arguments.update({name: arguments[name] * 1.1})


def replaced(**values):
    return lambda arguments: arguments.update(values)


def emptied(*names):
    """A kernel that leaves its results as they are: NaN, or numbers of long ago."""

    def change(arguments):
        for name in names:
            arguments[name].fill_(0 if arguments[name].dtype == torch.int32 else float("nan"))
        return False

    return change


def out_of_order(arguments):
    """A mask that is off by one token."""
    arguments["lengths"] = (arguments["lengths"] - 1).clamp(min=0)


def late(name):
    """A result that is written to another place."""
    return lambda arguments: arguments.update({name: torch.empty_like(arguments[name])})


def raises(_):
    raise RuntimeError("out of resources:\n shared memory")


LONG = ("attention", "ACT", "patterns", "segments")  # in the interpreter


@needs_interpreter
@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=pytest.mark.slow) if x in LONG[2:] else x for x in selfcheck.FAMILIES]
)
def test_right_kernels_pass(family):
    for dtype in (HALF, torch.float32):
        if family not in LONG or dtype == HALF:
            assert selfcheck.wrong(dispatch.module("triton"), kernel(family, dtype), CPU) == ""


@pytest.mark.parametrize("family", selfcheck.FAMILIES)
@pytest.mark.parametrize("dtype", selfcheck.LIMITS)
def test_right_kernels_of_the_cpu_backend_pass(family, dtype):
    if flashsink.backends()["cpu"] == "usable":
        assert selfcheck.wrong(dispatch.module("cpu"), kernel(family, dtype), CPU) == ""


FAULTS = [
    ("attention", "forward_kernel", scaled("scale"), "padded rows: the output is off"),
    ("attention", "forward_kernel", replaced(CAUSAL=False), "padded rows: the output is off"),
    ("attention", "forward_kernel", out_of_order, "padded rows: the output is off"),
    ("attention", "forward_kernel", emptied("out"), "padded rows: the output is off by nan"),
    ("attention", "forward_kernel", raises, "padded rows: it raises RuntimeError: out of resources: shared memory"),
    ("attention", "gradient_q_kernel", scaled("scale"), "padded rows: the gradient of q"),
    ("attention", "gradient_kv_kernel", late("dv"), "padded rows: the gradient of v is off"),
    ("attention", "gradient_kv_kernel", raises, "padded rows: it raises RuntimeError"),
    ("attention", "gradient_kv_kernel", replaced(query_starts=None), "padded rows: the attention received"),
    ("statistics", "received_kernel", scaled("scale"), "padded rows: the pass"),
    ("statistics", "received_kernel", replaced(query_starts=None), "padded rows: the pass"),
    ("ACT", "calibrate_kernel", scaled("beta"), "small sinks: the output"),
    ("patterns", "forward_kernel", replaced(window=39), "a window of capped scores: the output is off"),
    ("patterns", "gradient_q_kernel", scaled("cap"), "a window of capped scores: the gradient of q"),
    ("segments", "segments_received_kernel", scaled("scale"), "padded rows: the attention received is off"),
    ("segments", "segments_received_kernel", replaced(query_starts=None), "padded rows: the attention received is off"),
    ("segments", "entropy_kernel", scaled("scale"), "padded rows: the entropy is off"),
    ("loss", "decorrelation_forward", scaled("margin"), "padded rows: the sums"),
    ("loss", "decorrelation_backward", scaled("dsums"), "padded rows: the gradient of layer 0"),
    ("norm", "norm_forward", replaced(eps=0.0), "padded rows: the output is off"),
    ("norm", "norm_forward", scaled("margin"), "padded rows: the sum is off"),
    ("norm", "norm_backward", emptied("dh"), "padded rows: the gradient of h is off by nan"),
    ("norm", "bos_gradient", emptied("dbos"), "padded rows: the gradient of h is off by nan"),
    ("activations", "activation_max", emptied("max_abs"), "padded rows: the largest activation is off by nan"),
]


@needs_interpreter
@pytest.mark.parametrize(("family", "name", "change", "words"), FAULTS)
def test_a_fault_is_found_and_named(family, name, change, words):
    with tampered(name, change):
        reason = selfcheck.wrong(dispatch.module("triton"), kernel(family), CPU)
    assert reason.startswith(words) and "\n" not in reason, reason


@pytest.mark.parametrize("layout", ["packed rows", "rows without order"])
@needs_interpreter
def test_a_fault_in_one_layout_is_found(layout):
    """Kernels of other layouts are compiled apart, so one of them may be wrong by itself."""
    packed = layout == "packed rows"

    def change(arguments):
        if arguments["PACKED"] == packed and (packed or not arguments["CAUSAL"]):
            arguments["scale"] *= 1.2

    with tampered("forward_kernel", change):
        assert selfcheck.wrong(dispatch.module("triton"), kernel("attention"), CPU).startswith(f"{layout}: the output")


def test_small_errors_and_shapes():
    """Of vectors and of numbers, and not where rounding explains them."""
    want = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    assert selfcheck.difference(want, want.double(), 16) == 0
    assert selfcheck.difference(want.half(), want.double(), 16) < selfcheck.LIMITS[HALF] / 10
    one = want.clone()
    one[1, 2, 4] *= 1.5
    assert 0.3 < selfcheck.difference(one, want, 16) < 0.5
    assert selfcheck.difference(want[:1], want, 16) == float("inf")
    number = want[..., 0].clone()
    number[0, 0, 0] += 1.0  # one wrong number of a tensor without vectors
    assert selfcheck.difference(number, want[..., 0], 16) > 0.2
    number[0, 0, 0] = float("nan")
    assert not selfcheck.difference(number, want[..., 0], 16) <= 1


# ---- python -m flashsink check


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.setattr(selfcheck, "kernels", lambda: iter([kernel("statistics"), kernel("loss", torch.bfloat16)]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@needs_interpreter
def test_by_hand_every_backend_has_rows(few, capsys):
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cpu", "cpu", "triton", "sdpa"]  # bfloat16 not in the interpreter
    assert lines[2].split("  ")[1] == "statistics of float16, head dim 16" and lines[2].endswith("right")
    assert lines[3].endswith("on the CPU it is the cpu backend")


@needs_interpreter
def test_by_hand_a_fault_is_the_status(few, capsys):
    with tampered("received_kernel", scaled("scale")):
        assert main(["check", "--backend", "triton", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["checks"]
    assert row["kernel"] == "statistics of float16, head dim 16" and row["state"].startswith("padded rows: the pass is")


def test_by_hand_without_a_device(few, capsys, monkeypatch):
    monkeypatch.setattr(dispatch.triton, "available", lambda: "there is no CUDA device")
    assert main(["check"]) == 0
    assert "triton  -" in capsys.readouterr().out
    assert main(["check", "--backend", "triton"]) == 1
    assert "there is no CUDA device" in capsys.readouterr().out


def test_by_hand_a_lost_device_says_nothing_of_kernels(few, capsys, monkeypatch, tmp_path):
    def lost(*_):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(selfcheck, "wrong", lost)
    assert main(["check", "--backend", "cpu"]) == 1
    assert "not checked: unspecified launch failure" in capsys.readouterr().out and not list(tmp_path.rglob("*.json"))
