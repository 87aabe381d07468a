"""Small problems that show whether the kernels of a backend compute what :mod:`flashsink.reference` defines.

Every problem is solved twice from the same rounded numbers: by the kernels, and by the reference in float64 on the
CPU, where no reduced precision of matrix products reaches it. Padding holds NaN. Dimensions: B rows, H query heads,
S tokens, D head dim, C features.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.types import Layout, Pattern, Segments

# of a result's error, relative to its own size and a twentieth of the largest one of its tensor; by the result's dtype
LIMITS = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

HEAD_DIMS, FEATURES = (64, 128), (2048, 3072)


class Kernel(NamedTuple):
    """What is checked at once: the kernels of a family for a dtype and a size, the head dim D or the features C."""

    family: str
    dtype: torch.dtype
    size: int

    def __str__(self) -> str:
        unit = f"head dim {self.size}" if self.family in ATTENTION else f"{self.size} features"
        return f"{self.family} of {str(self.dtype).removeprefix('torch.')}, {unit}"


class Rows(NamedTuple):
    """An attention layer whose queries are the last positions of the rows."""

    heads: int
    kv_heads: int
    queries: int
    tokens: int
    layout: dict[str, list[int]]
    causal: bool = True
    sink: bool = False
    pattern: str = ""

    def place(self, device: torch.device) -> Layout:
        options: dict[str, Any] = {name: torch.tensor(value, device=device) for name, value in self.layout.items()}
        rows = 1 if "cu_seqlens" in self.layout else len(self.layout["lengths"])
        return resolve_layout(rows, self.tokens, device, **options)


# several tiles of queries and of keys, the last of them in part
ROWS = {
    "padded rows": Rows(6, 2, 150, 150, {"starts": [0, 13], "lengths": [141, 137]}),
    "packed rows": Rows(6, 2, 150, 150, {"cu_seqlens": [0, 1, 1, 131, 143]}, sink=True),
    "rows without order": Rows(2, 2, 40, 150, {"lengths": [150, 97]}, causal=False),
}
PATTERNS = {
    "a window of capped scores": ROWS["padded rows"]._replace(pattern="window"),
    "a prefix and blocks": ROWS["packed rows"]._replace(pattern="blocks"),
    "a mask": ROWS["rows without order"]._replace(pattern="mask"),
}
STATES = {  # tokens, layout, spans
    "padded rows": (40, {"starts": [0, 5, 40], "lengths": [40, 30, 0]}, [31, 30, 0]),
    "packed rows": (70, {"cu_seqlens": [0, 1, 1, 50, 62]}, [1, 0, 40, 9]),
}

Place = Callable[[Tensor], Tensor]  # puts a tensor of the CPU where, and into the dtype in which, it is computed with
Problem = Callable[[Any, Place], dict[str, Tensor]]  # solved by (backend, place)


def kernels() -> Iterator[Kernel]:
    """Those that are checked by hand: of common sizes, in every dtype that kernels take, what is used most first."""
    for dtype, family in itertools.product((torch.bfloat16, torch.float16, torch.float32), FAMILIES):
        for size in HEAD_DIMS if family in ATTENTION else FEATURES:
            yield Kernel(family, dtype, size)


def wrong(run: Any, kernel: Kernel, device: torch.device) -> str:
    """What the kernels of the backend ``run`` compute wrongly on ``device``, or ""; an error that they raise counts.

    Raises:
        RuntimeError: the device has no memory left, or was lost before: this says nothing of the kernels.
    """
    _synchronize(device)
    for name, problem in FAMILIES[kernel.family](kernel):
        try:
            found = problem(run, lambda x: x.to(device))
            _synchronize(device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, a driver, or torch
            return f"{name}: it raises {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
        want = problem(reference, lambda x: x.double() if x.is_floating_point() else x)
        for result, got in found.items():
            off, limit = difference(got, want[result], kernel.size), LIMITS.get(got.dtype, 0.0)
            if not off <= limit:  # NaN is wrong too
                return f"{name}: {result} is off by {off:.2g} of its size, more than {limit:.2g}"
    return ""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(got: Tensor, want: Tensor, size: int) -> float:
    """The largest relative error of a vector of ``size`` numbers, or of a number in tensors of other widths."""
    got, want = got.detach().cpu(), want.detach()
    if got.shape != want.shape or not got.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    got, want = got.double(), want.double()
    if got.dim() in (2, 3) and got.shape[-1] != size:
        got, want = got[..., None], want[..., None]
    sizes, errors = want.norm(dim=-1), (got - want).norm(dim=-1)
    allowed = sizes + sizes.max() / 20
    return float(torch.where(errors == 0, 0.0, errors / allowed).max())


# ---- attention


class Inputs(NamedTuple):
    """q, k, v and the output's gradient (B, H, S, D) as views of what a decoder's projections leave, (B, S, H, D).
    Under a mask the last two have half the head dim."""

    leaves: list[Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    layout: Layout
    first: Tensor  # (B,) or, packed, (N,): where the queries begin that count in the statistics


def _inputs(rows: Rows, kernel: Kernel, place: Place, peak: float = 0.0) -> Inputs:
    """``peak``: makes the scores of the valid keys at position 20 about so large."""
    generator = torch.Generator().manual_seed(0)
    layout = rows.place(torch.device("cpu"))
    padding = ~layout.valid()[:, :, None, None]
    made = []
    values = max(1, kernel.size // 2) if rows.pattern == "mask" else kernel.size
    for heads, tokens, size in (
        *((rows.heads, rows.queries, kernel.size), (rows.kv_heads, rows.tokens, kernel.size)),
        *((rows.kv_heads, rows.tokens, values), (rows.heads, rows.queries, values)),
    ):
        made.append(torch.randn(layout.rows, tokens, heads, size, generator=generator))
    q, k, v, upstream = made
    q[..., 0] += peak * kernel.size**0.5
    k[:, 20, :, 0] += 1.0 if peak else 0.0
    hidden = rows.tokens - rows.queries
    poisoned = [x.masked_fill(padding[:, -x.shape[1] :], float("nan")) for x in (q, k, v)]
    leaves = [place(x.to(kernel.dtype)).requires_grad_() for x in poisoned]
    q, k, v, upstream = (x.transpose(1, 2) for x in (*leaves, place(upstream.to(kernel.dtype))))
    layout = rows.place(q.device)
    return Inputs(leaves, q, k, v, upstream, layout, (layout.starts + layout.lengths // 3).clamp(min=hidden + 2))


def _options(rows: Rows, layout: Layout) -> dict[str, Any]:
    """What attention is to see."""
    position = torch.arange(layout.tokens, device=layout.starts.device)
    if rows.pattern == "window":
        return {"pattern": Pattern(window=40), "softcap": 2.0}
    if rows.pattern == "blocks":
        blocks = (position // 10 % 4).expand(layout.rows, -1) - 1
        return {"pattern": Pattern(chunk=50, prefix=layout.lengths // 4, blocks=blocks)}
    if rows.pattern == "mask":
        mask = (position[-rows.queries :, None] + position) % 3 > 0
        return {"pattern": Pattern(mask=(mask & (position[-rows.queries :, None] % 7 > 0))[None, None])}
    return {}


def _attend(rows: Rows, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    inputs = _inputs(rows, kernel, place)
    logits = place(torch.linspace(-1.0, 2.0, rows.heads).to(kernel.dtype)).requires_grad_() if rows.sink else None
    out, (stats,) = run.attention(
        *(inputs.q, inputs.k, inputs.v, inputs.layout),
        **{"causal": rows.causal, "scale": kernel.size**-0.5, "counted": [inputs.first], "sink_logits": logits},
        **_options(rows, inputs.layout),
    )
    out.backward(inputs.upstream)  # not torch.autograd.grad: what the backward captures is the gradient of another leaf
    found = {"the output": out, "the log-sum-exp": stats.lse, "the attention received": stats.received}
    found |= {f"the gradient of {name}": x.grad for name, x in zip("qkv", inputs.leaves, strict=True)}
    return found if logits is None else found | {"the gradient of the sink logits": logits.grad}


def _receive(rows: Rows, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    """The statistics pass, where it can be called by itself over a right log-sum-exp."""
    inputs = _inputs(rows, kernel, place)
    options: dict[str, Any] = {"causal": rows.causal, "scale": kernel.size**-0.5}
    with torch.no_grad():
        if hasattr(run, "run_received"):
            q, k = (x.cpu().double() for x in (inputs.q, inputs.k))
            lse = reference.probabilities(q, k, rows.place(q.device), **options)[1].float()
            options |= {"query_starts": inputs.first}
            return {"the pass": run.run_received(inputs.q, inputs.k, place(lse), inputs.layout, **options)}
        stats = run.attention(inputs.q, inputs.k, inputs.v, inputs.layout, counted=[inputs.first], **options)[1]
        return {"the pass": stats[0].received}


def _passing(rows: Rows, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    inputs = _inputs(rows, kernel, place)
    with torch.no_grad():
        _, (stats,) = run.attention(
            *(inputs.q, inputs.k, inputs.v, inputs.layout),
            **{"causal": rows.causal, "scale": kernel.size**-0.5, "counted": [inputs.first]},
            **_options(rows, inputs.layout),
        )
    return {"the pass": stats.received}


def _share_out(rows: Rows, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    """The statistics by segment, of kinds that alternate; every fifth token has none."""
    inputs = _inputs(rows, kernel, place)
    layout, logits = inputs.layout, torch.linspace(-1.0, 2.0, rows.heads) if rows.sink else None
    position = torch.arange(layout.tokens, device=layout.starts.device)
    kinds = torch.where(position % 5 < 4, position // 7 % 3, -1).expand(layout.rows, -1)
    with torch.no_grad():
        _, (stats,) = run.attention(
            *(inputs.q, inputs.k, inputs.v, layout),
            **{"causal": rows.causal, "scale": kernel.size**-0.5, "counted": [inputs.first]},
            **{"sink_logits": None if logits is None else place(logits.to(kernel.dtype))},
            **{"segments": Segments(kinds.masked_fill(~layout.valid(), -1), 3)},
            **_options(rows, layout),
        )
    found = {"the attention received": stats.received, "the mass": stats.segment_mass, "the entropy": stats.entropy}
    return found | {"the attention by segment": stats.segment_received.flatten(1, 2)}


def _calibrate(case: tuple[float, Rows], kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    peak, rows = case
    inputs = _inputs(rows, kernel, place, peak)
    logits = place(torch.linspace(-1.0, 2.0, rows.heads).to(kernel.dtype)) if rows.sink else None
    sinks = torch.zeros(inputs.layout.rows, rows.heads, rows.tokens, dtype=torch.bool)
    sinks[:, :, 20] = sinks[:, 0, ::9] = True
    with torch.no_grad():
        out = run.calibrated_attention(
            *(inputs.q, inputs.k, inputs.v, place(sinks), inputs.layout),
            **{"beta": 0.4, "scale": kernel.size**-0.5, "causal": rows.causal, "sink_logits": logits},
            **_options(rows, inputs.layout),
        )
    return {"the output": out}


# ---- hidden states


def _states(kernel: Kernel, name: str, place: Place, layers: int, poison: bool) -> tuple[list[Tensor], Tensor, Layout]:
    """Layers (B, S, C) in which every third token leans to its BOS, the spans, and the layout."""
    tokens, where, spans = STATES[name]
    rows = 1 if "cu_seqlens" in where else len(spans)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {key: torch.tensor(value) for key, value in where.items()}
    layout = resolve_layout(rows, tokens, torch.device("cpu"), **options)
    made = []
    for _ in range(layers):
        h = torch.randn(rows, tokens, kernel.size, generator=generator)
        flat = h[0] if layout.packed else h
        for n, (start, length) in enumerate(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)):
            row = flat if layout.packed else flat[n]
            row[start + 2 : start + length : 3] += 2.0 * row[start : start + 1]
        h = h.masked_fill(~layout.valid()[..., None], float("nan")) if poison else h
        made.append(place(h.to(kernel.dtype)).requires_grad_())
    device = made[0].device
    return (
        made,
        torch.tensor(spans, device=device),
        layout.to(device),
    )


def _lose(name: str, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    layers, spans, layout = _states(kernel, name, place, 3, True)
    sums = run.decorrelation_sums(layers, spans, layout, 0.1)
    (sums * torch.arange(1, 4, device=sums.device)).sum().backward()
    return {"the sums": sums} | {f"the gradient of layer {i}": x.grad for i, x in enumerate(layers)}


def _normalize(name: str, loss: bool, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    (h,), spans, layout = _states(kernel, name, place, 1, False)
    learned = loss != layout.packed  # kernels with a gradient of the weight are others
    weight = place(torch.linspace(0.5, 1.5, kernel.size).to(kernel.dtype)).requires_grad_(learned)
    upstream = place(torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(kernel.dtype))
    normed = run.rms_norm(h, weight, 0.5, layout, spans if loss else None, 0.1)
    value = (normed.out * upstream).sum(dtype=torch.float64)
    (value + 3.0 * normed.total if loss else value).backward()
    found = {"the output": normed.out, "the gradient of h": h.grad}
    found |= {"the largest activation": normed.max_abs, "its feature": normed.feature}
    found |= {"the sum": normed.total[None]} if loss else {}
    return found | ({"the gradient of the weight": weight.grad} if learned else {})


def _measure(name: str, kernel: Kernel, run: Any, place: Place) -> dict[str, Tensor]:
    layers, _, layout = _states(kernel, name, place, 2, True)
    stats = run.activation_stats(layers, layout, False)
    return {"the largest activation": stats.max_abs, "its feature": stats.feature}


# ---- all of it

Problems = Callable[[Kernel], Iterator[tuple[str, Problem]]]


def _each(solve: Callable[..., dict[str, Tensor]], cases: dict[str, Any]) -> Problems:
    """A problem for every case, whose value ``solve`` takes first."""
    return lambda kernel: ((name, functools.partial(solve, case, kernel)) for name, case in cases.items())


def _patterns(kernel: Kernel) -> Iterator[tuple[str, Problem]]:
    """In training, by the statistics pass of a forward alone, and ACT."""
    for name, rows in PATTERNS.items():
        yield name, functools.partial(_attend, rows, kernel)
        yield f"{name}, forward", functools.partial(_passing, rows, kernel)
        if "cu_seqlens" not in rows.layout:
            yield f"{name}, ACT", functools.partial(_calibrate, (0.0, rows), kernel)


def _norms(kernel: Kernel) -> Iterator[tuple[str, Problem]]:
    for name, loss in itertools.product(STATES, (True, False)):
        yield f"{name}{'' if loss else ' without the loss'}", functools.partial(_normalize, name, loss, kernel)


_NAMES = {name: name for name in STATES}
ATTENTION: dict[str, Problems] = {
    "attention": _each(_attend, ROWS),
    "statistics": _each(_receive, ROWS),
    "ACT": _each(
        _calibrate,
        {
            "small sinks": (0.0, ROWS["padded rows"]),
            "large sinks": (6.0, ROWS["padded rows"]),
            "a sink logit": (0.0, ROWS["padded rows"]._replace(sink=True)),
        },
    ),
    "patterns": _patterns,
    "segments": _each(_share_out, ROWS | PATTERNS),
}
FAMILIES: dict[str, Problems] = ATTENTION | {
    "loss": _each(_lose, _NAMES),
    "norm": _norms,
    "activations": _each(_measure, _NAMES),
}
