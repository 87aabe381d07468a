"""Attention problems and everyone who can solve them, as steps to be timed.

Inputs lie as a decoder's projections leave them, (B, S, H, D), and each provider gets the view that it wants. Every
training step is a forward and the gradients of q, k and v for the same random gradient of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import flashsink
from bench.harness import Absent, Provider, Step
from bench.shapes import Model


@dataclass(frozen=True)
class Problem:
    """One attention layer. ``lengths`` makes it a packed row; else ``rows`` rows of ``tokens``, all of them full, or
    padded on the right behind ``valid`` tokens (which only ours know of)."""

    model: Model
    rows: int
    tokens: int
    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...] | None = None
    valid: tuple[int, ...] | None = None

    @property
    def shape(self) -> str:
        model = self.model
        heads = f"{model.name} H{model.heads}/{model.kv_heads} D{model.dim}"
        if self.lengths is None:
            padded = "" if self.valid is None else f" padded to {min(self.valid)}.."
            return f"{heads} B{self.rows} S{self.tokens}{padded}"
        return f"{heads} packed {self.tokens}, {len(self.lengths)} x {min(self.lengths)}..{max(self.lengths)}"

    def bounds(self) -> Tensor:
        """(N + 1,) int32 cu_seqlens."""
        assert self.lengths is not None
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return ends.to(device=self.device, dtype=torch.int32)

    def layout(self) -> dict[str, Tensor]:
        """How flashsink is told of it."""
        if self.lengths is not None:
            return {"cu_seqlens": self.bounds()}
        return {} if self.valid is None else {"lengths": torch.tensor(self.valid, device=self.device)}

    def tensors(self, grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient, (B, S, H or Hk, D)."""
        generator = torch.Generator(self.device).manual_seed(0)
        made = []
        for heads in (self.model.heads, self.model.kv_heads, self.model.kv_heads, self.model.heads):
            size = (self.rows, self.tokens, heads, self.model.dim)
            made.append(torch.randn(size, generator=generator, device=self.device, dtype=self.dtype))
        return tuple(x.requires_grad_(grad and i < 3) for i, x in enumerate(made))  # type: ignore[return-value]


def provider(
    name: str, problem: Problem, run: Callable[..., Any], backward: bool = True, ours: bool = False
) -> Provider:
    """``run(q, k, v)`` on (B, S, heads, D) gives the output, or (output, what is called after the backward)."""

    def make() -> Step:
        q, k, v, gradient = problem.tensors(backward)

        def step() -> object:
            with torch.set_grad_enabled(backward):
                result = run(q, k, v)
            out, after = result if isinstance(result, tuple) else (result, None)
            if backward:
                # not autograd.grad with inputs: what is captured leaves the backward as another leaf's gradient
                out.backward(gradient)
            gradients = q.grad, k.grad, v.grad
            # nothing of this step may be freed in the next one, whose peak would then seem lower
            q.grad = k.grad = v.grad = None
            return out, *gradients, None if after is None else after()

        return step

    return Provider(name, make, ours)


def ours(problem: Problem, backend: str, statistics: str = "", backward: bool = True, ours: bool = True) -> Provider:
    """flashsink. ``statistics``: "" for none, "captured" to read them after the backward, "pass" before it."""
    state = flashsink.backends().get(backend, "unknown")
    options: dict[str, Any] = {"backend": backend, **problem.layout()}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if state != "usable":
            raise Absent(state)
        views = (x.transpose(1, 2) for x in (q, k, v))
        if not statistics:
            return flashsink.attention(*views, **options).transpose(1, 2)
        out, stats = flashsink.attention(*views, return_stats=True, **options)
        if statistics == "pass":
            read = stats.received
            return out.transpose(1, 2), lambda: read
        return out.transpose(1, 2), lambda: stats.received

    how = {"": "without statistics", "captured": "with statistics", "pass": "with statistics by the pass"}
    return provider(f"flashsink {backend} {how[statistics]}", problem, run, backward, ours)


def usable(*names: str) -> list[str]:
    """Those of our backends that can run here."""
    state = flashsink.backends()
    return [name for name in names if state.get(name) == "usable"]


def sdpa(problem: Problem, backend: str | None, backward: bool = True) -> Provider:
    """torch's scaled_dot_product_attention with one named backend (FLASH_ATTENTION, CUDNN_ATTENTION,
    EFFICIENT_ATTENTION, MATH), or its own choice. Dense rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            if backend == "EFFICIENT_ATTENTION":  # takes no grouped heads
                k, v = (x.repeat_interleave(problem.model.heads // problem.model.kv_heads, dim=1) for x in (k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return provider(f"torch sdpa {backend or 'default'}", problem, run, backward)


def sdpa_apart(problem: Problem, backward: bool = True) -> Provider:
    """torch's sdpa on every packed sequence by itself: the best that a CPU offers for packed rows."""
    assert problem.lengths is not None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(problem.lengths, dim=1) for x in (q, k, v)), strict=True)
        done = [
            F.scaled_dot_product_attention(
                a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2), is_causal=True, enable_gqa=True
            )
            for a, b, c in parts
        ]
        return torch.cat(done, dim=2).transpose(1, 2)

    return provider("torch sdpa, one call a sequence", problem, run, backward)


