"""What the tests of the kernels share: the backends as they are run here, and tables of problems for them."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass

import oracle
import pytest
import torch

import flashsink
from flashsink import dispatch
from flashsink.checks import resolve_layout
from flashsink.cpu import library as native
from flashsink.triton import tiles
from flashsink.triton.launch import INTERPRETED, Tile

ATTENTION_KERNELS = ("forward", "gradient_kv", "gradient_q", "received", "calibrate", "by_segment")
# in half precision P, dS and out, of which delta is made, are rounded, and the result: one step each
TOLERANCE = {torch.float32: 1e-5} | {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}

# ---- backends


@dataclass(frozen=True)
class Backend:
    """A backend with the kernels and on the device that a test runs it with.

    Attributes:
        name: as in flashsink.backends().
        dtype: what the tests compute in, unless they name another.
        level: of the C++ kernels' instructions: 0 baseline, 1 AVX2, None the best there is.
        shipped: Triton's attention with the tiles of its table; else they are so small that every loop runs.
    """

    name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    level: int | None = None
    shipped: bool = False

    def __str__(self):
        parts = [
            self.name,
            "shipped" if self.shipped else "",
            {0: "baseline", 1: "avx2"}.get(self.level, ""),
        ]
        if self.device != "cpu" or self.dtype != torch.float32:
            parts += [self.device, str(self.dtype).removeprefix("torch.")]
        return "-".join(part for part in parts if part)

    @property
    def module(self):
        """The functions that the public ones call: they take a Layout, and the norm is among them."""
        return dispatch.implementation(self.name, self.device)

    @property
    def interpreted(self):
        return self.name == "triton" and self.device == "cpu"

    def takes(self, dtype, features=8):
        """Whether attention of these runs here."""
        if self.name == "sdpa" and self.device != "cpu":
            return dtype in (torch.float16, torch.bfloat16) and features % 8 == 0
        return self.name != "triton" or (dtype != torch.float64 and features <= 128)

    @contextlib.contextmanager
    def active(self, monkeypatch, poison=True):
        """Inside, this is what runs. Triton's outputs come full of NaN, so that unwritten ones are seen."""
        with contextlib.ExitStack() as stack:
            if self.name == "triton":
                for kernel in () if self.shipped else ATTENTION_KERNELS:
                    stack.enter_context(tiles.override(kernel, Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)))
                for make in ("empty", "empty_like") if poison else ():
                    monkeypatch.setattr(torch, make, _filled(getattr(torch, make)))
            if self.level is not None:
                if native.library().flashsink_limit_isa(self.level) != self.level:
                    pytest.skip("this processor does not have these instructions")
                stack.callback(native.library().flashsink_limit_isa, 2)
            yield self


def _filled(make):
    def empty(*args, **kwargs):
        tensor = make(*args, **kwargs)
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -77)
        return tensor

    return empty


def _cpu(**options):
    """Without the library there is nothing to test, but where it is required."""
    built = native.available() == "usable" or os.environ.get("FLASHSINK_REQUIRE_NATIVE") == "1"
    return [Backend("cpu", **options)] if built else []


def _device(*backends):
    return [pytest.param(b, marks=pytest.mark.gpu, id=str(b)) for b in backends] if torch.cuda.is_available() else []


def _triton(**options):
    interpreted = [Backend("triton", **options)] if INTERPRETED else []
    return interpreted + _device(Backend("triton", "cuda", BF16, **options))


BF16 = torch.bfloat16
# beside the tables, for tests that compute in backend.dtype; on a GPU the tables have it
HALF = [Backend("triton", dtype=BF16)] if INTERPRETED else []
TRITON, SHIPPED = _triton(), _triton(shipped=True)
BACKENDS = [Backend("reference"), *_cpu(), *TRITON]
LEVELS = [*BACKENDS, *_cpu(level=1), *_cpu(level=0)]
KERNELS = LEVELS + _device(Backend("triton", "cuda"), Backend("sdpa", "cuda", BF16))


