"""attach on tiny Llama, Qwen2, Qwen3 and Mistral models, with and without LoRA: one full forward."""

from __future__ import annotations

import functools
import gc
import weakref
from itertools import pairwise

import oracle
import pytest
import torch
from decoders import decoder, training_inputs, valid
from torch.utils.checkpoint import checkpoint

import flashsink

SIZES = [1, 5, 4]  # lengths of the packed sequences


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def packed_batch(vocabulary=60):
    g = torch.Generator().manual_seed(9)
    ids = torch.randint(3, vocabulary, (1, sum(SIZES)), generator=g)
    bounds = [0, *torch.tensor(SIZES).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(n) for n in SIZES])[None]
    return ids, positions, bounds


@torch.no_grad()
def eager(model, **inputs):
    """Hidden states and attention probabilities of the model without a probe."""
    base = decoder(model)
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    result = model(**inputs, output_attentions=True, output_hidden_states=True)
    base.set_attn_implementation(before)
    return result


@torch.no_grad()
def test_logits_equal_sdpa(model, padding):
    _, ids, mask, starts, lengths = padding
    plain = model(input_ids=ids, attention_mask=mask).logits
    probe = flashsink.attach(model)
    got = model(input_ids=ids, attention_mask=mask).logits
    keep = valid(starts, lengths, 12)
    torch.testing.assert_close(got[keep], plain[keep], rtol=1e-5, atol=1e-5)
    probe.detach()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)


