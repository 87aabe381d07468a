"""``python -m bench.variants``: how often each Triton kernel would be compiled in a training of random batches.

The batches of one small model, packed or dense with padding, go through every operator; a launch is compiled anew
where Triton's launcher would derive another specialization. Nothing is compiled or run.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator

import torch

from bench.compile_report import Job, job_of
from flashsink.checks import resolve_layout
from flashsink.hf import encoded
from flashsink.triton import activations, attention, decorrelation, norm
from flashsink.triton.launch import Launch, observe
from flashsink.types import Layout

HEADS, KEY_HEADS, HEAD_DIM, FEATURES, LAYERS = 4, 2, 64, 128, 3
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, metavar="N")
    count = parser.parse_args().batches
    for kind in ("packed", "dense"):
        for kernel, compilations in sorted(variants(kind, count).items()):
            print(kind, kernel, compilations)


def variants(kind: str, batches: int) -> Counter[str]:
    """Compilations of every kernel for sm_90."""
    jobs: set[Job] = set()

    def note(launch: Launch) -> bool:
        jobs.add(job_of(launch, 90))
        return False

    draw = random.Random(0)
    with observe(note):
        for layout in layouts(draw, kind, batches):
            step(draw, layout)
    return Counter(job.kernel for job in jobs)


def layouts(draw: random.Random, kind: str, batches: int) -> Iterator[Layout]:
    """Of short and long rows, of one and many sequences, of odd sizes and multiples of 16."""
    for _ in range(batches):
        longest = draw.choice([16, 100, 700])
        sizes = [
            draw.choice([draw.randint(1, longest), 16]) for _ in range(draw.choice([1, 2, 16, draw.randint(1, 40)]))
        ]
        if kind == "packed":
            tokens, where = sum(sizes) + draw.choice([0, 0, 5]), {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0)}
            layout = resolve_layout(1, tokens, CPU, **where)
        else:
            layout = resolve_layout(len(sizes), max(sizes), CPU, lengths=torch.tensor(sizes))
        # vectors of their own, or the columns of a mask
        yield draw.choice([layout, encoded.decode(encoded.encode(layout), layout.rows, layout.tokens)[0]])


def step(draw: random.Random, layout: Layout) -> None:
    """Forward and backward of everything, and what runs without a gradient."""
    rows, tokens = layout.rows, layout.tokens
    q, k, v = (projection(draw, rows, tokens, heads) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    table = torch.zeros(HEADS + 1, dtype=torch.bfloat16)
    logits = draw.choice([table[:HEADS], table[1:]])  # aligned or not
    out, _ = attention.attention(q, k, v, layout, causal=True, scale=0.1, counted=[layout.starts], sink_logits=logits)
    up = torch.empty_like(out)
    out.backward(draw.choice([up, up[..., :1].expand_as(up)]))
    with torch.no_grad():
        attention.attention(q, k, v, layout, causal=True, scale=0.1, counted=[layout.starts], sink_logits=logits)
        if not layout.packed:
            sinks = torch.zeros(rows, HEADS, tokens, dtype=torch.bool)
            attention.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=0.1)
    states = torch.empty(LAYERS, rows, tokens, FEATURES, dtype=torch.bfloat16, requires_grad=True).unbind()
    sums = decorrelation.decorrelation_sums(states, layout.lengths, layout, 0.0)
    weight = torch.ones(FEATURES, dtype=torch.bfloat16, requires_grad=True)
    normed = [norm.rms_norm(h, weight, 1e-5, layout, layout.lengths, 0.0) for h in states]
    totals = torch.stack([x.total for x in normed if x.total is not None])  # their gradients are pieces of one
    (sums @ sums + totals @ totals + sum(x.out.sum() for x in normed)).backward()
    activations.activation_stats(states, layout, False)


def projection(draw: random.Random, rows: int, tokens: int, heads: int) -> torch.Tensor:
    """(B, heads, S, D), tokens or heads first in memory."""
    one, two = draw.choice([(tokens, heads), (heads, tokens)])
    x = torch.empty(rows, one, two, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True)
    return x.transpose(1, 2) if one == tokens else x


if __name__ == "__main__":
    main()