def on(backends):
    """Parametrises a test by some of the tables above; without it a test runs on BACKENDS."""
    return pytest.mark.parametrize("backend", backends, indirect=True, ids=str)


# ---- attention

# name: (B, H, Hk, Sq, Sk, D, layout)
ATTENTION = {
    "one token": (2, 4, 1, 1, 1, 16, {}),
    "17 tokens, GQA 3": (2, 3, 1, 17, 17, 16, {}),
    "33 tokens, two groups": (1, 4, 2, 33, 33, 80, {}),
    "odd D": (3, 2, 2, 17, 17, 7, {"lengths": [17, 5, 1]}),
    "right padding": (3, 3, 3, 33, 33, 16, {"lengths": [33, 18, 0]}),
    "left padding": (3, 4, 2, 33, 33, 16, {"starts": [0, 20, 33]}),
    "both": (3, 3, 1, 33, 33, 16, {"starts": [2, 5, 0], "lengths": [9, 28, 16]}),
    "one query": (3, 6, 2, 1, 37, 16, {"starts": [0, 20, 36]}),
    "queries at the end": (2, 4, 1, 17, 49, 16, {"starts": [0, 40]}),
    "queries in padding": (3, 4, 1, 17, 49, 16, {"lengths": [49, 36, 20]}),
    "packed": (1, 3, 1, 47, 47, 16, {"cu_seqlens": [0, 1, 17, 20, 31, 47]}),
    "packed with empty sequences and a tail": (1, 4, 2, 49, 49, 16, {"cu_seqlens": [0, 0, 18, 18, 31, 34, 34]}),
}
# of visible keys. prefix: share of a row's tokens; blocks: their number; mask: one for all rows, or one each
PATTERNS = {
    "window": {"window": 5},
    "own token": {"window": 1},
    "chunk": {"chunk": 7},
    "softcap": {"softcap": 1.5},
    "prefix": {"prefix": 0.6},
    "blocks": {"blocks": 3},
    "image": {"window": 4, "blocks": 1},
    "all": {"window": 9, "chunk": 12, "prefix": 0.3, "blocks": 5, "softcap": 2.0},
    "mask": {"mask": "one"},
    "mask of rows": {"mask": "rows", "softcap": 3.0},
}
# several blocks of the C++ kernels
LONG = {
    "150 tokens": (3, 6, 2, 150, 150, 5, {"starts": [0, 3, 149], "lengths": [150, 66, 1]}),
    "150 tokens, 101 queries": (3, 3, 1, 101, 150, 5, {"starts": [0, 150, 40], "lengths": [150, 0, 65]}),
    "150 tokens packed": (1, 4, 4, 150, 150, 5, {"cu_seqlens": [0, 1, 1, 64, 129, 146]}),
    "300 tokens": (2, 4, 2, 300, 300, 16, {"starts": [0, 131], "lengths": [299, 150]}),
    "264 features": (2, 4, 2, 8, 8, 264, {"lengths": [8, 5]}),
}


