"""The operators: every tensor argument as a view (a kernel that assumes adjacent entries reads other memory), schemas,
fake kernels, torch.compile, second derivatives, and the arguments they refuse."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BACKENDS, KERNELS, TRITON, Backend, on
from torch.utils._python_dispatch import TorchDispatchMode

import flashsink
from flashsink.types import Layout

pytestmark = pytest.mark.integration

OPERATORS = [b for b in KERNELS if isinstance(b, Backend) and b.name == "cpu" and b.level is None] + TRITON
HOST = [b for b in BACKENDS if isinstance(b, Backend)]  # the others are marked, and on a GPU
NATIVE = [b for b in OPERATORS if isinstance(b, Backend) and b.name == "cpu"]

B, H, HK, S, D, C = 2, 4, 2, 5, 16, 12
KINDS = ("column", "piece", "expanded rows", "permuted", "expanded features", "reversed")


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


def check_views(run, arguments, together):
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


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(device)


def column(*values):
    return torch.tensor([[x, 10**6] for x in values])[:, 0]


def gradients(outputs, upstreams, arguments):
    return list(torch.autograd.grad(outputs, [x for x in arguments.values() if x.requires_grad], upstreams))


DENSE = {"lengths": torch.tensor([3, 3]), "starts": torch.tensor([1, 1])}
BOUNDS = column(0, 2, 5)  # a view always: expanded bounds make no layout


@on(HOST)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_attention(backend, layout):
    rows = 1 if layout == "packed" else B
    arguments = {name: normal(rows, heads, S, D, seed=seed) for seed, name, heads in ((0, "q", H), (1, "k", HK))}
    arguments |= {"v": normal(rows, HK, S, D), "sink_logits": normal(H), "up": normal(rows, H, S, D, seed=2)}
    arguments |= DENSE | {"query_starts": torch.tensor([2, 2])} if layout == "dense" else {}
    bounds = BOUNDS if layout == "packed" else None

    def run(up, **given):
        out, stats = flashsink.attention(**given, cu_seqlens=bounds, backend=backend.name, return_stats=True)
        with torch.no_grad():  # received by the pass, not by the backward
            early = flashsink.attention(**given, cu_seqlens=bounds, backend=backend.name, return_stats=True)[1]
        return [out, early.received, *gradients([out], [up], given), stats.received, stats.lse]

    check_views(run, arguments, backend.name == "triton")


@on(HOST)
def test_calibrated_attention(backend):
    arguments = {name: normal(B, heads, S, D, seed=heads) for name, heads in (("q", H), ("k", HK), ("v", HK))}
    arguments |= DENSE | {"sinks": normal(B, H, S) > 0.5}

    def run(**given):
        with torch.no_grad():
            return [flashsink.calibrated_attention(**given, backend=backend.name)]

    check_views(run, arguments, backend.name == "triton")


@on(HOST)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_decorrelation_loss(backend, layout):
    arguments = {"hidden_states": normal(2, 1 if layout == "packed" else B, S, C), "spans": torch.tensor([2, 3])}
    where = {"starts": column(1, 1)} if layout == "dense" else {"cu_seqlens": BOUNDS}

    def run(**given):
        loss = flashsink.decorrelation_loss(**given, **where, backend=backend.name)
        return [loss, *gradients([loss], None, given)]

    check_views(run, arguments, backend.name == "triton")


@on(HOST)
def test_activation_stats(backend):
    def run(**given):
        stats = flashsink.activation_stats(**given, median=True, backend=backend.name)
        return [stats.max_abs, stats.feature, stats.median]

    check_views(run, {"hidden_states": normal(2, B, S, C)} | DENSE, backend.name == "triton")


@on(HOST)
@pytest.mark.parametrize("packed", [False, True])
def test_rms_norm(backend, packed):
    rows = 1 if packed else B
    layout = Layout(column(0, 2 if packed else 1), column(2, 3), rows, S, packed)

    def run(up, total_up, spans, **given):
        out, total, max_abs, feature = backend.module.rms_norm(given["h"], given["weight"], 1e-5, layout, spans, 0.0)
        return [out, total, max_abs, feature, *gradients([out, total], [up, total_up[0]], given)]

    arguments = {"h": normal(rows, S, C), "weight": normal(C), "spans": torch.tensor([2, 2])}
    up = {"up": normal(rows, S, C, seed=1), "total_up": normal(2)}
    check_views(run, arguments | up, backend.name == "triton")


# ---- called directly


def layout_of(packed, device="cpu"):
    """(rows, starts, lengths, first counted queries, spans): vectors with a stride."""
    if packed:
        found = column(0, 2), column(2, 3), column(1, 3), column(2, 2)
    else:
        found = column(0, 1), column(4, 4), column(1, 2), column(2, 3)
    return (1 if packed else B, *(x.to(device) for x in found))


def native(packed=False, dtype=torch.float32):
    """name -> (operator, its arguments); what comes first feeds what follows."""
    ops, tail, (b, starts, lengths, first, spans) = torch.ops.flashsink, (packed, True, 0.3), layout_of(packed)
    q, k, v, up = normal(b, H, S, D), normal(b, HK, S, D), normal(b, HK, S, D, seed=1), normal(b, H, S, D, seed=2)
    wide, sink, blocks = normal(b, HK, S, 9), normal(H), torch.tensor([[0, 1, 0, -1, 2]]).expand(b, S)
    pattern = (starts, lengths, *tail, 2.0, 3, 4, spans, blocks, None)
    tiled = ops.tiled_attention(q, k, wide, sink, None, *pattern)[:2]
    h, weight, where = normal(b, S, C).to(dtype), normal(C).to(dtype), (starts, spans, packed)
    out, lse = ops.attention(q, k, v, starts, lengths, *tail)
    _, *kept = ops.decorrelation_sums([h, h + 1], *where, 0.0)
    normed = ops.rms_norm(h, weight, 1e-5, starts, lengths, spans, packed, 0.0)[4:]
    norm_up = (normal(b, S, C, seed=3).to(dtype), normal(1)[0])
    return {
        "attention": (q, k, v, starts, lengths, *tail),
        "attention_backward": (up, q, k, v, out, lse, starts, lengths, *tail),
        "received": (q, k, lse, starts, lengths, first, *tail),
        "tiled_attention": (q, k, wide, sink, torch.stack([first, starts]), *pattern),
        "tiled_attention_backward": (normal(b, H, S, 9), q, k, wide, sink, *tiled, *pattern),
        "activation_max": (h, starts, lengths, packed),
        "decorrelation_sums": ([h, h + 1], *where, 0.1),
        "decorrelation_sums_backward": (normal(2), [h, h + 1], *where, *kept),
        "rms_norm": (h, weight, 1e-5, starts, lengths, spans, packed, 0.1),
        "rms_norm_backward": (*norm_up, h, weight, starts, spans, packed, *normed, True),
    }


def kernels(packed=False, features=160, device="cpu"):
    """As :func:`native`; with 160 features what a key receives is counted by a pass of its own."""

    draw = functools.partial(normal, device=device)
    ops, tail, (b, starts, lengths, first, spans) = torch.ops.flashsink, (packed, True, 0.3), layout_of(packed, device)
    h, weight, where = draw(b, S, C), draw(C), (starts, spans, packed)
    sink, capture = draw(H), torch.zeros(b, H, S, device=device)
    q, k, v, up = (draw(b, n, S, features, seed=seed).half() for seed, n in enumerate((H, HK, HK, H)))
    out, lse = ops.triton_attention(q, k, v, sink, capture, starts, lengths, first, *tail)
    _, *kept = ops.triton_decorrelation_sums([h, h + 1], *where, 0.0)
    normed = ops.triton_rms_norm(h, weight, starts, lengths, spans, packed, 1e-5, 0.0)[4:]
    norm_up = (draw(b, S, C, seed=3), draw(1)[0])
    found = {
        "triton_attention": (q, k, v, sink, capture, starts, lengths, first, *tail),
        "triton_attention_backward": (up, q, k, v, out, lse, sink, starts, lengths, first, *tail, True),
        "triton_received": (q, k, lse, starts, lengths, first, *tail),
        "triton_calibrate": (q, k, v, out, lse, draw(b, H, S) > 0.5, starts, lengths, 0.4, 0.3),
        "triton_activation_max": ([h, h + 1], starts, lengths, packed),
        "triton_decorrelation_sums": ([h, h + 1], *where, 0.1),
        "triton_decorrelation_sums_backward": (draw(2), [h, h + 1], *where, *kept),
        "triton_rms_norm": (h, weight, starts, lengths, spans, packed, 1e-5, 0.1),
        "triton_rms_norm_backward": (*norm_up, h, weight, starts, spans, packed, *normed, True),
    }
    if packed:
        del found["triton_calibrate"]
    return found


def operators(backend, packed=False, **options):
    if backend.name == "cpu":
        return native(packed, **options)
    return kernels(packed, device=backend.device, **options)


def leaves(arguments):
    """The arguments with a gradient asked for wherever there can be one."""
    learn = lambda x: x.detach().clone().requires_grad_() if getattr(x, "is_floating_point", bool)() else x  # noqa: E731
    return tuple([learn(y) for y in x] if isinstance(x, list) else learn(x) for x in arguments)


@on([b for b in OPERATORS if isinstance(b, Backend) and b.device == "cpu"])
def test_views_of_their_arguments(backend):
    """As a compiler calls them, which may hand over other strides than it was given."""
    for name, arguments in operators(backend).items():
        if name.removeprefix("triton_") in ("decorrelation_sums", "rms_norm", "activation_max"):
            continue  # called with views above; the library refuses some
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

        check_views(run, {n: x for n, x in vary.items() if n not in refused}, backend.name == "triton")


@on(OPERATORS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, tracing, packed):
    """Values are compared elsewhere; here schemas, fake kernels, autograd and tracing."""
    options = [{"dtype": torch.float32}, {"dtype": torch.bfloat16}] if backend.name == "cpu" else [{"features": 16}]
    for own in options:
        for name, arguments in operators(backend, packed, **own).items():
            if backend.tiles and not name.startswith(("attention", "received")):
                continue  # the same
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
    out, lse = torch.ops.flashsink.attention(q, k, v, *rest)
    assert not lse.requires_grad
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
            return torch.ops.flashsink.attention(q * 2.0, k, v, layout.starts, layout.lengths, False, True, 0.3)[0]
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


@on([b for b in OPERATORS if getattr(b, "tiles", False) is False])
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
    q, k, lse, starts, lengths, *_ = found["received"]
    refused("lse", "received", found["received"], a2=[lse.double()])
    refused("k:", "received", found["received"], a1=[k[:, :, :4]])
    one = (q, k, lse, starts[:1], lengths[:1], *found["received"][5:])
    refused("starts", "received", one, a5=[None])
    refused("lengths", "received", found["received"], a4=[lengths.int()])
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
    assert torch.ops.flashsink.received(q, k, lse, *far, None, False, True, 0.3).isfinite().all()
    assert torch.ops.flashsink.decorrelation_sums([h], *far, False, 0.0)[0].isfinite().all()
