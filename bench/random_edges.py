"""Problems at the edges, for bench.random_problems: values that are not finite, nothing at all, bad arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import oracle
import torch

import flashsink
from flashsink import dispatch
from flashsink.checks import resolve_layout

Arguments = dict[str, Any]


def normal(draw: random.Random, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randint(0, 10**6)))


def integers(draw: random.Random, x: torch.Tensor) -> torch.Tensor:
    """``x`` in some integer dtype that holds it."""
    kinds = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
    return x.to(draw.choice([kind for kind in kinds if torch.equal(x.to(kind).long(), x)]))


# ---- values that are not finite


def poisoned(draw: random.Random, backend: str, device: str) -> None:
    """NaN or -inf at a valid place of q, k, v or the sink logits. What depends on it is NaN where the oracle's is; the
    other rows and key heads, in Triton other packed sequences, are as they are without."""
    group, heads, d = draw.choice([1, 2, 3]), draw.randint(1, 2), draw.choice([5, 16, 33])
    sizes = [draw.randint(1, 30) for _ in range(draw.randint(1, 4))]
    packed = draw.random() < 0.5
    rows, tokens = (1, sum(sizes)) if packed else (len(sizes), max(sizes))
    where = {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0)} if packed else {"lengths": torch.tensor(sizes)}
    options = where | {"causal": draw.random() < 0.7, "scale": draw.choice([0.3, -0.3])}
    inputs = {name: normal(draw, rows, n, tokens, d) for name, n in (("q", group * heads), ("k", heads), ("v", heads))}
    sinks = {"sink_logits": normal(draw, group * heads)} if draw.random() < 0.3 else {}
    name, value = draw.choice([*inputs, *sinks]), draw.choice([float("nan"), float("-inf")])
    clean = {key: x.clone() for key, x in (inputs | sinks).items()}
    touched = torch.zeros(rows, group * heads, tokens, dtype=torch.bool)
    if name == "sink_logits":
        head = draw.randrange(group * heads)
        sinks[name][head] = value
        touched[:, head] = True
    else:
        n, head = draw.randrange(len(sizes)), draw.randrange(inputs[name].shape[1])
        first = sum(sizes[:n]) if packed else 0
        row = 0 if packed else n
        inputs[name][row, head, first + draw.randrange(sizes[n]), draw.randrange(d)] = value
        own = slice(head, head + 1) if name == "q" else slice(head * group, (head + 1) * group)
        touched[row, own, slice(first, first + sizes[n]) if packed and backend == "triton" else slice(None)] = True
    want = oracle.Attention(**inputs, **sinks, **options)
    plain = oracle.Attention(**clean, **options)
    given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in (inputs | sinks | options).items()}
    out, stats = flashsink.attention(**given, backend=backend, return_stats=True)
    for label, got, poison, calm in (
        ("out", out.cpu(), want.out, plain.out),
        ("lse", stats.lse.cpu(), want.lse, plain.lse),
        ("received", stats.received.cpu(), want.received, plain.received),
    ):
        assert not (got.isfinite() & poison.isnan()).any(), f"{label}: a number where the oracle has NaN ({name})"
        torch.testing.assert_close(
            got[~touched].double(), calm[~touched], rtol=2e-5, atol=2e-5, msg=f"{label}: touched"
        )
        fine = got.isfinite()
        torch.testing.assert_close(got[fine].double(), poison[fine], rtol=2e-5, atol=2e-5, msg=f"{label}: wrong")


def poisoned_states(draw: random.Random, backend: str, device: str) -> None:
    """NaN or -inf at a valid token of hidden states: the loss is NaN where it counts, the norm of that token alone is
    not finite, and the largest activations name it; gradients of other rows are as they are without."""
    rows, tokens, features = draw.randint(2, 3), draw.randint(2, 12), draw.randint(2, 33)
    lengths = torch.tensor([draw.randint(1, tokens) for _ in range(rows)])
    spans = torch.tensor([draw.randint(0, n) for n in lengths.tolist()])
    h, weight = normal(draw, rows, tokens, features), torch.linspace(0.5, 1.5, features)
    row, value = draw.randrange(rows), draw.choice([float("nan"), float("-inf")])
    token, feature = draw.randrange(int(lengths[row])), draw.randrange(features)
    clean, h[row, token, feature] = h.clone(), value
    layout = resolve_layout(rows, tokens, torch.device(device), lengths=lengths.to(device))
    module, found = dispatch.implementation(backend, device), []
    for states in (h, clean):
        leaf = states.to(device).requires_grad_()
        sums = module.decorrelation_sums([leaf], spans.to(device), layout, 0.1)
        normed = module.rms_norm(leaf, weight.to(device), 1e-5, layout, spans.to(device), 0.1)
        largest = module.activation_stats([leaf], layout, False)
        gradient = torch.autograd.grad(normed.out.nan_to_num().sum() + normed.total + sums[0], leaf)[0]
        found.append([x.detach().cpu() for x in (sums[0], *normed, largest.max_abs[0], largest.feature[0], gradient)])
    counts = token < int(spans[row]) and int(spans[row]) > 1
    for total, plain in zip(found[0][:3:2], found[1][:3:2], strict=True):
        assert bool(total.isnan()) == counts, "total"
        assert counts or torch.equal(total, plain), "total"
    own = torch.zeros(rows, tokens, dtype=torch.bool)
    own[row, token] = True
    (_, out, _, *_, gradient), (_, plain_out, _, *_, plain_gradient) = found
    assert torch.equal(out[~own], plain_out[~own]) and not out[own].isfinite().all(), "out"
    for top, index in (found[0][3:5], found[0][5:7]):
        assert torch.equal(top[~own], found[1][3][~own]) and not top[own].isfinite().any(), "max_abs"
        assert int(index[own]) == feature and torch.equal(index[~own], found[1][4][~own]), "feature"
    others = torch.arange(rows) != row
    assert torch.equal(gradient[others], plain_gradient[others]), "gradient"


# ---- nothing at all


def empty(draw: random.Random, backend: str, device: str) -> None:
    """No rows, no keys, no queries, no heads: results of the right shape, 0 where there are any, and gradients too."""
    without = draw.choice(["rows", "tokens", "queries", "heads", "valid"])
    rows, tokens, group, d = (
        (0 if without == "rows" else draw.randint(1, 3)),
        draw.randint(1, 20),
        2,
        draw.choice([3, 16]),
    )
    tokens = 0 if without == "tokens" else tokens
    queries = 0 if without in ("queries", "tokens") else tokens
    h = 0 if without == "heads" else group * 2
    q, k, v = (
        normal(draw, rows, n, s, d).to(device).requires_grad_() for n, s in ((h, queries), (2, tokens), (2, tokens))
    )
    lengths = torch.zeros(rows, dtype=torch.long, device=device) if without == "valid" else None
    options: Arguments = {"lengths": lengths, "causal": draw.random() < 0.5, "backend": backend}
    if draw.random() < 0.3:
        options["sink_logits"] = normal(draw, h).to(device)
    out, stats = flashsink.attention(q, k, v, **options, return_stats=True)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape and not out.any(), "out"
    assert stats.lse.shape == (rows, h, queries) and not stats.lse.any(), "lse"
    assert stats.received.shape == (rows, h, tokens) and not stats.received.any(), "received"
    assert stats.sink_rate().shape == (rows, tokens), "sink_rate"
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)] and not any(x.any() for x in gradients), "grads"
    with torch.no_grad():
        sinks = torch.ones(rows, h, tokens, dtype=torch.bool, device=device)
        assert flashsink.calibrated_attention(q, k, v, sinks, lengths=lengths, backend=backend).shape == q.shape
    features = draw.choice([1, 7, 16])
    hidden = normal(draw, 2, rows, tokens, features).to(device).requires_grad_()
    spans = torch.zeros(rows, dtype=torch.long, device=device)
    loss = flashsink.decorrelation_loss(hidden, spans, backend=backend)
    assert loss.shape == () and float(loss) == 0.0 and not torch.autograd.grad(loss, hidden)[0].any(), "loss"
    largest = flashsink.activation_stats(hidden, lengths=lengths, median=True, backend=backend)
    assert largest.max_abs.shape == largest.feature.shape == (2, rows, tokens), "max_abs"


# ---- bad arguments


def refusals(draw: random.Random, backend: str, device: str) -> None:
    """One argument is bad: ValueError that begins with its name, on every backend."""
    b, h, s, d = draw.randint(1, 3), 2 * draw.randint(1, 2), draw.randint(2, 9), draw.choice([4, 16])
    good: Arguments = {"q": normal(draw, b, h, s, d), "k": normal(draw, b, 2, s, d), "v": normal(draw, b, 2, s, d)}
    vectors = draw.choice([("lengths", 1), ("starts", 1), ("query_starts", 1)])
    name, value = draw.choice(
        [
            (vectors[0], torch.ones(b, dtype=torch.bool)),
            (vectors[0], torch.ones(b)),
            (vectors[0], torch.ones(b + 1, dtype=torch.long)),
            (vectors[0], torch.ones(b, 1, dtype=torch.long)),
            ("lengths", torch.full((b,), s + 1)),
            ("lengths", torch.full((b,), -1, dtype=torch.int8)),
            ("starts", torch.full((b,), s + 1, dtype=torch.uint8)),
            ("k", normal(draw, b, 2, s, d + 1)),
            ("k", normal(draw, b, 2, s, d).to(torch.float16)),
            ("k", normal(draw, b, 3, s, d)),
            ("v", normal(draw, b, 2, s + 1, d)),
            ("q", normal(draw, b, h, s + 1, d)),
            ("q", normal(draw, b, h, s, d).long()),
            ("q", normal(draw, b, h, s)),
            ("sink_logits", normal(draw, h + 1)),
            ("sink_logits", torch.ones(h, dtype=torch.long)),
            ("scale", float("nan")),
            ("scale", float("-inf")),
            ("softcap", 0.0),
            ("window", 0),
            ("backend", "other"),
        ]
    )
    named = "v" if name == "k" and getattr(value, "shape", (0, 2))[1] == 3 else name
    bad = {"backend": backend} | good | {name: value}
    bad = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in bad.items()}
    try:
        flashsink.attention(**bad)
    except ValueError as error:
        assert str(error).startswith(f"{named}: "), f"expected a refusal of {named}, got {error}"
    else:
        raise AssertionError(f"{name}={value}: not refused")


KINDS: dict[str, Callable[[random.Random, str, str], None]] = {
    "poisoned": poisoned,
    "poisoned states": poisoned_states,
    "empty": empty,
    "refusals": refusals,
}
