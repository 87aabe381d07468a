"""Every tensor argument as a view: a column of a table, a piece of a larger tensor, permuted, expanded. Backends read
memory by address, so one that takes neighbouring entries for granted reads something else."""

from __future__ import annotations

import sys

import pytest
import torch

import flashsink
from flashsink.cpu import short as native_short
from flashsink.types import Layout

B, H, HK, S, D, C = 2, 4, 2, 5, 16, 12
KINDS = ("column", "piece", "expanded rows", "permuted", "expanded features", "turned round")


def view(x, kind):
    """Of x's shape, with other strides or offset and something else around it; expanded ones are not of its values."""
    junk = float("nan") if x.is_floating_point() else 1 if x.dtype == torch.bool else 10**6
    if kind == "column":
        room = torch.full((*x.shape, 3), junk, dtype=x.dtype)
        room[..., 1] = x
        return room[..., 1]
    if kind == "piece":
        return torch.full((x.numel() + 12,), junk, dtype=x.dtype)[5 : 5 + x.numel()].view(x.shape).copy_(x)
    if kind == "expanded rows" or x.dim() == 1:
        return x[:1].expand_as(x)
    if kind == "expanded features":
        return x[..., :1].expand_as(x)
    return x.mT.contiguous().mT if kind == "permuted" else x.transpose(0, -1).contiguous().transpose(0, -1)


def check(run, arguments, together):
    """``run(**arguments)``, a list of tensors, is the same for views of the arguments, one at a time or (where the
    interpreter is slow) all of them, and their contiguous copies."""
    for kind in KINDS:
        for names in [list(arguments)] if together else [[name] for name in arguments]:
            seen = {name: view(arguments[name], kind) for name in names}
            plain = {name: x.clone(memory_format=torch.contiguous_format) for name, x in seen.items()}
            got, want = (
                run(**{
                    n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in (arguments | own).items()
                })
                for own in (seen, plain)
            )  # fmt: skip
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, n=names, k=kind: f"{n} {k}: {m}"
            )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def column(*values):
    return torch.tensor([[x, 10**6] for x in values])[:, 0]


def gradients(outputs, upstreams, arguments):
    return list(torch.autograd.grad(outputs, [x for x in arguments.values() if x.requires_grad], upstreams))


DENSE = {"lengths": torch.tensor([3, 3]), "starts": torch.tensor([1, 1])}
BOUNDS = column(0, 2, 5)  # a view always: expanded bounds make no layout


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_attention(backend, layout):
    rows = 1 if layout == "packed" else B
    arguments = {name: normal(rows, heads, S, D, seed=seed) for seed, name, heads in ((0, "q", H), (1, "k", HK))}
    arguments |= {"v": normal(rows, HK, S, D), "sink_logits": normal(H), "up": normal(rows, H, S, D, seed=2)}
    arguments |= DENSE | {"query_starts": torch.tensor([2, 2])} if layout == "dense" else {}
    bounds = BOUNDS if layout == "packed" else None

    def run(up, **given):
        out, stats = flashsink.attention(**given, cu_seqlens=bounds, backend=backend, return_stats=True)
        with torch.no_grad():  # received by the pass, not by the backward
            early = flashsink.attention(**given, cu_seqlens=bounds, backend=backend, return_stats=True)[1]
        return [out, early.received, *gradients([out], [up], given), stats.received, stats.lse]

    check(run, arguments, backend == "triton")


def test_calibrated_attention(backend):
    arguments = {name: normal(B, heads, S, D, seed=heads) for name, heads in (("q", H), ("k", HK), ("v", HK))}
    arguments |= DENSE | {"sinks": normal(B, H, S) > 0.5}

    def run(**given):
        with torch.no_grad():
            return [flashsink.calibrated_attention(**given, backend=backend)]

    check(run, arguments, backend == "triton")


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_decorrelation_loss(backend, layout):
    arguments = {"hidden_states": normal(2, 1 if layout == "packed" else B, S, C), "spans": torch.tensor([2, 3])}
    where = {"starts": column(1, 1)} if layout == "dense" else {"cu_seqlens": BOUNDS}

    def run(**given):
        loss = flashsink.decorrelation_loss(**given, **where, backend=backend)
        return [loss, *gradients([loss], None, given)]

    check(run, arguments, backend == "triton")


def test_activation_stats(backend):
    def run(**given):
        stats = flashsink.activation_stats(**given, median=True, backend=backend)
        return [stats.max_abs, stats.feature, stats.median]

    check(run, {"hidden_states": normal(2, B, S, C)} | DENSE, backend == "triton")


