"""Which norms observe the outputs that they read: those that compute RMSNorm, whatever their name."""

from __future__ import annotations

import logging

import families
import pytest
import torch
from torch import nn

import flashsink

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))


class Norm(nn.Module):
    """RMSNorm: ``form`` names what is multiplied when."""

    def __init__(self, size, form):
        super().__init__()
        generator = torch.Generator().manual_seed(size)
        self.weight = nn.Parameter(torch.randn(size, generator=generator) * 0.3 + (0.0 if form == "gemma" else 1.0))
        self.eps, self.form, self.ran = 1e-5, form, 0

    def forward(self, h):
        self.ran += 1
        wide = h.float() if h.dtype != torch.float64 else h
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.form == "llama":
            return self.weight * normed.to(h.dtype)
        if self.form == "gemma":  # in float32
            return (normed * (1.0 + self.weight.float())).to(h.dtype)
        if self.form == "none":  # Liger's: no rounding before the weight
            return (normed * self.weight.float()).to(h.dtype)
        centered = wide - wide.mean(-1, keepdim=True)
        return self.weight * (centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)).to(h.dtype)


def measured(form, dtype, fresh=False):
    """(loss, largest activations, gradients, fused layers, runs of the norms) of a Llama with these norms."""
    model = families.build("llama")
    for layer in model.model.layers:
        layer.input_layernorm = Norm(32, form)
    model.model.norm = Norm(32, form)
    model = model.to(dtype)
    if fresh:
        hidden = model(input_ids=IDS, output_hidden_states=True)
        states = torch.stack(hidden.hidden_states[1:-1]).float()
        cosine = torch.cosine_similarity(states[:, :, :1], states[:, :, 1:], dim=-1).square()
        (hidden.logits.float().tanh().sum() + 50.0 * cosine.mean()).backward()
        return cosine.mean().detach(), states.abs().amax(-1), {n: p.grad for n, p in model.named_parameters()}
    probe = flashsink.attach(model)
    for layer in model.model.layers:
        layer.input_layernorm.ran = 0
    out = model(input_ids=IDS).logits
    (out.float().tanh().sum() + 50.0 * probe.decorrelation_loss).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    ran = sum(layer.input_layernorm.ran for layer in model.model.layers)
    return probe.decorrelation_loss.detach(), probe.activations.max_abs[:-1], grads, probe.fused, ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["llama", "gemma", "none", "centered"])
def test_norms_are_known_by_what_they_compute(form, dtype, caplog):
    with caplog.at_level(logging.INFO, logger="flashsink"):
        loss, top, grads, fused, ran = measured(form, dtype)
    # where the rounding is elsewhere only float32 is the same
    same = form == "llama" or (form in ("gemma", "none") and dtype == torch.float32)
    assert fused == ([0, 1, 2, 3] if same else []) and ran == (1 if same else 4)
    assert ("Norm is not RMSNorm in Llama's form: the states are read once more" in caplog.text) == (not same)
    want_loss, want_top, want_grads = measured(form, dtype, fresh=True)
    half = dtype == torch.bfloat16
    torch.testing.assert_close(loss, want_loss, rtol=2e-2 if half else 1e-4, atol=1e-5)
    torch.testing.assert_close(top, want_top, rtol=2e-2 if half else 1e-4, atol=1e-4)
    if not half:
        for name, grad in grads.items():
            scale = float(want_grads[name].abs().max()) + 1e-6
            torch.testing.assert_close(grad, want_grads[name], rtol=1e-3, atol=2e-4 * scale, msg=name)


FUSED = {
    "llama": 4,
    "gemma2": 4,
    "gemma3": 4,
    "phi3": 4,
    "gpt_oss": 4,
    "qwen3_next": 4,
    "olmo2": 1,
    "gpt2": 0,
    "opt": 0,
}


@pytest.mark.parametrize("name", FUSED)
def test_families(name):
    """OLMo-2 norms what a layer adds, not its output; GPT-2 and OPT have LayerNorm."""
    model = families.build(name)
    probe = flashsink.attach(model)
    model(input_ids=IDS)
    assert len(probe.fused) == FUSED[name]


def test_a_norm_whose_weight_is_elsewhere_is_known_at_its_first_forward():
    """As with ZeRO-3, which gathers it around the forward."""
    model = families.build("llama")
    norms = [layer.input_layernorm for layer in model.model.layers] + [model.model.norm]
    whole = [norm.weight.data for norm in norms]
    for norm, weight in zip(norms, whole, strict=True):
        norm.weight.data = weight.new_empty(0)

        def gather(module, args, weight=weight):
            module.weight.data = weight

        def release(module, args, output, weight=weight):
            module.weight.data = weight.new_empty(0)

        norm.register_forward_pre_hook(gather)
        norm.register_forward_hook(release)
    probe = flashsink.attach(model)
    with torch.no_grad():
        model(input_ids=IDS)
    assert probe.fused == [0, 1, 2, 3]
    plain = families.build("llama")
    want = flashsink.attach(plain)
    with torch.no_grad():
        plain(input_ids=IDS)
    torch.testing.assert_close(probe.decorrelation_loss, want.decorrelation_loss)


def test_hooks_that_pass_the_states_through_autograd():
    """As ZeRO-3's do: another tensor over the same memory."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.detach()

        @staticmethod
        def backward(ctx, grad):
            return grad

    model = families.build("llama")
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: (Through.apply(args[0]), *args[1:]))
    probe = flashsink.attach(model)
    model(input_ids=IDS)
    assert probe.fused == [0, 1, 2, 3]


def test_a_norm_that_reads_something_else_is_left_alone():
    """The states that it gets, not its place, say whose output it reads."""
    model = families.build("llama")
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.0, *args[1:]))  # a copy: no longer the output itself
    probe = flashsink.attach(model)
    out = model(input_ids=IDS, output_hidden_states=True)
    assert probe.fused == [1, 2, 3]
    top = torch.stack(out.hidden_states[1:-1]).abs().amax(-1)
    torch.testing.assert_close(probe.activations.max_abs[:-1], top)
