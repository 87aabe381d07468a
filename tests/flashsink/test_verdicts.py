"""When kernels are checked, what is remembered, and what happens to those that fail; in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch._subclasses import FakeTensorMode

import flashsink
from flashsink import dispatch, selfcheck, verdicts
from flashsink.selfcheck import Kernel
from flashsink.triton import launch

pytestmark = [
    pytest.mark.integration,
    pytest.mark.interpreter,
    pytest.mark.skipif(not launch.INTERPRETED, reason="runs in Triton's interpreter"),
]

CPU = torch.device("cpu")
QKV = tuple(torch.randn(2, h, 9, 16, generator=torch.Generator().manual_seed(h)).half() for h in (4, 2, 2))
H = torch.randn(2, 2, 9, 24, generator=torch.Generator().manual_seed(0)).half()
SPANS = torch.tensor([4, 3])
LOSS = Kernel("loss", torch.float16, 24)


class Checks:
    """Stands in for the check: counts what is asked for and finds what it is told to find."""

    def __init__(self):
        self.asked, self.wrong, self.seconds = [], {}, 0.0

    def __call__(self, run, kernel, device):
        self.asked.append(kernel.family)
        time.sleep(self.seconds)
        found = self.wrong.get(kernel.family, "")
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of its own; kernels of the interpreter are checked, and preferred."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verdicts, "MODE", "1")
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setitem(dispatch._PREFERRED, "cpu", ("triton", "reference"))
    return tmp_path / "flashsink"


@pytest.fixture
def checks(monkeypatch, folder):
    found = Checks()
    monkeypatch.setattr(selfcheck, "wrong", found)
    return found


def forget():
    """As in a new process."""
    verdicts._verdicts.clear()


def chosen(family="attention"):
    x = QKV[0] if family in selfcheck.ATTENTION else H[0]
    return dispatch.select(None, "cpu", x, family=family)


def test_everything_is_checked_once_before_its_first_use(checks):
    flashsink.attention(*QKV)
    flashsink.attention(*QKV, causal=False)
    assert checks.asked == ["attention", "statistics"]
    flashsink.calibrated_attention(*QKV, torch.zeros(2, 4, 9, dtype=torch.bool))
    flashsink.decorrelation_loss(H, SPANS)
    flashsink.activation_stats(H)
    flashsink.decorrelation_loss(H, SPANS)
    assert checks.asked[2:] == ["ACT", "loss", "activations"]
    flashsink.decorrelation_loss(H.float(), SPANS)  # another dtype, and another number of features
    flashsink.decorrelation_loss(H[..., :20], SPANS)
    assert checks.asked[5:] == ["loss", "loss"]
    flashsink.decorrelation_loss(H.double(), SPANS)  # the reference's
    assert len(checks.asked) == 7


def test_a_model_is_checked_where_it_uses_kernels(checks):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40))
    flashsink.attach(model)
    ids = torch.randint(3, 40, (2, 9))
    model(input_ids=ids)
    assert checks.asked == ["attention", "statistics", "norm"]  # which also has the loss and the activations


def test_what_fails_is_named_and_the_next_backend_takes_over(monkeypatch, folder, caplog):
    """With a kernel that is broken indeed."""

    def tamper(seen):
        if seen.kernel.__name__ == "received_kernel":
            seen.arguments["scale"] *= 1.1
        return True

    with launch.observe(tamper):
        with caplog.at_level("INFO", logger="flashsink"):
            assert [chosen(), chosen()] == ["reference"] * 2
        warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1 and "statistics of float16, head dim 16" in warnings[0]
        assert "padded rows: the pass is off by" in warnings[0] and "FLASHSINK_CHECK=0" in warnings[0]
        with pytest.raises(ValueError, match="backend: 'triton' cannot be used: its statistics of float16.*the pass"):
            flashsink.attention(*QKV, backend="triton")
    assert chosen("loss") == "triton"
    out = flashsink.attention(*QKV)
    assert torch.equal(out, flashsink.attention(*QKV, backend="reference"))


def test_a_kernel_that_raises_fails(folder):
    def refuse(seen):
        if seen.kernel.__name__ == "decorrelation_forward":
            raise RuntimeError("out of resource: shared memory")
        return True

    with launch.observe(refuse):
        assert chosen("loss") == "reference"
    reason = verdicts.remembered(CPU, LOSS)
    assert reason == "padded rows: it raises RuntimeError: out of resource: shared memory"


def test_verdicts_are_written_and_read(checks, folder):
    checks.wrong["loss"] = "no good"
    assert (chosen(), chosen("loss")) == ("triton", "reference")
    assert len(list(folder.glob("check-*/*.json"))) == 3
    content = json.loads(verdicts.place(CPU, LOSS).read_text())
    assert (content["wrong"], content["kernel"]) == ("no good", "loss of float16, 24 features")
    assert content["torch"] == torch.__version__
    forget()
    assert (chosen(), chosen("loss"), len(checks.asked)) == ("triton", "reference", 3)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"x"', "\0", '{"wrong": ""}', "of another machine", "of another kernel", "a number"]
)
def test_a_file_that_is_not_ours_is_ignored_and_replaced(checks, folder, text):
    path = verdicts.place(CPU, LOSS)
    path.parent.mkdir(parents=True)
    right = verdicts.environment(CPU) | {"kernel": str(LOSS), "wrong": ""}
    others = {
        "of another machine": {"driver": "1"},
        "of another kernel": {"kernel": "loss of float16, 25 features"},
        "a number": {"wrong": 0},
    }
    path.write_text(json.dumps(right | others[text]) if text in others else text)
    assert chosen("loss") == "triton" and checks.asked == ["loss"]
    assert json.loads(path.read_text()) == right


@pytest.mark.parametrize("how", ["file", "no home"])
def test_without_a_cache_every_process_checks(checks, folder, how, monkeypatch):
    if how == "file":
        folder.parent.mkdir(exist_ok=True)
        folder.write_text("in the way of the folder")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(
            verdicts.Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home")))
        )
    assert chosen("loss") == chosen("loss") == "triton"
    assert checks.asked == ["loss"]
    forget()
    assert chosen("loss") == "triton" and checks.asked == ["loss", "loss"]


def test_the_variable_skips_it(checks, monkeypatch):
    checks.wrong["loss"] = "no good"
    assert chosen("loss") == "reference"
    monkeypatch.setattr(verdicts, "MODE", "0")
    assert chosen("loss") == "triton"
    monkeypatch.setattr(verdicts, "MODE", "")  # nor is the interpreter checked unasked
    forget()
    assert chosen("loss") == "triton" and checks.asked == ["loss"]


def test_no_memory_says_nothing_of_the_kernels(checks):
    checks.wrong["loss"] = torch.OutOfMemoryError("CUDA out of memory")
    assert chosen("loss") == chosen("loss") == "triton"
    assert checks.asked == ["loss", "loss"] and verdicts.remembered(CPU, LOSS) is None
    checks.wrong["loss"] = RuntimeError("the device was lost before")
    with pytest.raises(RuntimeError, match="lost before"):
        chosen("loss")
    checks.wrong.clear()
    assert chosen("loss") == "triton" and verdicts._verdicts


# ---- where nothing is checked


def test_what_is_known_is_a_constant_of_a_graph_as_torch_marks_it():
    """Without the compiler, which flashsink does not import."""

    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(verdicts._failed) == vars(dispatch._state) == vars(marked) != {}
    code = "import sys, flashsink; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_not_while_compiling_where_only_known_verdicts_count(checks, caplog):
    verdicts._say_unchecked.cache_clear()

    def loss(h):
        return flashsink.decorrelation_loss(list(h), SPANS, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(H), flashsink.decorrelation_loss(H, SPANS, backend="reference"))
    assert checks.asked == [] and caplog.text.count("loss of torch.float16 is compiled unchecked") == 1
    verdicts.remember(CPU, LOSS, "no good")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no good"):
        torch.compile(loss, fullgraph=True, backend="eager")(H)
    torch._dynamo.reset()
    dynamic = torch.compile(loss, fullgraph=True, backend="eager", dynamic=True)
    assert dynamic(H[..., :20]).isfinite()  # another number of features
    with pytest.raises(Exception, match="no good"):
        dynamic(H)
    assert checks.asked == []


def test_not_on_fake_tensors_nor_among_them(checks):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(H[0])
        assert dispatch.select(None, "cpu", fake, family="loss") == "triton"
        assert dispatch.select(None, "cpu", H[0], family="loss") == "triton"
    assert dispatch.select(None, "cpu", fake, family="loss") == "triton"
    assert checks.asked == []


def test_not_while_a_graph_is_captured(checks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = type("Cuda", (), {"device": torch.device("cuda:0"), "dtype": torch.float16, "shape": (1, 2, 24)})()
    monkeypatch.setattr(verdicts, "environment", lambda device: {"device": str(device)})
    monkeypatch.setattr(torch._guards, "detect_fake_mode", lambda _: None)
    assert verdicts.refusal("loss", x) == "" and checks.asked == []
    verdicts.remember(x.device, LOSS, "no good")
    assert "no good" in verdicts.refusal("loss", x) and checks.asked == []


def test_not_inside_a_backward(checks):
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            assert chosen("loss") == "triton"
            return upstream

    Late.apply(torch.ones(1, requires_grad=True)).backward()
    assert checks.asked == []


def test_not_within_a_check(folder, monkeypatch):
    asked = []

    def check(run, kernel, device):
        asked.append(kernel.family)
        assert chosen("norm") == "triton"
        return ""

    monkeypatch.setattr(selfcheck, "wrong", check)
    assert chosen("loss") == "triton" and asked == ["loss"]


def test_the_callers_modes_do_not_reach_the_check(folder):
    """Nor does the check reach the caller: neither its random numbers nor what its graph saves."""
    saved = []
    before = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        assert [chosen(family) for family in selfcheck.FAMILIES] == ["triton"] * len(selfcheck.FAMILIES)
    assert set(verdicts._verdicts.values()) == {""} and not saved
    assert torch.equal(torch.get_rng_state(), before)


# ---- several at once


@pytest.mark.parametrize("cache", [True, False])
def test_threads_wait_for_the_one_that_checks(checks, folder, cache):
    if not cache:
        folder.write_text("in the way of the folder")
    checks.seconds = 0.3
    found = []
    threads = [threading.Thread(target=lambda: found.append(chosen("loss"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4 and checks.asked == ["loss"]


RANK = """
import os, sys, time, torch
from flashsink import dispatch, selfcheck, verdicts
verdicts.WAIT = float(sys.argv[1])
def wrong(run, kernel, device):
    with open("asked", "a") as file:
        file.write(kernel.family + "\\n")
    time.sleep(2.0)
    return "no good"
selfcheck.wrong = wrong
dispatch._PREFERRED["cpu"] = ("triton", "reference")
open(f"ready{os.environ['LOCAL_RANK']}", "w").close()
while not all(os.path.exists(f"ready{rank}") for rank in range(2)):
    time.sleep(0.01)
print(dispatch.select(None, "cpu", torch.randn(2, 9, 24), family="loss"))
"""


def ranks(tmp_path, wait):
    """What two processes of a node choose, and how often they checked."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "FLASHSINK_CHECK": "1", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(wait)],
            cwd=tmp_path,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    return said, (tmp_path / "asked").read_text().split()


def test_one_of_two_processes_checks(tmp_path):
    assert ranks(tmp_path, 60.0) == (["reference"] * 2, ["loss"])
    (tmp_path / "asked").write_text("")
    assert ranks(tmp_path, 60.0) == (["reference"] * 2, [])  # nor does a later one


def test_who_waits_too_long_checks_for_itself(tmp_path):
    assert ranks(tmp_path, 0.2) == (["reference"] * 2, ["loss"] * 2)
