"""Checks that what is timed is correct: bf16 on the GPU, at sizes like those of the claims, each step once eagerly and
once as the replay of its CUDA graph.

The error of every token (Euclidean norm, against float64) may be at most twice that of plain PyTorch in the same dtype,
plus rounding. The limit is per token because late tokens are small: a fault in them would disappear next to the largest
values. ``python -m bench.check [NAME ...]``; ``make gpu`` begins with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flashsink
from bench.runner import rehearsal
from bench.runner.measure import Runner, one_line
from bench.workloads import llm_steps
from bench.workloads.attention import Problem, ours
from bench.workloads.shapes import Model, utterances
from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.dispatch import _PREFERRED, implementation

BACKENDS = ("triton", "sdpa")
STEP_LIMIT = 2e-2  # of a whole model's loss and gradients, relative to the reference backend's
# Triton's interpreter, in which a rehearsal runs, computes bfloat16 wrongly
DTYPE = torch.float16 if rehearsal.ON else torch.bfloat16
NAMES = ("out", "dq", "dk", "dv", "received")


@dataclass(frozen=True)
class Finding:
    """The error of one result."""

    name: str
    error: float
    limit: float

    @property
    def fine(self) -> bool:
        return self.error <= self.limit  # not for NaN

    def __str__(self) -> str:
        return f"{'ok  ' if self.fine else 'FAIL'} {self.name}: error {self.error:.3g}, limit {self.limit:.3g}"


# ---- attention


def attention_problem(dim: int, group: int, packed: bool, device: torch.device) -> Problem:
    model = Model("check", 2 * group, 2, dim, 2 * group * dim, 1, 0, 0)
    tokens = rehearsal.cut(2048, 48)
    if packed:
        return Problem(model, 1, tokens, device, DTYPE, tuple(utterances(tokens)))
    return Problem(model, 2, tokens // 2, device, DTYPE, valid=(tokens // 2, rehearsal.cut(700, tokens // 3)))


def attention(problem: Problem, names: Sequence[str] = BACKENDS) -> Iterator[Finding]:
    """Output, gradients and statistics of the steps that the claims time."""
    exact = outcome(problem, torch.float64, reference_attention)
    plain = outcome(problem, problem.dtype, plain_attention)
    for name in names:
        for how in ("captured", "pass"):
            made = ours(problem, name, how).make()
            assert not isinstance(made, tuple)
            runner = Runner(None, made)
            label = f"{problem.shape} {name} {how}"
            yield from compared(f"{label}, eager", runner.step(), plain, exact)
            if problem.device.type != "cuda":
                continue
            try:
                runner.capture()
            except Exception as error:  # not a wrong number; a row of the benchmark will say so
                print(f"     {label}: no CUDA graph: {one_line(error)}")
                continue
            yield from compared(f"{label}, replayed", replayed(runner), plain, exact)


def replayed(runner: Runner) -> Any:
    """The results of one more replay, after filling them with NaN."""
    for tensor in runner.result:
        tensor.detach().fill_(float("nan"))
    runner.step()
    torch.cuda.synchronize()
    return runner.result


def compared(label: str, got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> Iterator[Finding]:
    *rest, received = got
    for name, mine, low, want in zip(NAMES, (*rest, received.mT), plain, exact, strict=True):
        yield Finding(f"{label} {name}", excess(mine, low, want), 1.0)


def excess(got: Tensor, low: Tensor, want: Tensor) -> float:
    """The largest error of a token of ``got`` as a share of the limit: twice the error of ``low``, plus one rounding of
    the token and of a twentieth of the largest one. Tensors (B, S, ...); others count as a single token."""
    rounding = max(torch.finfo(got.dtype).eps, 1e-4)
    size = sizes(want)
    allowed = 2 * sizes(low.double() - want) + rounding * (size + size.max() / 20)
    error = sizes(got.detach().double() - want)
    return float(torch.where(error == 0, 0.0, error / allowed).max())


def sizes(x: Tensor) -> Tensor:
    return x.flatten(2).norm(dim=2) if x.dim() > 2 else x.norm()


def outcome(problem: Problem, dtype: torch.dtype, attend: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    """out, dq, dk, dv (B, S, heads, D) and received (B, S, H) of ``attend(q, k, v, problem)``, in float64."""
    *inputs, gradient = problem.tensors(False)
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    out, received = attend(*(x.transpose(1, 2) for x in (q, k, v)), problem)
    gradients = torch.autograd.grad(out.transpose(1, 2), (q, k, v), gradient.to(dtype))
    return [x.detach().double() for x in (out.transpose(1, 2), *gradients, received.mT)]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    out, stats = flashsink.attention(q, k, v, return_stats=True, backend="reference", **problem.layout())
    return out, stats.received


def plain_attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """As in eager models: scores and probabilities in the dtype of q, the softmax in float32."""
    layout = resolve_layout(q.shape[0], q.shape[2], q.device, **problem.layout())
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = reference.visible(layout, q.shape[2], True)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
    a = scores.softmax(dim=-1, dtype=torch.float32).masked_fill(~mask, 0.0).to(q.dtype)
    return a @ v, a.detach().sum(dim=2, dtype=torch.float32)


# ---- a whole model


def model(device: torch.device, dtype: torch.dtype = DTYPE) -> Iterator[Finding]:
    """Loss and gradients of a small random Llama with the default backend, against the reference backend."""
    sizes = Model("check", 4, 2, 64, 256, 3, 512, 1000)
    for packed in (False, True):
        lengths = tuple(rehearsal.cut(n, n // 8) for n in (200, 131, 64))
        setting = llm_steps.Setting(sizes, 3, lengths, packed, device, dtype)
        shared: dict[str, Tensor] = {}
        with mock.patch.dict(_PREFERRED, {device.type: ("reference",)}):
            wanted = loss_and_gradients(setting, shared)
        for name, got in loss_and_gradients(setting, shared).items():
            size = float(wanted[name].norm())
            if size > 0:  # zero for the lower half of a new adapter
                error = float((got - wanted[name]).norm()) / size
                yield Finding(f"{setting.shape}: {name}", error, STEP_LIMIT)
            else:
                yield Finding(f"{setting.shape}: {name}", float(got.norm()), 0.0)


def loss_and_gradients(setting: llm_steps.Setting, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, gradients and statistics in float64, by name."""
    llama = llm_steps.build(setting, llm_steps.OURS, shared)
    batch, probe = llm_steps.Batch(setting), flashsink.attach(llama)
    with probe.spans(batch.spans):
        loss = llm_steps.cross_entropy(llama, batch) + probe.decorrelation_loss
    loss.backward()
    found = {name: p.grad for name, p in llama.named_parameters() if p.requires_grad}
    found |= {"loss": loss.detach(), "inputs": batch.embeddings.grad}
    found |= {f"received, layer {i}": stats.received for i, stats in enumerate(probe.sinks)}
    return {name: x.double() for name, x in found.items() if x is not None}


