"""The sdpa backend: layouts as adjacent sequences for a vendor's attention."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from cases import ATTENTION, Problem, compare, exact

import flashsink
from flashsink import reference, sdpa
from flashsink.checks import resolve_layout


def varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, causal, scale):
    """What a vendor computes from adjacent sequences: (out (T, H, D), lse (H, T)); causal ends at the last key."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
    assert bounds_q[0] == bounds_k[0] == 0 and bounds_q[-1] == len(q) and bounds_k[-1] == len(k)
    assert bounds_q.diff().min() >= 0 and bounds_q.diff().max() <= longest_q
    assert bounds_k.diff().min() >= 0 and bounds_k.diff().max() <= longest_k
    outs, lses = [], []
    pairs = zip(bounds_q.tolist(), bounds_q.tolist()[1:], bounds_k.tolist(), bounds_k.tolist()[1:], strict=False)
    for a, b, c, d in pairs:
        group = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        if causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", ATTENTION)
def test_every_layout_becomes_adjacent_sequences(monkeypatch, case, causal):
    monkeypatch.setitem(sdpa.VENDORS, "torch", varlen)
    problem = Problem(case)
    leaves, keys = problem.leaves(), problem.padding.shape[1]
    layout = resolve_layout(len(problem.padding), keys, torch.device("cpu"), **problem.layout)
    out, lse = sdpa.attend(*leaves, layout, causal, leaves[0].shape[-1] ** -0.5)
    gradients = torch.autograd.grad(out, leaves, problem.upstream)
    queries = exact(case, causal)["queries"]
    found = dict(
        zip(("out", "lse", "queries", "dq", "dk", "dv"), (out.detach(), lse, queries, *gradients), strict=True)
    )
    compare(found, exact(case, causal), torch.float32)


def test_other_vendors_are_called_as_they_want_it(monkeypatch):
    seen = []

    def two(q, k, v, bounds_q, bounds_k, n_q, n_k, *, softmax_scale, causal, return_attn_probs):
        seen.append("flash_attn")
        assert return_attn_probs
        return *varlen(q, k, v, bounds_q, bounds_k, n_q, n_k, causal, softmax_scale), None

    def four(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse):
        seen.append("flash_attn_4")
        assert return_lse
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=two))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_varlen_func=four))
    q = torch.randn(2, 2, 6, 8)
    layout = resolve_layout(2, 6, q.device, lengths=torch.tensor([6, 4]))
    want = reference.attention(q, q, q, layout, causal=True, scale=0.3)[0]
    for name in ("flash_attn", "flash_attn_4"):
        monkeypatch.setenv(sdpa.VENDOR_VARIABLE, name)
        torch.testing.assert_close(sdpa.attend(q, q, q, layout, True, 0.3)[0], want)
    assert seen == ["flash_attn", "flash_attn_4"]


def test_on_the_cpu_it_is_the_cpu_backend():
    if flashsink.backends()["cpu"] != "usable":
        pytest.skip(flashsink.backends()["cpu"])
    q = torch.randn(1, 2, 9, 8)
    results = [flashsink.attention(q, q, q, return_stats=True, backend=name) for name in ("sdpa", "cpu")]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1].received, results[1][1].received)


def test_what_vendors_do_not_take_is_named():
    half = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 4, 64))
    assert sdpa.refusal(half) == ""
    assert "float32" in sdpa.refusal(types.SimpleNamespace(**vars(half) | {"dtype": torch.float32}))
    assert "multiples of 8" in sdpa.refusal(types.SimpleNamespace(**vars(half) | {"shape": (1, 1, 4, 60)}))


def test_an_unknown_vendor_is_refused(monkeypatch):
    monkeypatch.setenv(sdpa.VENDOR_VARIABLE, "nobody")
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"FLASHSINK_VENDOR.*nobody"):
        sdpa.attend(q, q, q, resolve_layout(1, 4, q.device), True, 1.0)


def test_a_backend_named_by_the_table_falls_back_with_a_reason(caplog, monkeypatch):
    """On a CUDA device attention that triton refuses goes to sdpa, and what both refuse to the reference."""
    table = importlib.import_module("flashsink.dispatch")
    monkeypatch.setattr(table, "_state", lambda name: "usable")
    monkeypatch.setattr(table.verdicts, "MODE", "0")
    wide = types.SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float64, shape=(1, 1, 4, 64), element_size=lambda: 2
    )
    table._log_once.cache_clear()
    with caplog.at_level("INFO", logger="flashsink"):
        assert table.select(None, "cuda", wide) == "reference"
    assert "float64" in caplog.text and "triton" in caplog.text and "sdpa" in caplog.text
    wide.dtype = torch.bfloat16
    assert table.select(None, "cuda", wide) == "triton"
    monkeypatch.setattr(table, "_state", lambda name: "usable" if name != "triton" else "no")
    assert table.select(None, "cuda", wide) == "sdpa"
