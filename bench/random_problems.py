"""``python -m bench.random_problems``: random attention, decorrelation and norm problems in float32, float16 and
bfloat16 against the float64 oracle of the tests, on the Triton kernels (a GPU, else the interpreter) and on the cpu
backend.

Progress is kept in a JSON-lines file: a second start continues after the last problem that passed. The exit status is
1 where a problem fails; its seed is printed, and ``--seed`` with it runs that problem alone first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

import flashsink
from bench.runner.ledger import ROOT
from flashsink import dispatch
from flashsink.checks import resolve_layout
from flashsink.triton import tiles
from flashsink.triton.launch import INTERPRETED, Tile

sys.path.insert(0, str(ROOT / "tests" / "flashsink"))

import bf16_interpreter
import oracle

from bench.random_edges import KINDS as EDGES
from bench.random_edges import integers, normal

if INTERPRETED:
    bf16_interpreter.install()

Tensors = dict[str, torch.Tensor]
Check = Callable[[random.Random, str, str], None]  # (draws, backend, device); raises AssertionError
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY = 20  # problems between two notes of progress
INTEGERS = ("lengths", "starts", "cu_seqlens", "query_starts", "prefix", "blocks")
ATTENTION_KERNELS = ("forward", "gradient_kv", "gradient_q", "received", "calibrate")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000, metavar="N", help="problems of each kind in all")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first problem; the next has S + 1"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "random_problems.jsonl", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    done = finished(options.out, options.seed)
    print(f"{done} of {options.problems} problems are done; backends: {', '.join(name for name, _ in backends())}")
    for index in range(done, options.problems):
        seed = options.seed + index
        for kind, check in KINDS.items():
            for name, device in backends():
                try:
                    check(random.Random(f"{kind} {seed}"), name, device)
                except Exception as error:  # whatever a kernel does with it
                    note(options.out, seed=options.seed, done=index, failed=seed, kind=kind, backend=name)
                    print(f"seed {seed}: {kind} on {name} ({device}): {type(error).__name__}: {error}")
                    return 1
        if (index + 1) % EVERY == 0 or index + 1 == options.problems:
            note(options.out, seed=options.seed, done=index + 1)
            print(f"{index + 1} of {options.problems}", flush=True)
    return 0


def backends() -> list[tuple[str, str]]:
    """(name, device) of those that are put to the test here."""
    state = flashsink.backends()
    found = [("reference", "cpu"), *([("cpu", "cpu")] if state["cpu"] == "usable" else [])]
    if state["triton"] == "usable":
        found.append(("triton", "cpu" if INTERPRETED else "cuda"))
    return found


def finished(path: Path, seed: int) -> int:
    """How many problems of the run that began with ``seed`` have passed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a run that was killed
            entries.append(json.loads(line))
    return max((int(entry["done"]) for entry in entries if entry["seed"] == seed), default=0)


def note(path: Path, **entry: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_text(encoding="utf-8").endswith("\n")  # by a kill
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(entry) + "\n")


# ---- attention


