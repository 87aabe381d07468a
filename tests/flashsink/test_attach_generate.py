"""Generation through an attached model: the same tokens, and a probe that still describes the prompt."""

from __future__ import annotations

import pytest
import torch
from decoders import MODES, NEW, generate, prompts
from transformers import DynamicCache

import flashsink

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("starts", [[0, 0], [0, 3, 5]], ids=["no padding", "left padding"])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_tokens(model, mode, starts):
    ids, mask = prompts(starts)
    want = generate(model, ids, mask, **MODES[mode])
    probe = flashsink.attach(model)
    got = generate(model, ids, mask, **MODES[mode])
    probe.detach()
    assert want.shape == (len(starts), 7 + NEW)
    assert torch.equal(got, want)
    assert torch.equal(generate(model, ids, mask, **MODES[mode]), want)


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache"])
def test_a_left_padded_row_gives_the_same_tokens_alone(model, mode):
    starts = [0, 3, 5]
    ids, mask = prompts(starts)
    flashsink.attach(model)
    together = generate(model, ids, mask, **MODES[mode])[:, 7:]
    for b, first in enumerate(starts):
        alone = generate(model, ids[b : b + 1, first:], mask[b : b + 1, first:], **MODES[mode])
        assert alone[0, 7 - first :].tolist() == together[b].tolist()


@pytest.mark.parametrize("mode", ["greedy", "static cache"])
def test_decode_steps_leave_the_probe_untouched(model, mode):
    ids, mask = prompts([0, 3, 5])
    probe = flashsink.attach(model, median=True)
    with torch.no_grad(), probe.spans(torch.tensor([4, 2, 1])):
        model(input_ids=ids, attention_mask=mask)
    want, loss, top = probe.sinks, probe.decorrelation_loss, probe.activations
    with probe.spans(torch.tensor([4, 2, 1])):
        generate(model, ids, mask, **MODES[mode])
    # the last full forward is now the prefill of generate, over the same prompt
    for got, expected in zip(probe.sinks, want, strict=True):
        torch.testing.assert_close(got.received, expected.received, rtol=1e-4, atol=1e-5)
        assert torch.equal(got.queries, expected.queries)
    torch.testing.assert_close(probe.decorrelation_loss, loss)
    torch.testing.assert_close(probe.activations.max_abs, top.max_abs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.activations.median, top.median, rtol=1e-4, atol=1e-5)
    assert torch.equal(probe.activations.feature, top.feature)


@torch.no_grad()
def test_steps_by_hand_equal_the_full_forward(model, padding):
    kind, ids, mask, starts, lengths = padding
    if kind in ("right", "both"):
        ids, mask = prompts([0, 4, 6], 12)
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    probe = flashsink.attach(model)
    cache = DynamicCache(config=model.config)
    parts, shapes = [], []
    for first, end in ((0, 8), (8, 9), (9, 12)):  # prefill, one token, three tokens at once
        out = model(
            input_ids=ids[:, first:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, first:end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(out.logits)
        shapes.append(tuple(probe.sinks[2].received.shape))
        before = probe.sinks[0].received.clone()
    assert shapes == [(3, 4, 8)] * 3
    assert torch.equal(probe.sinks[0].received, before)
    keep = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[keep], full[keep], rtol=1e-4, atol=1e-4)


def test_stats_every_counts_prefills_not_steps(tiny):
    model = tiny("llama")
    ids, mask = prompts([0, 2])
    probe = flashsink.attach(model, stats_every=2)
    generate(model, ids, mask)
    assert probe.sinks[0].received.shape == (2, 4, 7)
    generate(model, ids, mask)
    with pytest.raises(RuntimeError, match="stats_every"):
        _ = probe.sinks
    generate(model, ids, mask)
    assert len(probe.sinks) == 3


@pytest.mark.parametrize("mode", ["greedy", "static cache"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_generation_without_attention(tiny, kind, mode):
    model = tiny(kind)
    ids, mask = prompts([0, 3])
    want = generate(model, ids, mask, **MODES[mode])
    probe = flashsink.attach(model, attention=False)
    assert torch.equal(generate(model, ids, mask, **MODES[mode]), want)
    assert probe.activations.max_abs.shape == (3, 2, 7) and probe.decorrelation_loss > 0
    assert not probe.activations.max_abs[:, 1, :3].any()


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache"])
def test_generation_from_embeddings(model, mode):
    """How speech is decoded: the prompt comes as inputs_embeds, left-padded."""
    _, mask = prompts([0, 3, 5])
    embeds = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(8)) * mask[:, :, None]
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0} | MODES[mode]
    want = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    probe = flashsink.attach(model)
    with probe.spans(torch.tensor([7, 4, 2] if mode != "beams" else [7, 7, 7, 4, 4, 4, 2, 2, 2])):
        got = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert want.shape == (3, NEW) and torch.equal(got, want)
    assert probe.sinks[0].received.shape[2] == 7 and probe.decorrelation_loss > 0


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_that_outgrows_its_window_while_decoding(tiny, kind, mode):
    """Where the cache drops old keys."""
    options = {} if kind == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny(kind, sliding_window=8, **options)
    ids, mask = prompts([3, 0])
    want = generate(model, ids, mask, **MODES[mode])
    flashsink.attach(model)
    assert torch.equal(generate(model, ids, mask, **MODES[mode]), want)


def test_training_forwards_and_generation_alternate(tiny):
    model = tiny("llama")
    ids, mask = prompts([0, 3])
    probe = flashsink.attach(model)
    want = generate(model, ids, mask)
    for _ in range(2):
        model.train()
        out = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        (out.loss + probe.decorrelation_loss).backward()
        model.eval()
        assert torch.equal(generate(model, ids, mask), want)