@pytest.mark.parametrize("packed", [False, True])
def test_rms_norm(backend, packed):
    rows = 1 if packed else B
    layout = Layout(column(0, 2 if packed else 1), column(2, 3), rows, S, packed)
    norm = sys.modules["flashsink.backends"].implementation(backend, "cpu").rms_norm

    def run(up, total_up, spans, **given):
        out, total, max_abs, feature = norm(given["h"], given["weight"], 1e-5, layout, spans, 0.0)
        return [out, total, max_abs, feature, *gradients([out, total], [up, total_up[0]], given)]

    arguments = {"h": normal(rows, S, C), "weight": normal(C), "spans": torch.tensor([2, 3])}
    check(run, arguments | {"up": normal(rows, S, C, seed=1), "total_up": normal(2)}, backend == "triton")


def native():
    """name -> (operator, its arguments); what comes first feeds what follows."""
    ops, tail = torch.ops.flashsink, (False, True, 0.3)
    q, k, v, up = normal(B, H, S, D), normal(B, HK, S, D), normal(B, HK, S, D, seed=1), normal(B, H, S, D, seed=2)
    starts, lengths, first, spans, h = column(0, 1), column(4, 4), column(1, 2), column(2, 3), normal(B, S, C)
    out, lse = ops.attention(q, k, v, starts, lengths, *tail)
    _, *kept = ops.decorrelation_sums([h, h + 1], starts, spans, False, 0.0)
    normed = ops.rms_norm(h, normal(C), 1e-5, starts, lengths, spans, False, 0.0)[4:]
    return {
        "attention": (q, k, v, starts, lengths, *tail),
        "attention_backward": (up, q, k, v, out, lse, starts, lengths, *tail),
        "received": (q, k, lse, starts, lengths, first, *tail),
        "decorrelation_sums_backward": (normal(2), [h, h + 1], starts, spans, False, *kept),
        "rms_norm_backward": (normal(B, S, C, seed=3), normal(1)[0], h, normal(C), starts, spans, False, *normed, True),
    }


def kernels():
    """As :func:`native`; 160 features, so that what a key receives is counted by a pass of its own."""
    ops, tail = torch.ops.flashsink, (False, True, 0.3)
    starts, lengths, first, spans, h = column(0, 1), column(4, 4), column(1, 2), column(2, 3), normal(B, S, C)
    sink, capture = normal(H), torch.zeros(B, H, S)
    q, k, v, up = (normal(B, n, S, 160, seed=seed).half() for seed, n in enumerate((H, HK, HK, H)))
    out, lse = ops.triton_attention(q, k, v, sink, capture, starts, lengths, first, *tail)
    _, *kept = ops.triton_decorrelation_sums([h, h + 1], starts, spans, False, 0.0)
    normed = ops.triton_rms_norm(h, normal(C), starts, lengths, spans, False, 1e-5, 0.0)[4:]
    return {
        "triton_attention": (q, k, v, sink, capture, starts, lengths, first, *tail),
        "triton_attention_backward": (up, q, k, v, out, lse, sink, starts, lengths, first, *tail, True),
        "triton_received": (q, k, lse, starts, lengths, first, *tail),
        "triton_calibrate": (q, k, v, out, lse, normal(B, H, S) > 0.5, starts, lengths, 0.4, 0.3),
        "triton_decorrelation_sums_backward": (normal(2), [h, h + 1], starts, spans, False, *kept),
        "triton_rms_norm_backward": (normal(B, S, C, seed=3), normal(1)[0], h, normal(C), starts, spans, False)
        + (*normed, True),
    }


@pytest.mark.parametrize("short", [True, False])
def test_operators_called_directly(backend, monkeypatch, short):
    """As a compiler calls them, which may hand over other strides than it was given."""
    if backend == "reference" or (backend == "triton" and not short):
        pytest.skip("it has no operators, or only one way")
    if not short:
        monkeypatch.setattr(native_short, "serves", lambda *_: False)
    for name, arguments in (native() if backend == "cpu" else kernels()).items():
        names = [f"argument {n}" for n in range(len(arguments))]
        vary = {n: x for n, x in zip(names, arguments, strict=True) if isinstance(x, torch.Tensor) and x.dim() > 0}
        # what the library would trust it checks
        refused = {"rms_norm_backward": ("argument 2", "argument 3")}.get(name, ())

        def run(name=name, names=names, arguments=arguments, **given):
            with torch.no_grad():
                found = getattr(torch.ops.flashsink, name)(
                    *(given.get(n, x) for n, x in zip(names, arguments, strict=True))
                )
            return [found] if isinstance(found, torch.Tensor) else list(found)

        check(run, {n: x for n, x in vary.items() if n not in refused}, backend == "triton")
