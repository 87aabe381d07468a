"""Configurations of flashsink's launchers as cases of the compile report.

Attention has too many to compile them all: every two values of its options occur together in some case (architecture,
head dim, heads of a group, dtype, causal or not, layout, options), and combinations that once spilled are kept. Shapes
are small, since nothing runs, but with the properties of real ones: sizes divisible by 16, unit last strides, tokens
before heads in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.compile_report import CAPABILITIES, Case
from flashsink.triton import activations, attention, decorrelation, norm, tiles
from flashsink.types import Layout, Pattern, Segments

FEATURES = (576, 2048, 3072, 4096)  # SmolLM2, Llama 3.2 1B and 3B, 3.1 8B
MATRIX = ("forward_kernel", "gradient_kv_kernel", "gradient_q_kernel", "received_kernel")
TOKENS, ROWS = 256, 2
LONG = 1024  # tokens of two sequences too long for the tiles of short ones
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# options of attention and their values
OPTIONS: dict[str, Sequence[Any]] = {
    "capability": CAPABILITIES,
    "dim": (32, 64, 72, 80, 96, 128, 192, 256),
    "group": (1, 2, 3, 4, 7, 8, 9),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "causal": (True, False),
    "packed": (True, False),
    "extras": ("", "counted", "window", "pattern", "mask", "values", "segments", "segments pattern"),
    "long": (True, False),
}
# that spilled before
KNOWN = [
    *({"capability": sm, "dim": 72, "group": 2, "causal": True, "packed": True} for sm in (80, 90, 100)),
    {"capability": 100, "dim": 128, "group": 3, "causal": False, "packed": False},
    {"capability": 80, "dim": 192, "group": 4, "causal": True, "packed": False},
]


def cases() -> Iterator[Case]:
    yield from attention_cases()
    for name, call in (("decorrelation", loss), ("norm", rms_norm), ("activations", statistics)):
        for features in FEATURES:
            yield hidden_case(name, call, features, torch.bfloat16, False, (80, 90, 100))
        yield hidden_case(name, call, 3072, torch.bfloat16, True, (89, 90))
        yield hidden_case(name, call, 3072, torch.float32, False, (90, 120))


def layout(packed: bool, tokens: int = TOKENS) -> Layout:
    if packed:
        starts = torch.arange(ROWS) * (tokens // ROWS)
        return Layout(starts, torch.full((ROWS,), tokens // ROWS), 1, tokens, True)
    return Layout(torch.zeros(ROWS, dtype=torch.long), torch.full((ROWS,), tokens), ROWS, tokens, False)


# ---- attention


def attention_cases() -> Iterator[Case]:
    for known in KNOWN:
        yield attention_case(**known, dtype=torch.bfloat16, extras="", long=True)
    for chosen in pairwise(OPTIONS, _exists):
        yield attention_case(**chosen)
    for dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (192, torch.float16), (128, torch.float32)):
        for extras in ("", "pattern", "mask"):
            yield calibrated_case(dim, dtype, extras)


def _exists(chosen: dict[str, Any]) -> bool:
    size = torch.empty(0, dtype=chosen["dtype"]).element_size() if "dtype" in chosen else 2
    return chosen.get("dim", 0) <= tiles.LARGEST_HEAD_DIM[size]


def pairwise(options: dict[str, Sequence[Any]], exists: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Combinations in which every pair of values of two options occurs that ``exists``, chosen greedily."""
    names = list(options)
    missing = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(options[a], options[b])
        if exists({a: x, b: y})
    }
    while missing:
        chosen = dict(next(iter(missing)))
        for name in names:
            if name in chosen:
                continue
            known = list(chosen.items())
            possible = [value for value in options[name] if exists({**chosen, name: value})]
            gains = [sum(_pair(names, one, (name, value)) in missing for one in known) for value in possible]
            chosen[name] = possible[gains.index(max(gains))]
        for one, other in itertools.combinations(chosen.items(), 2):
            missing.pop(_pair(names, one, other), None)
        yield chosen


def _pair(names: list[str], one: tuple[str, Any], other: tuple[str, Any]) -> Any:
    return (one, other) if names.index(one[0]) < names.index(other[0]) else (other, one)


