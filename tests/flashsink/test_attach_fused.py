"""The loss and the statistics inside the norms: {fused, standalone} x {checkpointing off, on} on every backend."""

from __future__ import annotations

import importlib

import oracle
import pytest
import torch
from decoders import ids, training_inputs
from torch import nn

import flashsink
from flashsink.triton.launch import INTERPRETED

pytestmark = pytest.mark.integration

backends = importlib.import_module("flashsink.dispatch")  # the package's attribute is the function


@pytest.fixture(params=["reference", "cpu", "triton"])
def chosen(request, monkeypatch):
    """The backend that an attached model takes on CPU tensors."""
    if flashsink.backends()[request.param] != "usable" or (request.param == "triton" and not INTERPRETED):
        pytest.skip("not on CPU tensors here")
    monkeypatch.setitem(backends._PREFERRED, "cpu", (request.param,))
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """How often each way of computing the loss was taken, over all backends."""
    counts = {"fused": 0, "standalone": 0}
    for name in {"reference", "cpu", "triton"}:
        module = backends._MODULES[name]

        def norm(*args, run=module.rms_norm, **kwargs):
            before = counts["standalone"]
            result = run(*args, **kwargs)
            counts.update(fused=counts["fused"] + (args[4] is not None), standalone=before)  # it may call the other
            return result

        def sums(*args, run=module.decorrelation_sums, **kwargs):
            counts["standalone"] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, "rms_norm", norm)
        monkeypatch.setattr(module, "decorrelation_sums", sums)
    return counts


class OtherNorm(nn.Module):
    """Llama's norm, but with an epsilon that cannot be read from it."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.small = norm.weight, norm.variance_epsilon

    def forward(self, hidden):
        wide = hidden.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.small)).to(hidden.dtype)


def exact(tiny, padding, weight, margin=0.0):
    """Loss, decorrelation, gradients and activations by output_hidden_states and the oracle, in float64."""
    call, spans = training_inputs(padding)
    model = tiny("llama").double().train()
    call["inputs_embeds"] = call["inputs_embeds"].double()
    out = model(**call, output_hidden_states=True)
    loss = oracle.decorrelation(out.hidden_states[1:-1], spans, starts=padding[3], margin=margin)
    (out.loss + weight * loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach().double(), loss.detach(), grads


def measure(model, padding, weight, scale=1.0, margin=0.0, checkpointing=False):
    call, spans = training_inputs(padding)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe = flashsink.attach(model, margin=margin)
    with probe.spans(spans):
        out = model(**call)
    ((out.loss + weight * probe.decorrelation_loss) * scale).backward()
    grads = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return probe, out.loss.detach(), probe.decorrelation_loss.detach(), grads


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("padding", ["none", "both"], indirect=True)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("known", [True, False], ids=["fused", "standalone"])
def test_the_product(tiny, padding, chosen, calls, known, checkpointing, scale):
    want = exact(tiny, padding, 3.0, margin=0.1)
    model = tiny("llama")
    if not known:
        for layer in model.model.layers:
            layer.input_layernorm = OtherNorm(layer.input_layernorm)
        model.model.norm = OtherNorm(model.model.norm)
    calls.update(fused=0, standalone=0)
    probe, loss, decorrelation, grads = measure(model, padding, 3.0, scale, 0.1, checkpointing)
    # three layers: two count; at the boundary they are read together
    assert calls == ({"fused": 2, "standalone": 0} if known and not checkpointing else {"fused": 0, "standalone": 1})
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decorrelation.double(), want[1], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad.double(), want[2][name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert probe.activations.max_abs.shape == (3, 3, 12)
    assert len(probe.sinks) == 3 and all(stats.received.isfinite().all() for stats in probe.sinks)


@torch.no_grad()
def test_a_bfloat16_model_is_measured_in_float32(tiny, chosen):
    model, tokens = tiny("llama").to(torch.bfloat16), ids()
    plain = model(input_ids=tokens).logits
    probe = flashsink.attach(model)
    got = model(input_ids=tokens, output_hidden_states=True)
    assert got.logits.dtype == torch.bfloat16
    assert (got.logits - plain).abs().max() <= 0.05 * plain.abs().max()
    assert probe.decorrelation_loss.dtype == probe.sinks[0].received.dtype == torch.float32
    want = oracle.decorrelation(got.hidden_states[1:-1], [8, 8])
    torch.testing.assert_close(probe.decorrelation_loss.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(probe.sinks[0].received.sum(-1), torch.full((2, 4), 8.0))


@pytest.mark.parametrize("padding", ["both"], indirect=True)
def test_accumulation_adds_up(tiny, padding, chosen):
    """Two backwards before a step give the sum of their gradients."""
    alone = [measure(tiny("llama"), padding, weight)[3] for weight in (1.0, 4.0)]
    model = tiny("llama").train()
    call, spans = training_inputs(padding)
    probe = flashsink.attach(model)
    for weight in (1.0, 4.0):
        with probe.spans(spans):
            out = model(**call)
        (out.loss + weight * probe.decorrelation_loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # the embedding table
            continue
        torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name], rtol=1e-4, atol=1e-6)


def saved_bytes(run):
    """Bytes that autograd holds at the end of ``run``, every storage once."""
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    return sum(held.values()), keep


def test_the_loss_holds_two_numbers_a_token_and_no_states(tiny, chosen):
    """Extra memory of the loss relative to all layers' hidden states: at most 2 / S + 0.3%, and for the kernels a
    few numbers a token (48 bytes) on top of it; the reference is not held to it."""
    if chosen == "reference":
        pytest.skip("the definition saves what autograd needs")
    features, tokens, rows = 512, 128, 2
    sizes = []
    for decorrelation in (False, True):
        model = tiny("llama", hidden_size=features, intermediate_size=64, max_position_embeddings=tokens).train()
        probe = flashsink.attach(model, attention=False, decorrelation=decorrelation, activations=True)
        embeds = torch.randn(rows, tokens, features, requires_grad=True)
        run = lambda m=model, e=embeds, p=probe, on=decorrelation: (  # noqa: E731
            m.model(inputs_embeds=e, use_cache=False).last_hidden_state.sum() + (p.decorrelation_loss if on else 0)
        )
        total, keep = saved_bytes(run)
        keep.backward()
        sizes.append(total)
    states = 3 * rows * tokens * features * 4
    assert sizes[1] - sizes[0] <= (2 / tokens + 0.003) * states + 3 * rows * tokens * 48


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", ["both"], indirect=True)
@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.slow, id="inference"), pytest.param(True, id="training")]
)
def test_an_attached_model_compiles_into_one_graph(tiny, padding, chosen, kind, training):
    torch._dynamo.reset()
    model = tiny(kind)
    call, spans = training_inputs(padding)
    probe = flashsink.attach(model, queries="after_span")
    results = []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(training), probe.spans(spans):
            out = run(**call)
        results.append([out.loss.detach(), probe.decorrelation_loss.detach(), probe.activations.max_abs])
        if training:
            (out.loss + 3.0 * probe.decorrelation_loss).backward()
            results[-1] += [p.grad for p in model.parameters() if p.grad is not None]
        results[-1] += [stats.received for stats in probe.sinks]
    for again in results[1:]:
        torch.testing.assert_close(again, results[0], rtol=1e-4, atol=1e-5)
