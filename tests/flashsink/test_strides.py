"""Every tensor argument, of the public functions and of the operators, as a view: a kernel that assumes adjacent
entries reads other memory. Our kernels give for views to the bit what they give for contiguous copies; torch's own
products and sums, of the reference and in parts of the cpu backend, choose other code by strides and alignment."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BACKENDS, Backend, on
from operands import HK, OPERATORS, B, C, D, H, S, column, normal, operators

import flashsink
from flashsink.types import Layout

pytestmark = pytest.mark.integration

HOST = [b for b in BACKENDS if isinstance(b, Backend)]  # the others are marked, and on a GPU
GENERAL = [b for b in HOST if b.name != "triton"]
KINDS = ("column", "piece", "step 2", "expanded rows", "permuted", "expanded features", "reversed")


def view(x, kind):
    """Of x's shape, with other strides or offset and something else around it; expanded ones are not of its values."""
    if isinstance(x, list):  # of layers, which need not be alike
        return [view(x[0], kind), *x[1:]]
    junk = float("nan") if x.is_floating_point() else 1 if x.dtype == torch.bool else 10**6
    if kind == "column":
        room = torch.full((*x.shape, 3), junk, dtype=x.dtype)
        room[..., 1] = x
        return room[..., 1]
    if kind == "piece":
        return torch.full((x.numel() + 12,), junk, dtype=x.dtype)[5 : 5 + x.numel()].view(x.shape).copy_(x)
    if kind == "step 2":
        place = max(x.dim() - 2, 0)
        room = torch.full([n * (2 if i == place else 1) for i, n in enumerate(x.shape)], junk, dtype=x.dtype)
        room = room.narrow(place, 1, 2 * x.shape[place] - 1)[(slice(None),) * place + (slice(None, None, 2),)]
        return room.copy_(x)
    if kind == "expanded rows" or x.dim() == 1:
        return x[:1].expand_as(x)
    if kind == "expanded features":
        return x[..., :1].expand_as(x)
    return x.mT.contiguous().mT if kind == "permuted" else x.transpose(0, -1).contiguous().transpose(0, -1)


def fresh(x, contiguous=False):
    """``x`` as a leaf, or a contiguous copy of it."""
    if isinstance(x, list):
        return [fresh(own, contiguous) for own in x]
    x = x.detach().clone(memory_format=torch.contiguous_format) if contiguous else x.detach()
    return x.requires_grad_() if x.is_floating_point() else x


