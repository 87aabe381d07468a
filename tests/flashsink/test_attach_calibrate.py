"""probe.calibrate: ACT inside a model, in one forward and in generation."""

from __future__ import annotations

import functools

import decoders
import oracle
import pytest
import torch
from decoders import decoder, generate

import flashsink
from flashsink.hf.attention import Call

prompts = functools.partial(decoders.prompts, tokens=9, seed=5)
EVERY_HEAD = [(layer, head) for layer in range(3) for head in range(4)]


class Layer:
    """What attention of one layer reads and writes: its input and the input of its output projection."""

    def __init__(self, model, index):
        self.module = decoder(model).layers[index]
        self.handles = [
            self.module.self_attn.v_proj.register_forward_hook(lambda m, args, out: setattr(self, "v", out)),
            self.module.self_attn.o_proj.register_forward_pre_hook(lambda m, args: setattr(self, "out", args[0])),
        ]

    def close(self):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("beta", "threshold"), [(0.4, 0.1), (0.0, 0.25)])
@pytest.mark.parametrize("starts", [[0, 0], [0, 4]], ids=["no padding", "left padding"])
def test_a_prefill_equals_act_by_hand_in_one_layer(model, index, beta, threshold, starts):
    ids, mask = prompts(starts)
    decoder(model).set_attn_implementation("eager")
    seen = model(input_ids=ids, attention_mask=mask, output_attentions=True)
    decoder(model).set_attn_implementation("sdpa")
    probs = seen.attentions[index].double() * mask[:, None, :, None]
    probe = flashsink.attach(model)
    layer = Layer(model, index)
    model(input_ids=ids, attention_mask=mask)
    plain = layer.out
    heads = [0, 3]
    probe.calibrate([(index, h) for h in heads], beta=beta, threshold=threshold)
    logits = model(input_ids=ids, attention_mask=mask).logits
    layer.close()
    v = layer.v.view(2, 9, 2, -1).transpose(1, 2)
    # ACT's own mean: the column's sum over the number of its queries
    mean = probs.sum(2) / (9 - torch.arange(9.0))
    sinks = mean > threshold
    assert (mean - threshold).abs().min() > 1e-6
    sinks[:, [h for h in range(4) if h not in heads]] = False
    sinks &= mask[:, None].bool()
    rows = [[(first, 9)] for first in starts]
    want = oracle.weigh(oracle.act(probs, sinks, rows, beta), v).transpose(1, 2).flatten(2)
    keep = mask.bool()
    torch.testing.assert_close(layer.out[keep].double(), want[keep], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer.out[keep], plain[keep])
    assert not torch.allclose(logits[keep], seen.logits[keep])
    # heads that were not chosen are as before; probe.sinks are from before the correction
    untouched = layer.out.view(2, 9, 4, -1)[:, :, [1, 2]], plain.view(2, 9, 4, -1)[:, :, [1, 2]]
    torch.testing.assert_close(*(x[keep] for x in untouched))
    torch.testing.assert_close(probe.sinks[index].received.double(), probs.sum(2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_none_restores_the_logits(model):
    ids, mask = prompts([0, 4])
    probe = flashsink.attach(model)
    before = model(input_ids=ids, attention_mask=mask).logits
    probe.calibrate(EVERY_HEAD)
    during = model(input_ids=ids, attention_mask=mask).logits
    probe.calibrate(None)
    after = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(during, before)
    assert torch.equal(after, before)
    probe.calibrate(EVERY_HEAD)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, during)
    probe.detach()
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beta_one_is_no_change(model):
    ids, mask = prompts([0, 4])
    probe = flashsink.attach(model)
    before, tokens = model(input_ids=ids, attention_mask=mask).logits, generate(model, ids, mask)
    probe.calibrate(EVERY_HEAD, beta=1.0)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(generate(model, ids, mask), tokens)


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_sinks_can_be_read(model, beta):
    """Those of the calibrated heads alone; with beta = 1 every layer's are those of the unchanged model."""
    ids, mask = prompts([0, 4])
    probe = flashsink.attach(model)
    model(input_ids=ids, attention_mask=mask)
    mean = [stats.mean_received for stats in probe.sinks]
    probe.calibrate([(0, 1), (2, 0), (2, 3)], beta=beta, threshold=0.15)
    model(input_ids=ids, attention_mask=mask)
    sinks = probe.calibrated_sinks
    assert set(sinks) == {0, 2}
    inner = (mask.cumsum(1) > 1)[:, None]
    for layer, heads in ((0, [1]), (2, [0, 3])):
        want = (mean[layer] > 0.15) & inner
        want[:, [h for h in range(4) if h not in heads]] = False
        assert want.any()
        assert torch.equal(sinks[layer], want) or (beta < 1 and layer == 2)  # layer 0 has changed layer 2's input


@torch.no_grad()
@pytest.mark.parametrize("starts", [[0, 0], [0, 4]], ids=["no padding", "left padding"])
def test_text_after_the_span_is_treated_as_while_decoding(model, starts):
    """One forward over prompt and text gives the logits of a prefill with the prompt and one step with the text."""
    ids, mask = prompts(starts, tokens=14)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    probe = flashsink.attach(model)
    probe.calibrate(EVERY_HEAD, beta=0.2, threshold=0.15)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 9:]
    with probe.spans(9 - torch.tensor(starts)):
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 9:]
    sinks = probe.calibrated_sinks
    cache = model(
        input_ids=ids[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], use_cache=True
    ).past_key_values
    for layer, chosen in probe.calibrated_sinks.items():
        assert torch.equal(sinks[layer], torch.nn.functional.pad(chosen, (0, 5)))
    step = model(input_ids=ids[:, 9:], attention_mask=mask, position_ids=positions[:, 9:], past_key_values=cache)
    torch.testing.assert_close(got, step.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "static cache"],
)
def test_a_left_padded_row_gives_the_same_tokens_alone(model, mode):
    starts = [0, 2, 5]
    ids, mask = prompts(starts)
    plain = generate(model, ids, mask, **mode)
    probe = flashsink.attach(model)
    probe.calibrate(EVERY_HEAD, beta=0.1, threshold=0.15)
    together = generate(model, ids, mask, **mode)
    assert not torch.equal(together, plain)
    for b, first in enumerate(starts):
        alone = generate(model, ids[b : b + 1, first:], mask[b : b + 1, first:], **mode)
        assert alone[0, 9 - first :].tolist() == together[b, 9:].tolist()


