"""Masks as numbers: windows and chunks of a model's own reach the kernels as such, not as (Sq, Sk) masks.

Held to the model's own eager attention, and to transformers' own masks.
"""

from __future__ import annotations

import families
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashsink
from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.hf import encoded, mask_functions
from flashsink.hf.observers import AttentionObserver
from flashsink.types import Pattern

pytestmark = pytest.mark.integration

WINDOW, CHUNK = Pattern(window=5), Pattern(chunk=5)
PATTERNS = {"full_attention": None, "sliding_attention": WINDOW, "chunked_attention": CHUNK}
MODELS = ("mistral", "qwen2", "gemma2", "gemma3", "gpt_oss", "llama4")
TOKENS = 12


def inputs(kind):
    ids = torch.randint(3, 50, (1 if kind == "packed" else 2, TOKENS), generator=torch.Generator().manual_seed(1))
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(3), torch.arange(9)])[None]}
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, slice(7, None) if kind == "right" else slice(0, 2)] = 0
    return {"input_ids": ids} if kind == "whole" else {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def seen(monkeypatch):
    """The pattern of every attention call."""
    found = []
    plain = AttentionObserver.attend

    def attend(self, index, call, record):
        found.append(call.pattern)
        return plain(self, index, call, record)

    monkeypatch.setattr(AttentionObserver, "attend", attend)
    return found


@pytest.mark.parametrize("kind", ["whole", "right", "left", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_window_travels_as_a_number(name, kind, seen):
    model, given = families.build(name), inputs(kind)
    keep = given.get("attention_mask", torch.ones(given["input_ids"].shape)).bool()
    model.set_attn_implementation("eager")
    want = model(**given, output_attentions=True, use_cache=False)
    probe = flashsink.attach(model)
    got = model(**given, use_cache=False).logits
    torch.testing.assert_close(got[keep], want.logits[keep], rtol=1e-4, atol=1e-4)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * model.config.num_hidden_layers
    assert seen == [PATTERNS[kind] for kind in kinds] and any(seen)
    for stats, own in zip(probe.sinks, want.attentions, strict=True):
        received = (own * keep[:, None, :, None]).sum(dim=2)
        valid = keep[:, None].expand_as(received)
        torch.testing.assert_close(stats.received[valid], received[valid], rtol=1e-4, atol=1e-4)


def test_a_window_that_leaves_nothing_out_is_none(seen):
    model = families.build("mistral", sliding_window=TOKENS)
    flashsink.attach(model)
    model(**inputs("right"))
    assert set(seen) == {None}


def test_a_checkpointed_layer_with_a_window(seen):
    model, given = families.build("mistral"), inputs("left")
    flashsink.attach(model)
    grads = []
    for active in (False, True):
        if active:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model.zero_grad()
        model(**given, use_cache=False).logits[given["attention_mask"].bool()].tanh().sum().backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[0].abs().max()))
    assert seen == [WINDOW] * 3 * model.config.num_hidden_layers  # once more in the backward


def test_chunks_that_begin_elsewhere_than_the_tokens(seen, monkeypatch):
    """They are none of flashsink's, whose first token is valid, so they stay a mask."""
    from transformers import masking_utils

    plain = masking_utils.chunked_causal_mask_function
    monkeypatch.setattr(masking_utils, "chunked_causal_mask_function", lambda size, start: plain(size, start + 1))
    model, given = families.build("llama4"), inputs("left")
    keep = given["attention_mask"].bool()
    want = model(**given).logits
    flashsink.attach(model)
    torch.testing.assert_close(model(**given).logits[keep], want[keep], rtol=1e-4, atol=1e-4)
    assert seen and all(pattern is None or pattern.named() == ["mask"] for pattern in seen)
    assert any(pattern is not None for pattern in seen)


def say(function):
    return mask_functions.read({"mask_function": function, "q_length": 40})


def test_what_mask_functions_say():
    from transformers import masking_utils as own

    causal, window = own.causal_mask_function, own.sliding_window_overlay(7)
    both = own.sliding_window_causal_mask_function(7)
    assert say(causal) == (True, None, None, None)
    assert say(both).plain and say(both).pattern == Pattern(window=7)
    two = say(own.and_masks(both, own.chunked_overlay(9, torch.zeros(1))))
    assert two.plain and two.pattern == Pattern(window=7, chunk=9)
    assert say(own.sliding_window_causal_mask_function(40)) == (True, None, None, None)
    sequence = torch.tensor([[0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1]])
    packed = say(own.packed_sequence_compatibility_function(both, positions, sequence))
    assert packed.plain and packed.sequence is sequence and packed.pattern == Pattern(window=7)
    # chunks that are counted through all sequences of a row
    chunks = own.chunked_causal_mask_function(7, torch.zeros(1))
    through = own.and_masks(chunks, own.packed_sequence_mask_function(sequence))
    assert not say(through).plain
    # more than causal, or less
    for other in (
        window,  # of an encoder
        own.and_masks(window, own.bidirectional_mask_function),
        own.or_masks(both, lambda b, h, q, k: q == k),
        own.or_masks(causal, window),
        own.and_masks(causal, lambda b, h, q, k: k != 3),
        own.and_masks(both, own.sliding_window_overlay(5)),  # two windows
        own.sliding_window_causal_mask_function(0),
        own.sliding_window_causal_mask_function(torch.tensor(7)),
    ):
        assert not say(other).plain


@pytest.mark.parametrize("pattern", [None, Pattern(window=3), Pattern(chunk=4), Pattern(window=9, chunk=4)])
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_and_back(packed, pattern):
    starts, lengths = torch.tensor([0, 2, 1]), torch.tensor([7, 5, 0])
    if packed:
        layout = resolve_layout(1, 17, starts.device, cu_seqlens=torch.tensor([0, 5, 5, 17]))
    else:
        layout = resolve_layout(3, 7, starts.device, starts=starts, lengths=lengths)
    first = layout.starts + 1
    mask = encoded.encode(layout, first, pattern)
    for mine in (mask, mask.clone(), mask.contiguous(), mask.to(torch.int64), mask.detach()):
        assert encoded.is_encoded(mine) and encoded.is_packed(mine) == packed
        assert encoded.pattern_of(mine) == pattern
        back, queries = encoded.decode(mine, layout.rows, layout.tokens)
        assert torch.equal(queries, first)
        for field in ("starts", "lengths", "rows", "tokens", "packed"):
            a, b = getattr(back, field), getattr(layout, field)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        visible = [reference.visible(own, layout.tokens, True, pattern) for own in (back, layout)]
        assert torch.equal(*visible)


def test_masks_that_are_no_numbers():
    for mask in (
        None,
        torch.ones(2, 1, 5, 5, dtype=torch.bool),
        torch.ones(2, 12, dtype=torch.long),
        torch.ones(2, 3, 1, 1),
        torch.ones(2, 3, 1, 500, dtype=torch.long),  # no pattern has this number
    ):
        assert not encoded.is_encoded(mask)


def test_a_mask_through_a_checkpoint():
    layout = resolve_layout(2, 6, torch.device("cpu"))
    mask = encoded.encode(layout, None, Pattern(window=2))

    def layer(x, mask):
        assert encoded.pattern_of(mask) == Pattern(window=2)
        return x * 2

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, mask, use_reentrant=True).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