def check_views(run, arguments, together, exact=False):
    """``run(**arguments)``, a list of tensors, is the same for views of the arguments, one at a time or (where the
    interpreter is slow) all of them, and their contiguous copies."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact or together else {"rtol": 1e-5, "atol": 2e-6}
    for kind in KINDS:
        for names in [list(arguments)] if together else [[name] for name in arguments]:
            seen = {name: view(arguments[name], kind) for name in names}
            got, want = (
                run(**{n: fresh(x) for n, x in arguments.items()} | {n: fresh(x, copied) for n, x in seen.items()})
                for copied in (False, True)
            )
            say = lambda m, n=names, k=kind: f"{n} {k}: {m}"  # noqa: E731
            torch.testing.assert_close(got, want, **tolerance, equal_nan=True, msg=say)


# ---- the public functions: name -> (arguments that become views, what they give)

DENSE = {"lengths": torch.tensor([3, 3]), "starts": torch.tensor([1, 1])}
BOUNDS = column(0, 2, 5)  # a view always: expanded bounds make no layout


def gradients(outputs, upstreams, arguments):
    return list(torch.autograd.grad(outputs, [x for x in arguments.values() if x.requires_grad], upstreams))


def attention(backend, packed=False, **more):
    rows = 1 if packed else B
    arguments = {name: normal(rows, heads, S, D, seed=seed) for seed, name, heads in ((0, "q", H), (1, "k", HK))}
    arguments |= {"v": normal(rows, HK, S, D), "sink_logits": normal(H), "up": normal(rows, H, S, D, seed=2)}
    arguments |= more if packed else DENSE | {"query_starts": torch.tensor([2, 2])} | more
    options = {"cu_seqlens": BOUNDS if packed else None, "backend": backend.name, "return_stats": True}

    def run(up, **given):
        out, stats = flashsink.attention(**given, **options)
        with torch.no_grad():  # received by the pass, not by the backward
            early = flashsink.attention(**given, **options)[1]
        return [out, early.received, *gradients([out], [up], given), stats.received, stats.lse, stats.mean_received]

    return arguments, run


def patterns(backend, packed=False):
    blocks = torch.tensor([[0, 1, 0, -1, 2]]).repeat(1 if packed else B, 1)
    return attention(backend, packed, blocks=blocks, prefix=torch.tensor([2, 2]))


def calibrated(backend):
    arguments = {name: normal(B, heads, S, D, seed=heads) for name, heads in (("q", H), ("k", HK), ("v", HK))}

    def run(**given):
        with torch.no_grad():
            return [flashsink.calibrated_attention(**given, backend=backend.name)]

    return arguments | DENSE | {"sinks": normal(B, H, S) > 0.5}, run


def loss(backend, packed=False, listed=False, **more):
    states = normal(2, 1 if packed else B, S, C)
    where = {"cu_seqlens": BOUNDS} if packed else {"starts": column(1, 1)}

    def run(**given):
        found = flashsink.decorrelation_loss(**given, **where, backend=backend.name)
        leaves = given["hidden_states"] if listed else [given["hidden_states"]]
        return [found, *torch.autograd.grad(found, leaves)]

    return {"hidden_states": list(states) if listed else states, "spans": torch.tensor([2, 2])} | more, run


def pairs(backend, packed=False):
    spans = torch.tensor([[False, True, True, False, True]]).repeat(1 if packed else B, 1)
    spans[:, 0] = packed
    return loss(backend, packed, spans=spans, anchors=torch.tensor([[2, 4, -1]]).repeat(len(spans), 1))


def constants(backend):
    return loss(backend, anchors=normal(2, 3, C, seed=5))


def statistics(backend):
    def run(**given):
        stats = flashsink.activation_stats(**given, median=True, backend=backend.name)
        return [stats.max_abs, stats.feature, stats.median]

    return {"hidden_states": normal(2, B, S, C)} | DENSE, run


def norm(backend, packed=False):
    rows = 1 if packed else B
    layout = Layout(column(0, 2 if packed else 1), column(2, 3), rows, S, packed)

    def run(up, total_up, spans, **given):
        out, total, max_abs, feature = backend.module.rms_norm(given["h"], given["weight"], 1e-5, layout, spans, 0.0)
        return [out, total, max_abs, feature, *gradients([out, total], [up, total_up[0]], given)]

    arguments = {"h": normal(rows, S, C), "weight": normal(C), "spans": torch.tensor([2, 2])}
    return arguments | {"up": normal(rows, S, C, seed=1), "total_up": normal(2)}, run


@on(HOST)
@pytest.mark.parametrize("make", [attention, loss, norm])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_functions(backend, make, packed):
    check_views(*make(backend, packed)[::-1], backend.name == "triton")


@on(HOST)
@pytest.mark.parametrize("make", [calibrated, statistics, functools.partial(loss, listed=True)])
def test_functions_of_dense_rows(backend, make):
    check_views(*make(backend)[::-1], backend.name == "triton")


@on(GENERAL)
@pytest.mark.parametrize("make", [patterns, pairs])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_functions_of_two_backends(backend, make, packed):
    check_views(*make(backend, packed)[::-1], False)


@on(GENERAL)
def test_anchors_that_are_constants(backend):
    check_views(*constants(backend)[::-1], False)


# ---- the operators, as a compiler calls them, which may hand over other strides than it was given


@on([b for b in OPERATORS if isinstance(b, Backend) and b.device == "cpu"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_operators(backend, packed):
    for name, arguments in operators(backend, packed).items():
        names = [f"argument {n}" for n in range(len(arguments))]
        tensors = (list, torch.Tensor)
        vary = {n: x for n, x in zip(names, arguments, strict=True) if isinstance(x, tensors) and getattr(x, "ndim", 1)}
        # what the library would trust it checks: the features of states, and weights
        refused = {
            "activation_max": ("argument 0",),
            "decorrelation_sums": ("argument 0",),
            "decorrelation_sums_backward": ("argument 1",),
            "rms_norm": ("argument 0", "argument 1"),
            "rms_norm_backward": ("argument 2", "argument 3"),
        }.get(name, ())

        def run(name=name, names=names, arguments=arguments, **given):
            with torch.no_grad():
                found = getattr(torch.ops.flashsink, name)(
                    *(given.get(n, x) for n, x in zip(names, arguments, strict=True))
                )
            return [found] if isinstance(found, torch.Tensor) else list(found)

        own = {n: x for n, x in vary.items() if n not in refused}
        check_views(run, own, backend.name == "triton", exact=name != "attention_backward")
        for argument in refused:
            with pytest.raises(ValueError, match="layer|weight|h:"):
                run(**{argument: view(vary[argument], "column")})