class Problem:
    """Random q, k, v for a case, their layout, and an upstream gradient; padding holds ``poison``."""

    def __init__(self, name, dtype=torch.float32, *, device="cpu", spread=1.0, poison=float("nan"), features=None):
        b, h, hk, queries, keys, d, layout = (ATTENTION | LONG)[name]
        dv = features or d  # of v
        g = torch.Generator().manual_seed(len(name))
        sizes = ((h, queries, d, spread), (hk, keys, d, spread), (hk, keys, dv, 1.0))
        tensors = [(torch.randn(b, heads, n, m, generator=g) * size).to(dtype) for heads, n, m, size in sizes]
        self.device = device
        self.upstream = torch.randn(b, h, queries, dv, generator=g).to(device)
        self.layout = {key: torch.tensor(value, device=device) for key, value in layout.items()}
        self.padding = torch.ones(b, keys, dtype=torch.bool)
        self.sizes = []  # of every row or sequence
        for row, sequences in enumerate(oracle.runs(b, keys, **layout)):
            for first, end in sequences:
                self.padding[row, first:end] = False
                self.sizes.append(end - first)
        self.silent = self.padding[:, keys - queries :]
        at = self.padding[:, None, :, None]
        self.qkv = [x.masked_fill(at[:, :, -x.shape[2] :], poison).to(device) for x in tensors]
        # the statistics of dense rows can be of the queries from a position on
        self.first = None if "cu_seqlens" in layout else torch.arange(b) + keys - queries // 2

    def pattern(self, name):
        """The options of attention that PATTERNS names."""
        g = torch.Generator().manual_seed(3)
        options = dict(PATTERNS[name])
        if "prefix" in options:
            options["prefix"] = torch.tensor([int(n * options["prefix"]) for n in self.sizes])
        if "blocks" in options:
            options["blocks"] = torch.randint(-2, options["blocks"], self.padding.shape, generator=g)
        if "mask" in options:  # some queries see nothing
            rows = len(self.padding) if options["mask"] == "rows" else 1
            shape = (rows, 1, self.silent.shape[1], self.padding.shape[1])
            options["mask"] = torch.rand(shape, generator=g) < torch.rand(shape[:3], generator=g)[..., None] - 0.3
        return {key: x.to(self.device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}

    def leaves(self, dtype=None):
        return [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in self.qkv]


def run(backend, problem, *, causal=True, sink_logits=None, counted=False, **options):
    """What flashsink gives: out, lse, queries, mean_received, received (found by the backward and, as ``early``,
    without it), and the gradients."""
    leaves = problem.leaves()
    options |= problem.layout | {"causal": causal, "backend": backend.name, "return_stats": True}
    if counted and problem.first is not None:
        options["query_starts"] = problem.first.to(backend.device)
    if sink_logits is not None:
        options["sink_logits"] = sink_logits.detach().clone().to(backend.device).requires_grad_()
    with torch.no_grad():
        early = flashsink.attention(*leaves, **options)[1].received
    out, stats = flashsink.attention(*leaves, **options)
    upstream = problem.upstream
    # the reference, which is also the cpu backend's in float64, multiplies where the kernels do not look
    if backend.name != "reference" and leaves[0].dtype != torch.float64:
        upstream = upstream.masked_fill(problem.silent[:, None, :, None].to(backend.device), float("nan"))
    wanted = [*leaves, options["sink_logits"]] if sink_logits is not None else leaves
    gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype))
    found = {"out": out.detach(), "lse": stats.lse, "received": stats.received, "early": early}
    found |= {"mean_received": stats.mean_received, "queries": stats.queries}
    return found | dict(zip(("dq", "dk", "dv", "dsink"), gradients, strict=False))


@functools.cache
def exact(
    name,
    causal=True,
    dtype=torch.float32,
    spread=1.0,
    scale=None,
    sink=None,
    counted=False,
    pattern=None,
    features=None,
):
    """What :func:`run` should give, by the oracle; ``pattern`` is a name of PATTERNS."""
    problem = Problem(name, dtype, spread=spread, features=features)
    options = {} if pattern is None else problem.pattern(pattern)
    leaves = problem.leaves(torch.float64)
    logits = None if sink is None else sink_logits(name, sink).double().requires_grad_()
    first = problem.first if counted else None
    want = oracle.Attention(
        *leaves, **problem.layout, causal=causal, scale=scale, query_starts=first, sink_logits=logits, **options
    )
    wanted = leaves if logits is None else [*leaves, logits]
    # all rows may be empty, and then there is no graph
    total = (want.out * problem.upstream).sum() + sum((x.nan_to_num() * 0.0).sum() for x in wanted)
    gradients = torch.autograd.grad(total, wanted)
    found = {"out": want.out.detach(), "lse": want.lse, "received": want.received, "early": want.received}
    found |= {"mean_received": want.mean_received, "queries": want.queries}
    return found | dict(zip(("dq", "dk", "dv", "dsink"), gradients, strict=False))