def attention(draw: random.Random, backend: str, device: str) -> None:
    """Out, statistics (found by the backward and by a pass of their own) and gradients; padding holds NaN."""
    group, heads, d = draw.choice([1, 2, 3, 4]), draw.randint(1, 2), draw.choice([1, 7, 16, 32, 40, 64, 80])
    if draw.random() < 0.5:
        sizes = [draw.randint(0, 40) for _ in range(draw.randint(1, 5))]
        keys = queries = max(sum(sizes) + draw.randint(0, 20), 1)
        rows, layout = 1, {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0)}
    else:
        rows, keys = draw.randint(1, 3), draw.randint(1, 70)
        queries = draw.choice([keys, draw.randint(1, keys)])
        layout = _dense(draw, rows, keys)
    q, k, v = (normal(draw, rows, h, n, d) for h, n in ((group * heads, queries), (heads, keys), (heads, keys)))
    size, dtype = draw.choice([1.0, 1.0, 1.0, 8.0, 25.0]), draw.choice(DTYPES)  # size 25: scores of ten thousand
    q, k = q * size, k * size
    options: dict[str, Any] = {"causal": draw.random() < 0.5, "scale": draw.choice([0.4, 0.4, 0.4, -0.4, 0.0, 1e-6])}
    if "starts" in layout and draw.random() < 0.5:
        options["query_starts"] = layout["starts"] + draw.randint(-2, 40)
    if draw.random() < 0.25:
        options["sink_logits"] = normal(draw, group * heads)
    if backend in ("reference", "cpu") and draw.random() < 0.5:  # the others refuse them
        v = normal(draw, rows, heads, keys, draw.choice([d, 9]))
        options |= _pattern(draw, rows, keys, layout)
    valid = _valid(rows, keys, layout)[:, None, :, None]
    upstream = normal(draw, *q.shape[:3], v.shape[3]).to(dtype)
    inputs = [x.to(dtype).masked_fill(~valid[:, :, keys - x.shape[2] :], float("nan")) for x in (q, k, v)]
    with _tiles(draw):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in (layout | options).items()}
        given |= {n: integers(draw, x) for n, x in given.items() if isinstance(x, torch.Tensor) and n in INTEGERS}
        with torch.no_grad():
            early = flashsink.attention(*leaves, **given, backend=backend, return_stats=True)[1].received
        out, stats = flashsink.attention(*leaves, **given, backend=backend, return_stats=True)
        gradients = torch.autograd.grad(out, leaves, upstream.to(device))
    exact = [x.double().requires_grad_() for x in inputs]
    want = oracle.Attention(*exact, **layout, **options)
    total = (want.out * upstream).sum() + sum((x.nan_to_num() * 0.0).sum() for x in exact)
    wanted = [want.out, *torch.autograd.grad(total, exact)]
    error = 2e-5 * max(1.0, _reach(exact, options["scale"]) / 10.0)
    for name, got in {"lse": stats.lse, "received": stats.received, "pass": early}.items():
        expected = want.lse if name == "lse" else want.received
        _close(name, got, expected, error * (1.0 + expected.abs()))
    steps = _steps(want.probs, exact, upstream, abs(options["scale"]))
    share = _eps(dtype) + (error if size > 1.0 else 0.0)
    for name, got, expected, own in zip(("out", "dq", "dk", "dv"), (out, *gradients), wanted, steps, strict=True):
        _close(name, got, expected, error * (1.0 + expected.abs()) + share * own)


def _reach(exact: list[torch.Tensor], scale: float) -> float:
    """The largest sum that a score may be what is left of: float32 knows it, and so a probability, to some digits."""
    q, k, _ = (x.detach().nan_to_num(0.0).abs() for x in exact)
    return abs(scale) * float((q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).max())