def attention_case(
    capability: int, dim: int, group: int, dtype: torch.dtype, causal: bool, packed: bool, extras: str, long: bool
) -> Case:
    """Forward, statistics pass and backward with capture. ``extras``: counted: a sink logit, counted queries and no
    capture; window: and capped scores; pattern: all that a pattern has but a mask; mask: and capped scores; values: of
    a smaller head dim; segments: the statistics by them alone, also with the pattern. ``long`` sequences have other
    tiles."""
    parts = ["attention", f"D{dim}", f"GQA{group}", SHORT[dtype], "packed" if packed else "dense"]
    parts += [*(["full"] if not causal else []), *([extras] if extras else []), *(["long"] if long else [])]

    def call() -> None:
        where = layout(packed, LONG if long else TOKENS)
        q, k, v = projections(dim, dtype, where, group, dim // 24 * 16 if extras == "values" else dim)
        extra = seen(extras.removeprefix("segments "), where)
        if extras.startswith("segments"):
            where = where._replace(segment=where.segments()[0] if packed else None)  # no kernel makes it now
            kinds = Segments(torch.zeros(where.rows, where.tokens, dtype=torch.long), 6)
            attention.attention(q, k, v, where, causal=causal, scale=0.1, counted=[None], segments=kinds, **extra)
            return
        if extras == "counted":
            extra = {"sink_logits": torch.zeros(q.shape[1], requires_grad=True)}
        counted = [where.starts + 1 if extras == "counted" else None]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                asked = [] if extras == "counted" and grad else counted
                out, _ = attention.attention(q, k, v, where, causal=causal, scale=0.1, counted=asked, **extra)
            if grad:
                out.backward(torch.zeros_like(out))

    return Case(" ".join(parts), call, MATRIX if dtype != torch.float32 else (), (capability,))


def seen(extras: str, where: Layout) -> dict[str, Any]:
    """The options of attention that ``extras`` names."""
    if extras == "window":
        return {"pattern": Pattern(window=64), "softcap": 50.0}
    if extras == "pattern":
        blocks = torch.zeros(where.rows, where.tokens, dtype=torch.long)
        return {"pattern": Pattern(64, 100, where.lengths // 2, blocks), "softcap": 50.0}
    if extras == "mask":
        return {
            "pattern": Pattern(mask=torch.ones(where.rows, 1, where.tokens, where.tokens, dtype=torch.bool)),
            "softcap": 50.0,
        }
    return {}


def calibrated_case(dim: int, dtype: torch.dtype, extras: str) -> Case:
    def call() -> None:
        where = layout(False)
        q, k, v = (x.detach() for x in projections(dim, dtype, where, 4, dim))
        sinks = torch.zeros(q.shape[0], q.shape[1], TOKENS, dtype=torch.bool)
        attention.calibrated_attention(q, k, v, sinks, where, beta=0.4, scale=0.1, **seen(extras, where))

    return Case(f"calibrated attention D{dim} {SHORT[dtype]} {extras}".strip(), call, capabilities=(80, 90, 100, 120))


def projections(dim: int, dtype: torch.dtype, where: Layout, group: int, values: int) -> tuple[Tensor, ...]:
    """q, k (B, heads, S, D) and v (B, heads, S, values), laid out as a decoder's projections leave them."""
    shapes = ((2 * group, dim), (2, dim), (2, values))
    made = [torch.zeros(where.rows, where.tokens, heads, size, dtype=dtype) for heads, size in shapes]
    return tuple(x.transpose(1, 2).requires_grad_() for x in made)


# ---- hidden states


def hidden_case(
    name: str,
    call: Callable[[int, torch.dtype, Layout], None],
    features: int,
    dtype: torch.dtype,
    packed: bool,
    capabilities: tuple[int, ...],
) -> Case:
    label = f"{name} C{features} {SHORT[dtype]} {'packed' if packed else 'dense'}"
    return Case(label, lambda: call(features, dtype, layout(packed)), capabilities=capabilities)


def states(features: int, dtype: torch.dtype, where: Layout, layers: int) -> list[Tensor]:
    size = (where.rows, TOKENS, features)
    return [torch.zeros(size, dtype=dtype).requires_grad_() for _ in range(layers)]


def loss(features: int, dtype: torch.dtype, where: Layout) -> None:
    decorrelation.decorrelation_sums(states(features, dtype, where, 3), where.lengths, where, 0.0).sum().backward()


def rms_norm(features: int, dtype: torch.dtype, where: Layout) -> None:
    """With the loss and without it; weight frozen and not."""
    h = states(features, dtype, where, 1)[0]
    for trained, spans in ((False, where.lengths), (True, None)):
        weight = torch.ones(features, dtype=dtype, requires_grad=trained)
        normed = norm.rms_norm(h, weight, 1e-5, where, spans, 0.0)
        total = normed.out.sum() if normed.total is None else normed.out.sum() + normed.total
        total.backward()


def statistics(features: int, dtype: torch.dtype, where: Layout) -> None:
    activations.activation_stats(states(features, dtype, where, 3), where, False)