def sink_logits(name, size):
    """(H,) around ``size``."""
    return torch.linspace(-1.0, 1.0, (ATTENTION | LONG)[name][1]) + size


def compare(found, want, dtype, factor=1.0):
    """Statistics know no half precision: they are those of the rounded inputs."""
    assert torch.equal(found["queries"].cpu(), want["queries"])
    for name, got in found.items():
        if name == "queries":
            continue
        own = torch.float32 if name in ("lse", "received", "early", "mean_received") else dtype
        assert got.shape == want[name].shape, name
        assert got.dtype == own or name == "dsink", name
        tolerance = TOLERANCE[own] * factor
        torch.testing.assert_close(
            got.cpu().double(), want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- hidden states

# name: (tokens, starts, lengths, spans) or, packed, (tokens, cu_seqlens, spans)
STATES = {
    "one token": (1, [0, 0], [1, 0], [1, 0]),
    "right padding": (17, [0, 0, 0], [17, 9, 1], [17, 5, 1]),
    "starts": (17, [0, 4, 15, 17], [17, 9, 2, 0], [3, 9, 2, 0]),
    "long": (70, [0, 3], [70, 60], [70, 40]),  # more than one unit of work in C++
    "nothing counted": (5, [0, 1], [5, 4], [1, 0]),
    "packed": (95, [0, 1, 1, 80, 82, 90], [1, 0, 75, 2, 4]),
    "packed, empty sequences and a tail": (65, [0, 0, 17, 17, 40, 58, 58], [0, 17, 0, 2, 18, 0]),
    "packed crowd": (33, [0, *range(1, 29, 3), 31], [1, *[3] * 9, 2]),
    "packed, one token": (1, [0, 1], [1]),
}


class States:
    """A layout of hidden states with spans: as arguments of the public functions and as a Layout."""

    def __init__(self, name, device="cpu"):
        tokens, *where, spans = STATES[name]
        self.tokens, self.packed = tokens, name.startswith("packed")
        self.rows = 1 if self.packed else len(spans)
        self.spans = torch.tensor(spans, device=device)
        if self.packed:
            self.options = {"cu_seqlens": torch.tensor(where[0], device=device)}
        else:
            self.options = {"starts": torch.tensor(where[0], device=device)}
        self.valid_options = self.options if self.packed else self.options | {"lengths": torch.tensor(where[1])}
        layout = {key: value.to(device) for key, value in self.valid_options.items()}
        self.layout = resolve_layout(self.rows, tokens, torch.device(device), **layout)
        self.valid = torch.zeros(self.rows, tokens, dtype=torch.bool, device=device)
        self.outside = torch.ones_like(self.valid)  # not BOS, nor counted
        self.bos = []  # of every sequence with tokens: (row, its first, its end)
        sequences = oracle.runs(self.rows, tokens, **self.valid_options)
        flat = [(row, *bounds) for row, own in enumerate(sequences) for bounds in own]
        for (row, first, end), span in zip(flat, spans, strict=True):
            self.valid[row, first:end] = True
            if span > 1:
                self.outside[row, first : first + span] = False
            if end > first:
                self.bos.append((row, first, end))

    def states(self, features, dtype=torch.float32, seed=0):
        """(B, S, C); every third token leans to its BOS, so that a margin leaves some."""
        h = torch.randn(self.rows, self.tokens, features, generator=torch.Generator().manual_seed(seed))
        for row, first, end in self.bos:
            h[row, first + 2 : end : 3] += 2.0 * h[row, first]
        return h.to(dtype).to(self.spans.device)

    def where(self):
        """The layout as the oracle takes it."""
        return {key: value.cpu() for key, value in self.options.items()}


def relative(got, want):
    """Error in the norm."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
