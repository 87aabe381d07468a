"""Arguments for the operators, called directly."""

from __future__ import annotations

import functools

import torch
from cases import KERNELS, TRITON, Backend

from flashsink.triton.patterns import Operands, block_bounds
from flashsink.types import Layout

OPERATORS = [b for b in KERNELS if isinstance(b, Backend) and b.name == "cpu" and b.level is None] + TRITON
B, H, HK, S, D, C = 2, 4, 2, 5, 16, 12


def normal(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(device)


def column(*values):
    return torch.tensor([[x, 10**6] for x in values])[:, 0]


def layout_of(packed, device="cpu"):
    """(rows, starts, lengths, first counted queries, spans): vectors with a stride."""
    if packed:
        found = column(0, 2), column(2, 3), column(1, 3), column(2, 2)
    else:
        found = column(0, 1), column(4, 4), column(1, 2), column(2, 3)
    return (1 if packed else B, *(x.to(device) for x in found))


def native(packed=False, dtype=torch.float32, full=True):
    """name -> its arguments; what comes first feeds what follows. ``full``: attention with everything it takes."""
    ops, tail, (b, starts, lengths, _, spans) = torch.ops.flashsink, (packed, True, 0.3), layout_of(packed)
    q, k, v, up = normal(b, H, S, D), normal(b, HK, S, D), normal(b, HK, S, D, seed=1), normal(b, H, S, D, seed=2)
    wide, sink, blocks = normal(b, HK, S, 9), normal(H), torch.tensor([[0, 1, 0, -1, 2]]).expand(b, S)
    pattern = (starts, lengths, *tail, 2.0, 3, 4, spans, blocks, None)
    targets = torch.randint(-1, 3, (2, b, S), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    plain = (starts, lengths, *tail, *[None] * 6)
    h, weight, where = normal(b, S, C).to(dtype), normal(C).to(dtype), (starts, spans, packed)
    out = ops.attention(q, k, v, None, None, 0, False, *plain)[:2]
    capped = ops.attention(q, k, wide, sink, None, 0, False, *pattern)[:2]
    _, *kept = ops.decorrelation_sums([h, h + 1], *where, 0.0)
    normed = ops.rms_norm(h, weight, 1e-5, starts, lengths, spans, packed, 0.0)[4:]
    norm_up = (normal(b, S, C, seed=3).to(dtype), normal(1)[0])
    return {
        "attention": (q, k, wide, sink, targets, 3, True, *pattern)
        if full
        else (q, k, v, None, None, 0, False, *plain),
        "attention_backward": (
            (normal(b, H, S, 9), q, k, wide, sink, *capped, *pattern) if full else (up, q, k, v, None, *out, *plain)
        ),
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
    segments = ops.triton_segments(starts, lengths, S) if packed else None
    places = (starts, lengths, segments)
    more = Operands(mask=(torch.arange(S) % 3 < torch.arange(1, S + 1)[:, None]).expand(1, 1, S, S), softcap=2.0)
    if not packed:
        block_starts, block_ends = block_bounds(
            torch.tensor([[0, 1, 0, -1, 2]]).expand(b, S), Layout(starts, lengths, b, S, False)
        )
        more = Operands(3, 4, column(2, 4), block_starts, block_ends, softcap=2.0)
    tail = (*tail, *(x.to(device) if isinstance(x, torch.Tensor) else x for x in more))
    out, lse = ops.triton_attention(q, k, v, sink, capture, *places, first, *tail)
    _, *kept = ops.triton_decorrelation_sums([h, h + 1], *where, 0.0)
    normed = ops.triton_rms_norm(h, weight, starts, lengths, spans, packed, 1e-5, 0.0)[4:]
    norm_up = (draw(b, S, C, seed=3), draw(1)[0])
    found = {
        "triton_attention": (q, k, v, sink, capture, *places, first, *tail),
        "triton_attention_backward": (up, q, k, v, out, lse, sink, *places, first, *tail, True),
        "triton_received": (q, k, lse, *places, first, *tail),
        "triton_calibrate": (q, k, v, out, lse, sink, draw(b, H, S) > 0.5, starts, lengths, True, 0.4, *tail[2:]),
        "triton_activation_max": ([h, h + 1], starts, lengths, packed),
        "triton_decorrelation_sums": ([h, h + 1], *where, 0.1),
        "triton_decorrelation_sums_backward": (draw(2), [h, h + 1], *where, *kept),
        "triton_rms_norm": (h, weight, starts, lengths, spans, packed, 1e-5, 0.1),
        "triton_rms_norm_backward": (*norm_up, h, weight, starts, spans, packed, *normed, True),
    }
    if packed:
        del found["triton_calibrate"]
        found["triton_segments"] = (starts, lengths, S)
    return found


def operators(backend, packed=False, **options):
    if backend.name == "cpu":
        return native(packed, **options)
    return kernels(packed, device=backend.device, **options)


def leaves(arguments):
    """The arguments with a gradient asked for wherever there can be one."""
    learn = lambda x: x.detach().clone().requires_grad_() if getattr(x, "is_floating_point", bool)() else x  # noqa: E731
    return tuple([learn(y) for y in x] if isinstance(x, list) else learn(x) for x in arguments)