# ---- hidden states


def hidden(
    device: torch.device, dtype: torch.dtype = DTYPE, features: int = rehearsal.cut(3072, 96)
) -> Iterator[Finding]:
    """The decorrelation loss alone and in the norm, which also returns the largest activations."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
    tokens = rehearsal.cut(256, 24)
    layers = [torch.randn(4, tokens, features, **options) for _ in range(3)]
    for h in layers:  # half of the tokens have a positive cosine to their BOS
        h[:, 1::2] += h[:, :1]
    spans = torch.tensor([tokens, tokens * 3 // 4, 17, 1], device=device)
    yield from held("decorrelation loss", lambda *given, run: loss_alone(given, spans, run), layers)
    upstream = torch.randn(layers[0].shape, **options)
    weight = torch.randn(features, **options)
    yield from held("norm", lambda *given, run: normed(*given, upstream, spans, run), [layers[0], weight])


def held(label: str, call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> Iterator[Finding]:
    mine = call(*inputs, run=None)
    low = call(*inputs, run="reference")
    exact = [x.double() for x in call(*(x.double() for x in inputs), run="reference")]
    for index, (got, plain, want) in enumerate(zip(mine, low, exact, strict=True)):
        yield Finding(f"{label}, result {index}", excess(got, plain, want), 1.0)


def loss_alone(layers: Sequence[Tensor], spans: Tensor, backend: str | None) -> list[Tensor]:
    leaves = [layer.detach().requires_grad_() for layer in layers]
    loss = flashsink.decorrelation_loss(leaves, spans, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def normed(h: Tensor, weight: Tensor, upstream: Tensor, spans: Tensor, backend: str | None) -> list[Tensor]:
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    layout = resolve_layout(h.shape[0], h.shape[1], h.device)
    run = implementation(backend, h.device.type)
    result = run.rms_norm(h, weight, 1e-5, layout, spans, 0.0)
    assert result.total is not None
    value = (result.out.double() * upstream.double()).sum() + 3.0 * result.total
    return [result.out.detach(), result.total.detach(), result.max_abs, *torch.autograd.grad(value, (h, weight))]


# ---- all of it

Case = Callable[[torch.device], Iterator[Finding]]


def _attention_case(dim: int, group: int, packed: bool) -> Case:
    return lambda device: attention(attention_problem(dim, group, packed, device))


CASES: dict[str, Case] = {
    f"attention-D{dim}-GQA{group}-{'packed' if packed else 'dense'}": _attention_case(dim, group, packed)
    for dim in (64, 128)[: rehearsal.cut(2, 1)]
    for group in (4, 3)[: rehearsal.cut(2, 1)]
    for packed in (False, True)
}
CASES |= {"model": model, "hidden": hidden}


def run(case: Case, device: torch.device) -> bool:
    """Prints every finding; returns whether all are fine."""
    good = True
    try:
        for finding in case(device):
            print(finding, flush=True)
            good = good and finding.fine
    except Exception as error:
        print(f"FAIL {one_line(error)}", flush=True)
        return False
    return good


def main(cases: dict[str, Case], about: str) -> int:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(cases))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not rehearsal.ON:
        print("bench.check: there is no CUDA device here", file=sys.stderr)
        return 2
    rehearsal.prefer_triton()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    good = [run(cases[name], device) for name in arguments.names or cases]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(CASES, __doc__ or ""))