def torch_varlen(problem: Problem, backward: bool = True) -> Provider:
    """torch.nn.attention.varlen, on packed rows or on dense ones taken as packed."""

    def make() -> Step:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Absent(str(error)) from error
        bounds, longest = _varlen(problem)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attend: Any = varlen_attn
            views = (x.flatten(0, 1) for x in (q, k, v))
            return attend(*views, bounds, bounds, longest, longest, window_size=(-1, 0)).view(q.shape)

        return provider("", problem, run, backward).make()  # type: ignore[return-value]

    return Provider("torch varlen_attn", make)


def flash_varlen(problem: Problem, backward: bool = True) -> Provider:
    """flash_attn_varlen_func of flash-attn 2, or of flash-attn 4 where only that can be imported."""

    def make() -> Step:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            try:
                from flash_attn.cute import flash_attn_varlen_func
            except ImportError as error:
                raise Absent(str(error)) from error
        bounds, longest = _varlen(problem)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            views = (x.flatten(0, 1) for x in (q, k, v))
            options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
            out = flash_attn_varlen_func(*views, **options, causal=True)
            return (out[0] if isinstance(out, tuple) else out).view(q.shape)

        return provider("", problem, run, backward).make()  # type: ignore[return-value]

    return Provider("flash-attn varlen", make)


def _varlen(problem: Problem) -> tuple[Tensor, int]:
    if problem.lengths is not None:
        return problem.bounds(), max(problem.lengths)
    step = torch.arange(problem.rows + 1, device=problem.device, dtype=torch.int32)
    return step * problem.tokens, problem.tokens


def flex(problem: Problem, statistics: bool = False, backward: bool = True) -> Provider:
    """Compiled FlexAttention with a block mask. With ``statistics`` a second call gives the column sums: keys and
    queries change places, every score loses its query's log-sum-exp, and the log-sum-exp of the result is theirs."""

    def make() -> Step:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        compiled: Any = torch.compile(flex_attention, dynamic=False)
        document = _documents(problem)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (document[i] == document[j])

        def seen(b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return (i >= j) & (document[i] == document[j])

        size, group = problem.tokens, problem.model.heads // problem.model.kv_heads
        forward = create_block_mask(sees, None, None, size, size, device=str(problem.device))
        turned = create_block_mask(seen, None, None, size, size, device=str(problem.device))

        # written in place, so that the function below and with it the compiled code stays the same
        norms = torch.empty(problem.rows, problem.model.heads, size, device=problem.device)

        def minus(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return score - norms[b, h, i]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if not statistics:
                return compiled(q, k, v, block_mask=forward, enable_gqa=True).transpose(1, 2)
            request = AuxRequest(lse=True)
            out, aux = compiled(q, k, v, block_mask=forward, enable_gqa=True, return_aux=request)
            norms.copy_(aux.lse.detach())
            with torch.no_grad():
                keys = k.repeat_interleave(group, dim=1)
                sums = compiled(keys, q, q, score_mod=minus, block_mask=turned, return_aux=request)[1]
            return out.transpose(1, 2), lambda: sums.lse.exp()

        return provider("", problem, run, backward).make()  # type: ignore[return-value]

    return Provider("FlexAttention" + (" and a second pass for the sums" if statistics else ""), make)


def _documents(problem: Problem) -> Tensor:
    if problem.lengths is None:
        return torch.zeros(problem.tokens, dtype=torch.int32, device=problem.device)
    lengths = torch.tensor(problem.lengths, device=problem.device)
    return torch.arange(len(lengths), device=problem.device, dtype=torch.int32).repeat_interleave(lengths)


def eager(problem: Problem, statistics: bool = True, backward: bool = True) -> Provider:
    """Hugging Face's eager Llama attention; its probabilities, which ``output_attentions`` keeps, summed by column."""

    def make() -> Step:
        from transformers.models.llama.modeling_llama import eager_attention_forward

        model = problem.model
        module = SimpleNamespace(num_key_value_groups=model.heads // model.kv_heads, training=backward)
        least = torch.finfo(problem.dtype).min
        size = (problem.tokens, problem.tokens)
        mask = torch.full(size, least, dtype=problem.dtype, device=problem.device).triu(1)[None, None]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            views = (x.transpose(1, 2) for x in (q, k, v))
            out, weights = eager_attention_forward(module, *views, mask, scaling=model.dim**-0.5)
            if not statistics:
                return out
            sums = weights.detach().sum(dim=2, dtype=torch.float32)
            return out, lambda: sums

        return provider("", problem, run, backward).make()  # type: ignore[return-value]

    return Provider("Hugging Face eager" + (", attentions summed" if statistics else ""), make)