@torch.no_grad()
def test_the_sinks_of_the_prompt_are_kept_while_decoding(model):
    """The first decode step against ACT by hand, with the sinks of the prefill."""
    ids, mask = prompts([0, 4])
    decoder(model).set_attn_implementation("eager")
    probs = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0].double()
    decoder(model).set_attn_implementation("sdpa")
    probe = flashsink.attach(model)
    probe.calibrate([(0, h) for h in range(4)], beta=0.2)
    prompt = (probs[:, :, :8, :8] * mask[:, None, :8, None]).sum(2) / (8 - torch.arange(8.0))
    sinks = torch.nn.functional.pad(prompt > 0.1, (0, 1)) & mask[:, None].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = model(
        input_ids=ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], use_cache=True
    ).past_key_values
    values = []
    layer = Layer(model, 0)
    model(input_ids=ids[:, 8:], attention_mask=mask, position_ids=positions[:, 8:], past_key_values=cache)
    got = layer.out
    layer.close()
    values = cache.layers[0].values
    want = oracle.weigh(oracle.act(probs[:, :, 8:], sinks, [[(0, 9)], [(4, 9)]], 0.2), values)
    torch.testing.assert_close(got.double(), want.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"queries": "after_span"}, {"stats_every": 2}, {"activations": False}])
