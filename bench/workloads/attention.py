"""Attention problems, and our backends and their peers as timed steps.

Inputs are laid out as a decoder's projections leave them, (B, S, H, D); each provider gets the view it needs. A
training step is a forward and the gradients of q, k and v for the same random output gradient.
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
from bench.runner import rehearsal
from bench.runner.measure import Absent, Bench, Comparison, Provider, Step
from bench.workloads.shapes import HEADLINE_TOKENS, MODELS, Model, utterances


@dataclass(frozen=True)
class Problem:
    """One attention layer.

    Attributes:
        lengths: of the sequences of one packed row; None = ``rows`` rows of ``tokens`` tokens.
        valid: tokens of each right-padded row (only our backends use it); None = all rows are full.
    """

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
        """(N + 1,) int32 cu_seqlens; of dense rows, as if they were packed."""
        ends = torch.tensor([0, *(self.lengths or (self.tokens,) * self.rows)]).cumsum(0)
        return ends.to(device=self.device, dtype=torch.int32)

    def layout(self) -> dict[str, Tensor]:
        """The layout arguments of ``flashsink.attention``."""
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


def dense(bench: Bench, model: str, tokens: int, rows: int = 0) -> Problem:
    """``rows`` full rows; 0 = as many as have the headline's number of tokens."""
    tokens = rehearsal.cut(tokens, 16)
    rows = rehearsal.cut(rows or HEADLINE_TOKENS // tokens, 2)
    return Problem(MODELS[model], rows, tokens, bench.device, bench.dtype)


def packed(bench: Bench, model: str, tokens: int = HEADLINE_TOKENS) -> Problem:
    return Problem(MODELS[model], 1, tokens, bench.device, bench.dtype, tuple(utterances(tokens)))


def comparison(claim: str, problem: Problem, *providers: Provider, **options: Any) -> Comparison:
    """A :class:`Comparison` of providers that solve ``problem``."""
    return Comparison(claim, problem.shape, problem.dtype, providers, **options)


Run = Callable[..., Any]


def provider(
    name: str, problem: Problem, prepare: Callable[[], Run], backward: bool = True, ours: bool = False
) -> Provider:
    """``prepare()(q, k, v)`` on (B, S, heads, D) returns the output, or (output, a function to call after the
    backward). The step returns output, dq, dk, dv, and that function's result or None."""

    def make() -> Step:
        run = prepare()
        q, k, v, gradient = problem.tensors(backward)

        def step() -> object:
            with torch.set_grad_enabled(backward):
                result = run(q, k, v)
            out, after = result if isinstance(result, tuple) else (result, None)
            if backward:
                # not autograd.grad with inputs: captured statistics leave the backward as another leaf's gradient
                out.backward(gradient)
            gradients = q.grad, k.grad, v.grad
            # nothing of this step may be freed during the next one, whose peak would then seem lower
            q.grad = k.grad = v.grad = None
            return out, *gradients, None if after is None else after()

        return step

    return Provider(name, make, ours)


def ours(problem: Problem, backend: str, statistics: str = "", backward: bool = True, ours: bool = True) -> Provider:
    """flashsink. ``statistics``: "" for none, "captured" to read them after the backward, "pass" before it."""

    def prepare() -> Run:
        state = flashsink.backends().get(backend, "unknown")
        if state != "usable":
            raise Absent(state)
        options: dict[str, Any] = {"backend": backend, **problem.layout()}

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            views = (x.transpose(1, 2) for x in (q, k, v))
            if not statistics:
                return flashsink.attention(*views, **options).transpose(1, 2)
            out, stats = flashsink.attention(*views, return_stats=True, **options)
            read = stats.received if statistics == "pass" else None
            return out.transpose(1, 2), lambda: stats.received if read is None else read

        return run

    how = {"": "without statistics", "captured": "with statistics", "pass": "with statistics by the pass"}
    return provider(f"flashsink {backend} {how[statistics]}", problem, prepare, backward, ours)


def usable(*names: str) -> list[str]:
    """Those of the named backends that can run here."""
    state = flashsink.backends()
    return [name for name in names if state.get(name) == "usable"]


def sdpa(problem: Problem, backend: str | None, backward: bool = True) -> Provider:
    """torch's scaled_dot_product_attention with one named backend (FLASH_ATTENTION, CUDNN_ATTENTION,
    EFFICIENT_ATTENTION, MATH) or its own choice (None). Dense rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        grouped = backend != "EFFICIENT_ATTENTION"  # which supports no grouped heads
        with sdpa_kernel(getattr(SDPBackend, backend)):
            if not grouped:
                k, v = (x.repeat_interleave(problem.model.heads // problem.model.kv_heads, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return provider(f"torch sdpa {backend or 'default'}", problem, lambda: run, backward)


def sdpa_apart(problem: Problem) -> Provider:
    """One sdpa call per packed sequence: the best that torch offers for packed rows on a CPU."""
    assert problem.lengths is not None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(1, 2).split(problem.lengths, dim=2) for x in (q, k, v)), strict=True)
        done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return torch.cat(done, dim=2).transpose(1, 2)

    return provider("torch sdpa, one call a sequence", problem, lambda: run)


def torch_varlen(problem: Problem) -> Provider:
    """torch.nn.attention.varlen."""

    def prepare() -> Run:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Absent(str(error)) from error
        bounds, longest, attend = problem.bounds(), max(problem.lengths or [problem.tokens]), varlen_attn

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            views = (x.flatten(0, 1) for x in (q, k, v))
            return attend(*views, bounds, bounds, longest, longest, window_size=(-1, 0)).view(q.shape)

        return run

    return provider("torch varlen_attn", problem, prepare)


def flash_varlen(problem: Problem) -> Provider:
    """flash_attn_varlen_func of flash-attn 2, or of flash-attn 4 where only that can be imported."""

    def prepare() -> Run:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            try:
                from flash_attn.cute import flash_attn_varlen_func
            except ImportError as error:
                raise Absent(str(error)) from error
        bounds, longest = problem.bounds(), max(problem.lengths or [problem.tokens])

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            views = (x.flatten(0, 1) for x in (q, k, v))
            options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
            out = flash_attn_varlen_func(*views, **options, causal=True)
            return (out[0] if isinstance(out, tuple) else out).view(q.shape)

        return run

    return provider("flash-attn varlen", problem, prepare)


def flex(problem: Problem, statistics: bool = False, backward: bool = True) -> Provider:
    """Compiled FlexAttention with a block mask. With ``statistics`` a second call computes the column sums: keys and
    queries swap places and each score is reduced by its query's log-sum-exp, so that the log-sum-exp of the second
    call is the logarithm of the sums."""

    def prepare() -> Run:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        compiled: Any = torch.compile(flex_attention, dynamic=False)
        document = _documents(problem)

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (document[i] == document[j])

        size, group, device = problem.tokens, problem.model.heads // problem.model.kv_heads, str(problem.device)
        mask = create_block_mask(visible, None, None, size, size, device=device)
        swapped = create_block_mask(lambda b, h, j, i: visible(b, h, i, j), None, None, size, size, device=device)

        # written in place, so that the function below, and with it the compiled code, stays the same
        lse = torch.empty(problem.rows, problem.model.heads, size, device=problem.device)

        def minus_lse(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return score - lse[b, h, i]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            if not statistics:
                return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
            request = AuxRequest(lse=True)
            out, aux = compiled(q, k, v, block_mask=mask, enable_gqa=True, return_aux=request)
            lse.copy_(aux.lse.detach())
            with torch.no_grad():
                keys = k.repeat_interleave(group, dim=1)
                sums = compiled(keys, q, q, score_mod=minus_lse, block_mask=swapped, return_aux=request)[1]
            return out.transpose(1, 2), lambda: sums.lse.exp()

        return run

    name = "FlexAttention" + (" and a second pass for the sums" if statistics else "")
    return provider(name, problem, prepare, backward)


def _documents(problem: Problem) -> Tensor:
    if problem.lengths is None:
        return torch.zeros(problem.tokens, dtype=torch.int32, device=problem.device)
    lengths = torch.tensor(problem.lengths, device=problem.device)
    return torch.arange(len(lengths), device=problem.device, dtype=torch.int32).repeat_interleave(lengths)


def eager(problem: Problem, backward: bool = True) -> Provider:
    """Hugging Face's eager Llama attention; its probabilities, which ``output_attentions`` keeps, summed by column."""

    def prepare() -> Run:
        from transformers.models.llama.modeling_llama import eager_attention_forward

        model = problem.model
        module = SimpleNamespace(num_key_value_groups=model.heads // model.kv_heads, training=backward)
        least = torch.finfo(problem.dtype).min
        size = (problem.tokens, problem.tokens)
        mask = torch.full(size, least, dtype=problem.dtype, device=problem.device).triu(1)[None, None]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            views = (x.transpose(1, 2) for x in (q, k, v))
            out, weights = eager_attention_forward(module, *views, mask, scaling=model.dim**-0.5)
            sums = weights.detach().sum(dim=2, dtype=torch.float32)
            return out, lambda: sums

        return run

    return provider("Hugging Face eager, attentions summed", problem, prepare, backward)