@torch.no_grad()
def test_a_row_gives_the_same_alone(model, padding):
    """Logits, sinks and activations of an utterance do not depend on its batch."""
    _, ids, mask, starts, lengths = padding
    positions = (torch.arange(12) - starts[:, None]).clamp(min=0)
    probe = flashsink.attach(model)
    with probe.spans((lengths + 1) // 2):
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    sinks, top = probe.sinks, probe.activations
    for b, (first, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        alone = model(input_ids=ids[b : b + 1, first : first + n]).logits
        inside = slice(first, first + n)
        torch.testing.assert_close(together[b, inside], alone[0], rtol=1e-4, atol=1e-4)
        for batch, single in zip(sinks, probe.sinks, strict=True):
            torch.testing.assert_close(batch.mean_received[b, :, inside], single.mean_received[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(top.max_abs[:, b, inside], probe.activations.max_abs[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sinks_are_column_sums_of_the_attention_maps(model, padding):
    _, ids, mask, starts, lengths = padding
    maps = eager(model, input_ids=ids, attention_mask=mask).attentions
    probe = flashsink.attach(model)
    model(input_ids=ids, attention_mask=mask)
    keep = valid(starts, lengths, 12)
    assert len(probe.sinks) == len(maps) == 3
    for stats, a in zip(probe.sinks, maps, strict=True):
        expected = torch.zeros(3, 4, 12)
        for b in range(3):
            for i in keep[b].nonzero()[:, 0].tolist():
                expected[b] += a[b, :, i]
        expected *= keep[:, None]
        torch.testing.assert_close(stats.received, expected, rtol=1e-5, atol=1e-5)
        end = starts + lengths
        assert torch.equal(stats.queries, ((end[:, None] - torch.arange(12)) * keep))
        mean = expected / (end[:, None] - torch.arange(12)).clamp(min=1)[:, None]
        torch.testing.assert_close(stats.mean_received, mean, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("with_spans", [False, True], ids=["all tokens", "spans"])
def test_decorrelation_loss(model, padding, with_spans):
    _, ids, mask, starts, lengths = padding
    spans = (lengths * 2 + 2) // 3 if with_spans else lengths
    hidden = eager(model, input_ids=ids, attention_mask=mask).hidden_states
    probe = flashsink.attach(model, margin=0.01)
    if with_spans:
        with probe.spans(spans):
            model(input_ids=ids, attention_mask=mask)
    else:
        model(input_ids=ids, attention_mask=mask)
    # inputs of decoder layers 2..L: hidden_states[1..L-1] of transformers
    want = oracle.decorrelation(hidden[1:-1], spans.tolist(), starts=starts, margin=0.01)
    assert probe.decorrelation_loss.dtype == torch.float32
    torch.testing.assert_close(probe.decorrelation_loss.double(), want, rtol=2e-5, atol=1e-8)


@torch.no_grad()
def test_activations_are_those_of_the_layers_outputs(model, padding):
    _, ids, mask, starts, lengths = padding
    last = []
    handle = (
        decoder(model)
        .layers[-1]
        .register_forward_hook(
            lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    hidden = eager(model, input_ids=ids, attention_mask=mask).hidden_states
    handle.remove()
    outputs = [*hidden[1:-1], last[0]]
    probe = flashsink.attach(model, median=True)
    model(input_ids=ids, attention_mask=mask)
    top, feature, median = oracle.activations(outputs, lengths, starts)
    stats = probe.activations
    assert stats.max_abs.shape == (3, 3, 12)
    torch.testing.assert_close(stats.max_abs.double(), torch.tensor(top).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.median.double(), torch.tensor(median).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.feature, torch.tensor(feature, dtype=torch.int32))


@torch.no_grad()
def test_packed_sequences(model):
    ids, positions, bounds = packed_batch()
    spans = torch.tensor([1, 4, 2])
    plain = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    hidden = [model(input_ids=ids[:, a:b], output_hidden_states=True).hidden_states for a, b in pairwise(bounds)]
    probe = flashsink.attach(model, median=True)
    with probe.spans(spans):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    packed, top, loss = probe.sinks, probe.activations, probe.decorrelation_loss
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    joined = [torch.cat([h[layer] for h in hidden], dim=1) for layer in (1, 2)]
    want = oracle.decorrelation(joined, spans.tolist(), cu_seqlens=torch.tensor(bounds))
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-8)
    for a, b in pairwise(bounds):
        alone = model(input_ids=ids[:, a:b]).logits
        torch.testing.assert_close(logits[:, a:b], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(top.max_abs[:, :, a:b], probe.activations.max_abs, rtol=1e-4, atol=1e-4)
        for stats, single in zip(packed, probe.sinks, strict=True):
            torch.testing.assert_close(stats.received[:, :, a:b], single.received, rtol=1e-4, atol=1e-4)
            assert torch.equal(stats.queries[:, a:b], single.queries)
    assert top.max_abs.shape == (3, 1, 10) and top.median.shape == (3, 1)


def train_once(model, inputs, checkpointing, spans):
    """Loss, gradients and statistics of one training step."""
    model.train()
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    probe = flashsink.attach(model)
    embeds = inputs["inputs_embeds"].clone().requires_grad_()
    with probe.spans(spans):
        out = model(**(inputs | {"inputs_embeds": embeds}))
    total = out.loss + 3.0 * probe.decorrelation_loss
    before = [s.received.clone() for s in probe.sinks]
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"embeds": embeds.grad}
    probe.detach()
    after = [s.received for s in probe.sinks]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return total.detach(), probe.decorrelation_loss.detach(), grads, after, probe.activations


def test_checkpointing_changes_nothing(model, padding):
    inputs, spans = training_inputs(padding)
    loss, decorrelation, grads, received, top = train_once(model, inputs, False, spans)
    loss2, decorrelation2, grads2, received2, top2 = train_once(model, inputs, True, spans)
    assert decorrelation > 0 and len(grads) > 3 and grads.keys() == grads2.keys()
    torch.testing.assert_close(loss2, loss)
    torch.testing.assert_close(decorrelation2, decorrelation)
    for name, grad in grads.items():
        torch.testing.assert_close(grads2[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(received, received2, strict=True):
        torch.testing.assert_close(b, a)
    torch.testing.assert_close(top2.max_abs, top.max_abs)
    assert torch.equal(top2.feature, top.feature)


def checkpoint_calls(model):
    """Checkpoints whole calls of the layers, hooks included, as transformers 5.17 and torch's wrappers do."""
    for layer in decoder(model).layers:
        kind = type(layer)

        def call(self, *args, kind=kind, **kwargs):
            return checkpoint(functools.partial(kind.__call__, self, **kwargs), *args, use_reentrant=False)

        layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_checkpointing_around_the_hooks_changes_nothing(tiny, padding, kind):
    inputs, spans = training_inputs(padding)
    model = tiny(kind)
    loss, decorrelation, grads, received, top = train_once(model, inputs, False, spans)
    checkpoint_calls(model)
    loss2, decorrelation2, grads2, received2, top2 = train_once(model, inputs, False, spans)
    torch.testing.assert_close((loss2, decorrelation2), (loss, decorrelation))
    torch.testing.assert_close(grads2, grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(received2, received)
    torch.testing.assert_close(top2.max_abs, top.max_abs)


def test_recomputed_layers_leave_the_probe_alone(tiny):
    """The backward of an older forward runs its layers again, after a newer forward was measured."""
    model = tiny("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe = flashsink.attach(model)
    old, new = torch.randint(3, 60, (3, 9)), torch.randint(3, 60, (2, 6))
    total = model(input_ids=old, labels=old, use_cache=False).loss + probe.decorrelation_loss
    model(input_ids=new, use_cache=False)
    sinks, top = [s.received.clone() for s in probe.sinks], probe.activations.max_abs.clone()
    loss = probe.decorrelation_loss.detach()
    total.backward()
    assert torch.equal(probe.decorrelation_loss.detach(), loss)
    assert torch.equal(probe.activations.max_abs, top)
    for stats, before in zip(probe.sinks, sinks, strict=True):
        assert torch.equal(stats.received, before)


def test_gradients_equal_those_of_hidden_states(model, padding):
    """CE + 3 x loss through the probe against the same by output_hidden_states and the oracle."""
    inputs, spans = training_inputs(padding)
    total, _, grads, _, _ = train_once(model, inputs, False, spans)
    model.zero_grad(set_to_none=True)
    embeds = inputs["inputs_embeds"].clone().requires_grad_()
    out = model(**(inputs | {"inputs_embeds": embeds}), output_hidden_states=True)
    extra = oracle.decorrelation(out.hidden_states[1:-1], spans.tolist(), starts=padding[3])
    want = out.loss + 3.0 * extra.float()
    want.backward()
    torch.testing.assert_close(total, want.detach())
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"embeds": embeds.grad}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_nothing_counted_gives_a_zero_loss_with_zero_gradients(tiny):
    model = tiny("llama").train()
    probe = flashsink.attach(model)
    ids = torch.randint(3, 60, (2, 6))
    with probe.spans(torch.tensor([1, 0])):
        model(input_ids=ids)
    assert probe.decorrelation_loss.item() == 0.0 and probe.decorrelation_count.item() == 0
    probe.decorrelation_loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_detach_leaves_the_model_as_it_was(model, implementation):
    decoder(model).set_attn_implementation(implementation)
    ids = torch.randint(3, 60, (2, 8))
    before, count = model(input_ids=ids).logits, hooks(model)
    probe = flashsink.attach(model)
    assert model.config._attn_implementation != implementation
    assert hooks(model) > count
    model(input_ids=ids)
    sinks, loss = probe.sinks[0].received, probe.decorrelation_loss
    probe.detach()
    assert model.config._attn_implementation == implementation
    assert decoder(model).config._attn_implementation == implementation
    assert hooks(model) == count
    assert torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=ids[:, :5])
    # it stays readable, untouched by forwards of the detached model
    assert torch.equal(probe.sinks[0].received, sinks)
    assert torch.equal(probe.decorrelation_loss, loss)
    probe.detach()  # harmless
    assert model.config._attn_implementation == implementation
    flashsink.attach(model).detach()


@torch.no_grad()
def test_a_second_probe_is_refused_and_does_no_harm(model):
    probe = flashsink.attach(model)
    ids = torch.randint(3, 60, (2, 8))
    before, count = model(input_ids=ids).logits, hooks(model)
    with pytest.raises(ValueError, match="model.*attached already"):
        flashsink.attach(model)
    assert hooks(model) == count
    assert torch.equal(model(input_ids=ids).logits, before)
    assert len(probe.sinks) == 3


def test_a_dropped_model_is_freed(tiny):
    """Nothing global keeps an attached model alive."""
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=torch.randint(3, 60, (1, 4)))
    alive = weakref.ref(model.model.layers[0])
    del model, probe
    gc.collect()
    assert alive() is None
