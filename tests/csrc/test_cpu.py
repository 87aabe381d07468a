"""The cpu backend: what it computes is the reference's, and by which way."""

from __future__ import annotations

import importlib

import pytest
import torch

import flashsink
from flashsink import reference
from flashsink.cpu import backend as cpu
from flashsink.types import Layout

backends = importlib.import_module("flashsink.dispatch")  # the package's attribute is the function

pytestmark = pytest.mark.usefixtures("library")


def rows(starts, lengths, tokens):
    return Layout(torch.tensor(starts), torch.tensor(lengths), len(starts), tokens, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "starts", "lengths"),
    [
        (300, [0, 0], [300, 300]),
        (300, [0, 0], [300, 17]),
        (300, [0, 131], [299, 150]),
        (200, [0, 131], [300, 169]),
        (1, [0, 131], [300, 169]),
        (1, [0, 0], [300, 300]),
    ],
)
def test_attention_over_several_tiles(queries, starts, lengths, dtype):
    layout = rows(starts, lengths, 300)
    counted = layout.starts + 40
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, n, 16, generator=g).to(dtype) for h, n in ((4, queries), (2, 300), (2, 300)))
    results = []
    for module in (cpu, reference):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, stats = module.attention(*leaves, layout, causal=True, scale=0.3, counted=[None, counted])
        out.float().square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
        results[-1] += [x for s in stats for x in (s.received, s.mean_received, s.lse)]
        seen = reference.visible(layout, queries, True)[:, 0] & (layout.offsets() >= 40)[:, 300 - queries :, None]
        assert torch.equal(stats[1].queries, seen.sum(1))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_attention_uses_torchs_kernel_where_it_is_documented_to(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the reference ran")

    q = torch.randn(1, 2, 6, 8)
    layout = rows([0], [6], 6)
    packed = Layout(torch.tensor([0]), torch.tensor([6]), 1, 6, True)
    logits, sinks = torch.zeros(2), torch.ones(1, 2, 6, dtype=torch.bool)
    for name in ("attention", "calibrated_attention", "probabilities", "visible"):
        monkeypatch.setattr(reference, name, refuse)
    for where, causal in ((layout, True), (layout, False), (packed, True), (packed, False)):
        cpu.attention(q, q, q, where, causal=causal, scale=1.0, counted=[None], sink_logits=logits)
    cpu.calibrated_attention(q, q, q, sinks, layout, beta=0.4, scale=1.0)
    learned = q.clone().requires_grad_()
    for x, options in ((q.double(), {}), (learned, {"sink_logits": logits}), (q[:, :, :0], {})):
        with pytest.raises(AssertionError, match="the reference ran"):
            cpu.attention(x, q, q, layout, causal=True, scale=1.0, **options)
    for x in (q.double(), learned):
        with pytest.raises(AssertionError, match="the reference ran"):
            cpu.calibrated_attention(x, x, x, sinks, layout, beta=0.4, scale=1.0)


LAYOUTS = {
    "full": rows([0, 0], [90, 90], 90),
    "right": rows([0, 0], [90, 17], 90),
    "left": rows([0, 61], [90, 29], 90),
    "both": rows([3, 61], [80, 20], 90),
    "no tokens": rows([0, 90], [0, 0], 90),
    "packed": Layout(torch.tensor([0, 1, 1, 70]), torch.tensor([1, 0, 69, 15]), 1, 90, True),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [90, 40, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_references(layout, queries, causal):
    layout = LAYOUTS[layout]
    if layout.packed and queries < 90:
        return  # not a layout there is
    g = torch.Generator().manual_seed(4)
    b = layout.rows
    q, k, v = (torch.randn(b, h, n, 8, generator=g) for h, n in ((6, queries), (2, 90), (2, 90)))
    padding = ~layout.valid()[:, None, :, None]
    poisoned = [x.masked_fill(padding[:, :, 90 - x.shape[2] :], float("nan")) for x in (q, k, v)]
    counted = [None, layout.starts + 7]
    weight = torch.randn(b, 6, queries, 8, generator=g)
    results = []
    for module, inputs in ((cpu, poisoned), (reference, (q, k, v))):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, stats = module.attention(*leaves, layout, causal=causal, scale=0.5, counted=counted)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
        results[-1] += [x for s in stats for x in (s.received, s.queries.float(), s.lse)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sink_logits_are_the_references(layout, learning):
    layout = LAYOUTS[layout]
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(layout.rows, h, 90, 8, generator=g) for h in (6, 2, 2))
    logits = torch.linspace(-20.0, 20.0, 6).requires_grad_(learning)
    results = []
    for module in (cpu, reference):
        out, stats = module.attention(q, k, v, layout, causal=True, scale=0.5, counted=[None], sink_logits=logits)
        results.append([out.detach(), stats[0].received, stats[0].lse])
        assert out.requires_grad == learning
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("queries", [90, 40, 1])
@pytest.mark.parametrize("gap", [0.0, 3.0, 12.0])
def test_calibration_where_nearly_all_mass_is_on_sinks(queries, gap):
    layout = LAYOUTS["both"]
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((6, queries), (2, 90), (2, 90)))
    sinks = torch.rand(2, 6, 90, generator=g) < 0.1
    q[..., 0], k[..., 0] = 8**0.5, 0.0
    k[:, :, 70, 0], sinks[:, ::2, 70] = gap, True
    got = cpu.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=8**-0.5)
    want = reference.calibrated_attention(*(x.double() for x in (q, k, v)), sinks, layout, beta=0.4, scale=8**-0.5)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


def test_the_default_on_cpu_tensors_is_native(monkeypatch):
    called = []
    monkeypatch.setattr(cpu, "decorrelation_sums", lambda *a: called.append("loss") or reference.decorrelation_sums(*a))
    monkeypatch.setattr(cpu, "activation_stats", lambda *a: called.append("stats") or reference.activation_stats(*a))
    hidden = torch.randn(2, 1, 5, 8)
    flashsink.decorrelation_loss(hidden, torch.tensor([5]))
    flashsink.activation_stats(hidden)
    assert called == ["loss", "stats"]
    called.clear()
    flashsink.decorrelation_loss(hidden, torch.tensor([5]), backend="reference")
    assert called == []
    with pytest.raises(ValueError, match="backend.*'cpu'"):
        backends.select("cpu", "cuda")