def test_act_does_not_depend_on_what_is_reported(tiny, options):
    """ACT's mean is over all queries of the prompt (definition 5), whatever the statistics count."""
    model = tiny("llama")
    ids, mask = prompts([0, 4])
    results = []
    for chosen in ({}, options):
        probe = flashsink.attach(model, **chosen)
        probe.calibrate(EVERY_HEAD)
        for _ in range(2):
            with probe.spans(torch.tensor([4, 3])):
                results.append(model(input_ids=ids, attention_mask=mask).logits)
        probe.detach()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(("queries", "spans", "groups"), [("all", None, 1), ("all", 4, 2)])
def test_no_group_of_queries_is_counted_twice(tiny, monkeypatch, queries, spans, groups):
    """What is reported and what ACT needs come from one attention call, each group of queries once."""
    counts = []
    run = Call.run

    def count(self, backend, counted, segments=None):
        counts.append(len(counted))
        return run(self, backend, counted, segments)

    monkeypatch.setattr(Call, "run", count)
    model = tiny("llama")
    probe = flashsink.attach(model, queries=queries)
    probe.calibrate(EVERY_HEAD)
    ids, mask = prompts([0, 4])
    with probe.spans(None if spans is None else torch.tensor([spans, spans])):
        model(input_ids=ids, attention_mask=mask)
    assert set(counts) == {groups} and len(probe.sinks) == len(counts)


def test_a_checkpointed_training_with_calibration_in_triton(tiny):
    """There the statistics of one group wait for the backward, unless ACT reads them."""
    grads, ids = [], prompts([0, 0])[0]
    for backend in ("reference", "triton"):
        model = tiny("llama").train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        probe = flashsink.attach(model, backend=backend)
        probe.calibrate(EVERY_HEAD)
        embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()
        grads.append(embeds.grad)
        assert all(stats.received.isfinite().all() for stats in probe.sinks)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_calibration(model, checkpointing):
    """The gradient is finite, and the recomputed layers see the same calibration."""
    ids, mask = prompts([0, 4])
    model.train()
    probe = flashsink.attach(model)
    probe.calibrate(EVERY_HEAD)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=ids, use_cache=False)
    (out.loss + probe.decorrelation_loss).backward()
    got = embeds.grad.clone()
    assert got.isfinite().all() and got.any()
    model.gradient_checkpointing_disable()
    embeds.grad = None
    out = model(inputs_embeds=embeds, attention_mask=mask, labels=ids, use_cache=False)
    (out.loss + probe.decorrelation_loss).backward()
    torch.testing.assert_close(got, embeds.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("heads", {"heads": [(3, 0)]}),
        ("heads", {"heads": [(0, 4)]}),
        ("heads", {"heads": [(-1, 0)]}),
        ("beta", {"heads": [(0, 0)], "beta": 1.2}),
        ("beta", {"heads": [(0, 0)], "beta": -0.1}),
        ("threshold", {"heads": [(0, 0)], "threshold": 0.0}),
        ("threshold", {"heads": [(0, 0)], "threshold": 1.0}),
    ],
)
@torch.no_grad()
def test_wrong_arguments(tiny, argument, options):
    model = tiny("llama")
    ids, mask = prompts([0, 4])
    probe = flashsink.attach(model)
    before = model(input_ids=ids, attention_mask=mask).logits
    with pytest.raises(ValueError, match=argument):
        probe.calibrate(**options)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


@torch.no_grad()
def test_packed_sequences_are_calibrated_each_for_itself(model):
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    ids = torch.randint(3, 60, (1, 12))
    probe = flashsink.attach(model)
    probe.calibrate(heads, beta=0.4, threshold=0.15)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    with probe.spans(torch.tensor([3, 4])):
        spanned = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for first, end, span in ((0, 5, 3), (5, 12, 4)):
        alone = model(input_ids=ids[:, first:end], use_cache=False).logits
        torch.testing.assert_close(packed[:, first:end], alone, rtol=1e-4, atol=1e-4)
        with probe.spans(torch.tensor([span])):
            alone = model(input_ids=ids[:, first:end], use_cache=False).logits
        torch.testing.assert_close(spanned[:, first:end], alone, rtol=1e-4, atol=1e-4)
