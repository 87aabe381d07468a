"""The peers compute the same as ours, without which the ratios would be meaningless."""

from __future__ import annotations

import pytest
import torch

import flashsink
from bench.runner.memory import peak_memory
from bench.workloads import attention, peers
from bench.workloads.llm_steps import Lora, Setting, flops
from bench.workloads.shapes import Model

TINY = Model("tiny", 4, 2, 16, 64, 2, 96, 50)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("tile", [peers.AS_SHIPPED, *peers.TUNED[1:2]], ids=str)
def test_the_pass_of_flag_attention(tile):
    q, k, v = (torch.randn(2, 70, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    stats = flashsink.attention(q, k, v, return_stats=True, backend="reference")[1]
    torch.testing.assert_close(peers.total_attention(q, k, stats.lse, tile), stats.received, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        peers.total_attention_cpu(q, k, stats.lse, block=32), stats.received, rtol=1e-4, atol=1e-5
    )


def test_the_reference_loss_is_ours_for_full_spans():
    layers = [torch.randn(3, 9, 24).requires_grad_() for _ in range(2)]
    ours = flashsink.decorrelation_loss(layers, torch.full((3,), 9), backend="reference")
    theirs = peers.reference_decorrelation(layers)
    torch.testing.assert_close(theirs, ours)
    for a, b in zip(torch.autograd.grad(theirs, layers), torch.autograd.grad(ours, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def result(provider):
    return provider.make()()


def test_all_attentions_agree():
    problem = attention.Problem(TINY, 2, 40, CPU, torch.float32)
    out, *rest = result(attention.ours(problem, "reference", "captured"))
    gradients, received = rest[:3], rest[3]
    for peer in (attention.eager(problem), attention.sdpa(problem, "MATH"), attention.sdpa(problem, None)):
        other, *given = result(peer)
        torch.testing.assert_close(other, out, rtol=1e-4, atol=1e-5)
        for a, b in zip(given[:3], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        if given[3] is not None:
            torch.testing.assert_close(given[3], received, rtol=1e-4, atol=1e-5)
    passed = result(attention.ours(problem, "reference", "pass", backward=False))
    assert passed[1] is None
    torch.testing.assert_close(passed[4], received, rtol=1e-4, atol=1e-5)


def test_packed_attentions_agree():
    problem = attention.Problem(TINY, 1, 30, CPU, torch.float32, (7, 18, 5))
    out, *gradients, _ = result(attention.ours(problem, "reference"))
    other, *given, _ = result(attention.sdpa_apart(problem))
    torch.testing.assert_close(other, out, rtol=1e-4, atol=1e-5)
    for a, b in zip(given, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "problem",
    [
        attention.Problem(TINY, 1, 30, CPU, torch.float32, (7, 18, 5)),
        attention.Problem(TINY, 2, 30, CPU, torch.float32),
    ],
    ids=["packed", "dense"],
)
def test_flex_attention_agrees(problem, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    out, *_, received = result(attention.ours(problem, "reference", "pass", backward=False))
    torch.testing.assert_close(result(attention.flex(problem, backward=False))[0], out, rtol=1e-4, atol=1e-5)
    other, *_, sums = result(attention.flex(problem, statistics=True, backward=False))
    torch.testing.assert_close(other, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, received, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_a_step_keeps_no_gradients_for_the_next_one(backend):
    problem = attention.Problem(TINY, 2, 40, CPU, torch.float32)
    step = (attention.ours(problem, backend) if backend else attention.sdpa(problem, "MATH")).make()
    first, second = (peak_memory(step, CPU) for _ in range(2))
    assert first == second >= sum(x.numel() * 4 for x in problem.tensors(True)[:3])


def test_padding_is_told_to_ours():
    problem = attention.Problem(TINY, 2, 40, CPU, torch.float32, valid=(40, 9))
    out = result(attention.ours(problem, "reference"))[0]
    assert not out[1, 9:].any() and out[1, :9].any() and "padded to 9" in problem.shape


def test_a_fresh_adapter_changes_nothing():
    base = torch.nn.Linear(8, 6)
    x = torch.randn(3, 8)
    assert torch.equal(Lora(base)(x), base(x))


def test_flops_of_a_step_counted_by_hand():
    setting = Setting(TINY, 2, (20, 10), True, CPU, torch.float32)
    frozen = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)  # q, k and v, o, three of the MLP; two layers
    adapters = 2 * 16 * ((64 + 64) + (64 + 32))
    attended = 2 * (20 * 21 // 2 + 10 * 11 // 2) * 12 * 64
    labels = 4 + 4
    assert flops(setting) == 30 * (4 * frozen + 6 * adapters) + labels * 4 * 64 * 50 + attended