def _eps(dtype: torch.dtype) -> float:
    """What rounding to half precision adds to the error of float32."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps


@torch.no_grad()
def _steps(probs: torch.Tensor, exact: list[torch.Tensor], upstream: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """How many eps out, dq, dk and dv may be off where P, dS and results are rounded to nearest, half an eps each.

    With M = P |v| |dO| >= |delta|, the error of delta is at most eps M (P's and out's rounding), that of dS then
    eps P (3/2 M + 1/2 |dO| |v|), and dQ's own rounding is at most eps / 2 scale P (M + |dO| |v|) |k|.
    """
    q, k, v = (x.nan_to_num(0.0).abs() for x in exact)
    do = upstream.double().abs()
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = probs @ v
    ds = scale * probs * (2.0 * (out * do).sum(-1, keepdim=True) + do @ v.mT)
    of_keys = [(x.mT @ y).unflatten(1, (heads, group)).sum(2) for x, y in ((ds, q), (probs, do))]
    return [out, ds @ k, *of_keys]


def _pattern(draw: random.Random, rows: int, keys: int, layout: Tensors) -> dict[str, Any]:
    """Some of the arguments that say which keys a query sees, and a cap on the scores."""
    sequences = [end - first for row in oracle.runs(rows, keys, **layout) for first, end in row]
    every = {
        "window": draw.randint(1, 40),
        "chunk": draw.randint(1, 40),
        "softcap": draw.choice([0.5, 3.0]),
        "prefix": torch.tensor([draw.randint(0, n) for n in sequences]),
        "blocks": torch.tensor([[draw.randint(-2, 4) for _ in range(keys)] for _ in range(rows)]),
    }
    return {name: value for name, value in every.items() if draw.random() < 0.4}


@contextlib.contextmanager
def _tiles(draw: random.Random) -> Iterator[None]:
    """Small tiles for the Triton kernels."""
    with contextlib.ExitStack() as stack:
        for kernel in ATTENTION_KERNELS:
            blocks = {"BLOCK_M": draw.choice([16, 32]), "BLOCK_N": draw.choice([16, 32])}
            stack.enter_context(tiles.override(kernel, Tile(blocks, 4, 1)))
        yield


# ---- hidden states


def states(draw: random.Random, backend: str, device: str) -> None:
    """The decorrelation loss of two layers, the norm with it, and the largest activations."""
    if draw.random() < 0.5:
        sizes = [draw.randint(0, 6) for _ in range(draw.randint(1, 6))]
        rows, tokens = 1, max(sum(sizes) + draw.randint(0, 4), 1)
        layout = {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0)}
    else:
        rows, tokens = draw.randint(1, 3), draw.randint(1, 19)
        layout = _dense(draw, rows, tokens)
        sizes = layout["lengths"].tolist()
    spans = torch.tensor([draw.randint(0, n) for n in sizes])
    margin, features = draw.choice([0.0, 0.3]), draw.randint(2, 33)
    h = normal(draw, rows, tokens, features) + draw.choice([0.0, 1.0])  # directions at random, or all alike
    dtype = draw.choice(DTYPES)
    h = h.to(dtype).masked_fill(~_valid(rows, tokens, layout)[..., None], 7.0)
    weight = torch.linspace(0.5, 1.5, features, dtype=draw.choice([torch.float32, dtype]))

    module = dispatch.implementation(backend, device)
    where = resolve_layout(rows, tokens, torch.device(device), **{n: x.to(device) for n, x in layout.items()})
    leaf, scale = h.to(device).requires_grad_(), weight.to(device).requires_grad_()
    sums = module.decorrelation_sums([leaf, 2.0 * leaf], spans.to(device), where, margin)
    normed = module.rms_norm(leaf, scale, 1e-5, where, spans.to(device), margin)
    upstream = (16.0 * normal(draw, *h.shape)).round() / 16.0  # exact in half precision
    value = (normed.out * upstream.to(device)).sum() + 3.0 * normed.total
    gradients = [*torch.autograd.grad(sums[0] + 3.0 * sums[1], leaf), *torch.autograd.grad(value, (leaf, scale))]

    exact, exact_scale = h.double().requires_grad_(), weight.double().requires_grad_()
    count = int((spans - 1).clamp(min=0).sum())
    ranges = {n: x for n, x in layout.items() if n != "lengths"}
    mean = oracle.decorrelation([exact], spans.tolist(), margin=margin, **ranges)
    given = {n: integers(draw, x).to(device) for n, x in (ranges | {"spans": spans}).items()}
    loss = flashsink.decorrelation_loss([leaf, 2.0 * leaf], **given, margin=margin, backend=backend)
    _close("loss", loss, mean, 5e-5 * mean.abs() + 1e-7)
    total = mean * count
    out = oracle.rms_norm(exact, exact_scale, 1e-5)
    wanted = [torch.autograd.grad(4.0 * total, exact, retain_graph=True)[0]]
    wanted += torch.autograd.grad((out * upstream).sum() + 3.0 * total, (exact, exact_scale))
    names = ("sums", "out", "total", "gradient of the sums", "dh", "dweight")
    found = (sums.sum(), normed.out, normed.total, *gradients)
    # what dweight adds up cancels: each normalized number of it was rounded
    terms = (upstream * out / exact_scale).abs().sum((0, 1))
    for name, got, expected in zip(names, found, (2.0 * total, out, total, *wanted), strict=True):
        size = expected.abs().max()
        allowed = 5e-5 * (expected.abs() + size) + 1e-9
        if name not in ("sums", "total"):  # those are float32
            allowed = allowed + 2.0 * _eps(dtype) * (terms if name == "dweight" else size)
        _close(name, got, expected, allowed)
    stats = module.activation_stats([leaf], where, False)
    top = torch.where(where.valid().cpu(), h.float().abs().amax(-1), 0.0)
    for got in (normed.max_abs, stats.max_abs[0]):
        assert torch.equal(got.cpu(), top), "max_abs"
    assert torch.equal(normed.feature, stats.feature[0]), "feature"


def _dense(draw: random.Random, rows: int, tokens: int) -> Tensors:
    starts = [draw.randint(0, tokens) for _ in range(rows)]
    return {"starts": torch.tensor(starts), "lengths": torch.tensor([draw.randint(0, tokens - s) for s in starts])}


def _valid(rows: int, tokens: int, layout: Tensors) -> torch.Tensor:
    """(rows, tokens) bool."""
    valid = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, sequences in enumerate(oracle.runs(rows, tokens, **layout)):
        for first, end in sequences:
            valid[row, first:end] = True
    return valid


def _close(name: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> None:
    """``allowed`` is the error of each number."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, not {tuple(want.shape)}"
    share = (got.detach().cpu().double() - want.detach()).abs() / allowed.detach()
    assert (share <= 1.0).all(), f"{name}: off by {share.max():.1f} times what is allowed"


KINDS: dict[str, Check] = {"attention": attention, "states": states, **EDGES}

if __name__ == "__main__":
    sys.exit(main())
