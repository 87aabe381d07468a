"""The operators: schemas, fake kernels, torch.compile, second derivatives, and the arguments they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import TRITON, Backend, on
from operands import HK, OPERATORS, B, C, D, H, S, column, leaves, native, normal, operators
from torch.utils._python_dispatch import TorchDispatchMode

from flashsink.types import Layout

pytestmark = pytest.mark.integration

NATIVE = [b for b in OPERATORS if isinstance(b, Backend) and b.name == "cpu"]


@on(OPERATORS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, tracing, packed):
    """Values are compared elsewhere; here schemas, fake kernels, autograd and tracing."""
    options = (
        [{"dtype": torch.float32}, {"dtype": torch.bfloat16, "full": False}]
        if backend.name == "cpu"
        else [{"features": 16}]
    )
    for own in options:
        for name, arguments in operators(backend, packed, **own).items():
            given = arguments if name.endswith(("backward", "received", "calibrate", "max")) else leaves(arguments)
            torch.library.opcheck(getattr(torch.ops.flashsink, name).default, given)
            if name.endswith("rms_norm"):  # without the loss
                spans = 5 if backend.name == "cpu" else 4
                given = (*given[:spans], None, *given[spans + 1 :])
                torch.library.opcheck(getattr(torch.ops.flashsink, name).default, given)
            if name.endswith("rms_norm_backward"):  # with a frozen weight
                torch.library.opcheck(getattr(torch.ops.flashsink, name).default, (*given[:-1], False))


@on(OPERATORS)
def test_a_second_derivative_is_refused(backend):
    for name, arguments in operators(backend).items():
        if name.endswith(("backward", "received", "calibrate", "max")):
            continue
        given = leaves(arguments)
        found = getattr(torch.ops.flashsink, name)(*given)
        leaf = given[0][0] if isinstance(given[0], list) else given[0]
        (once,) = torch.autograd.grad(found[0].sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            once.sum().backward()


@on(NATIVE)
def test_only_what_is_asked_for_is_returned(backend):
    q, k, v, *rest = operators(backend)["attention"]
    v.requires_grad_()
    out, *others = torch.ops.flashsink.attention(q, k, v, *rest)
    assert len(others) == 3 and not any(x.requires_grad for x in others)
    assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape


class Fills(TorchDispatchMode):
    """The names of what fills a tensor inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like", "new_full"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@on(TRITON)
def test_unused_outputs_cost_no_fill(backend):
    """Autograd would make zeros for each: the norm has seven that no gradient reaches."""
    q, k, v = (normal(B, n, S, D).to(backend.device).requires_grad_() for n in (H, HK, HK))
    h, weight = (x.to(backend.device).requires_grad_() for x in (normal(B, S, C), normal(C)))
    layout = Layout(column(0, 1).to(backend.device), column(5, 4).to(backend.device), B, S, False)
    leaves = (q, k, v, h, weight)
    normed = backend.module.rms_norm(h, weight, 1e-5, layout, layout.lengths, 0.0)
    out, _ = backend.module.attention(q, k, v, layout, causal=True, scale=0.3, counted=[None])
    sums = backend.module.decorrelation_sums([h, 2.0 * h], layout.lengths, layout, 0.0)
    for outputs in ([out], [normed.out, normed.total], [normed.out], [sums]):
        ups = [torch.randn_like(x) for x in outputs]
        with Fills() as fills:
            torch.autograd.grad(outputs, leaves, ups, allow_unused=True, retain_graph=True)
        assert not fills.seen, fills.seen


def attend(backend, tokens):
    q, k, v = (normal(B, n, tokens, D).to(backend.device) for n in (H, HK, HK))
    layout = Layout(column(0, 1).to(backend.device), column(tokens, 2).to(backend.device), B, tokens, False)

    def run(q, k, v, layout):
        if backend.name == "cpu":  # the reference takes over in a graph, so the operator itself
            how = (layout.starts, layout.lengths, False, True, 0.3, *[None] * 6)
            return torch.ops.flashsink.attention(q * 2.0, k, v, None, None, 0, False, *how)[0]
        return backend.module.attention(q * 2.0, k, v, layout, causal=True, scale=0.3)[0]

    return run, (q, k, v), (layout,)


def decorrelate(backend, tokens):
    h = normal(B, tokens, C).to(backend.device)
    starts, lengths, spans = (x.to(backend.device) for x in (column(0, 1), column(tokens, 2), column(3, 2)))

    def run(h, weight, layout, spans):
        sums = backend.module.decorrelation_sums([2.0 * h, h], spans, layout, 0.1)
        normed = backend.module.rms_norm(h * 3.0, weight, 1e-3, layout, spans, 0.1)
        top = backend.module.activation_stats([h * 2.0], layout, False).max_abs
        return normed.out.square() + sums.square().sum() + normed.total + normed.max_abs.sum() + top.sum()

    return run, (h, normal(C).to(backend.device)), (Layout(starts, lengths, B, tokens, False), spans)


@on(OPERATORS)
@pytest.mark.parametrize("make", [attend, decorrelate])
def test_compiled_gives_the_same(backend, tracing, make):
    compiled = torch.compile(make(backend, 4)[0], fullgraph=True, backend="aot_eager")
    for tokens in (6, 9):  # of any size from the second on
        run, given, rest = make(backend, tokens)
        given = leaves(given)
        got, want = compiled(*given, *rest), run(*given, *rest)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), given) for x in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


# ---- what would be misread


def refused(match, name, arguments, **changes):
    """The C++ operator says so where an argument, by its place, is changed."""
    for place, values in changes.items():
        for bad in values:
            given = list(arguments)
            given[int(place[1:])] = bad
            with pytest.raises(ValueError, match=match):
                getattr(torch.ops.flashsink, name)(*given)


@on(NATIVE)
def test_the_operators_refuse_what_they_would_misread(backend):
    found = native()
    given = found["attention"]
    q, k, v, sink, targets, *_, starts, lengths = given[:9]
    prefix, blocks = given[15:17]
    refused("float32", "attention", given, a0=[q.double()], a2=[v.half()])
    refused("k:", "attention", given, a1=[k[:, :, :4], k[:, :, :, :8]])
    refused("v:", "attention", given, a2=[v[:, :1], v[:, :, :4]])
    refused("sink_logits", "attention", given, a3=[sink[:2], sink.double()])
    refused("targets", "attention", given, a4=[targets.long(), targets[:, :, 1:]], a5=[2])
    refused("starts|lengths", "attention", given, a7=[starts.int(), starts[:1]], a9=[True])
    refused("lengths", "attention", given, a8=[lengths.int(), lengths[None]])
    refused("prefix", "attention", given, a15=[prefix.int(), prefix[:1]])
    refused("blocks", "attention", given, a16=[blocks.int(), blocks[:, 1:]])
    refused("mask", "attention", given, a17=[torch.ones(B, S, S).bool(), torch.ones(B, 1, S, S)])
    refused("lse", "attention_backward", found["attention_backward"], a6=[found["attention_backward"][6][:, :1]])
    refused("out", "attention_backward", found["attention_backward"], a0=[q])
    [h, _], _, spans, *_ = found["decorrelation_sums"]
    refused("layer", "decorrelation_sums", found["decorrelation_sums"], a0=[[h.double()], [h.mT], [h[0]]])
    refused("layers", "decorrelation_sums", found["decorrelation_sums"], a0=[[h, h.bfloat16()]])
    refused("spans", "decorrelation_sums", found["decorrelation_sums"], a2=[spans.int(), spans[:1], spans[None]])
    refused("starts", "decorrelation_sums", found["decorrelation_sums"], a3=[True])
    weight = found["rms_norm"][1]
    refused("weight", "rms_norm", found["rms_norm"], a1=[weight[:8], weight.double(), torch.ones(2 * C)[::2]])
    refused("spans", "rms_norm", found["rms_norm"], a5=[spans[:1], spans.int()])
    # out of range is cut, never read
    far = (torch.tensor([-5, 99]), torch.tensor([400, 9]))
    assert all(x.isfinite().all() for x in torch.ops.flashsink.attention(*given[:7], *far, *given[9:]))
    assert torch.ops.flashsink.decorrelation_sums([h], *far, False, 0.0)[0].isfinite().all()
