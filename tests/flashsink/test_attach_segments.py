"""attach(segment_mass=True): attention between segments and the entropy of every query, against eager weights."""

from __future__ import annotations

import decoders
import pytest
import torch
from decoders import ids

import flashsink

pytestmark = pytest.mark.integration


@torch.no_grad()
def weights_of(model, **call):
    """A of every layer (B, H, S, S), as the model's eager attention has it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = model(**call, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return found


def check(stats, a, kinds, n, valid, first=None):
    """``kinds`` (B, S), -1 for none; queries before ``first`` (B,) are not counted."""
    queries = valid & (torch.arange(a.shape[-1]) >= (torch.zeros(len(a), 1) if first is None else first[:, None]))
    a = a * valid[:, None, :, None]
    by = torch.stack([(a * (queries & (kinds == s))[:, None, :, None]).sum(2) for s in range(n)], dim=2)
    mass = torch.stack([(by * (valid & (kinds == s))[:, None, None]).sum(-1) for s in range(n)], dim=-1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(stats.segment_received, by, **close)
    torch.testing.assert_close(stats.segment_mass, mass, **close)
    torch.testing.assert_close(stats.entropy, torch.special.entr(a).sum(-1), **close)
    assert stats.segment_queries.tolist() == [
        [int((q & (k == s)).sum()) for s in range(n)] for q, k in zip(queries, kinds, strict=True)
    ]
    torch.testing.assert_close(stats.received, (a * queries[:, None, :, None]).sum(2), **close)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_by_ids_and_by_masks(tiny, padding, kind):
    """A token of two segments is of the first; masks of a forward stand before the ids that stay."""
    _, batch, mask, starts, lengths = padding
    model, valid = tiny(kind), decoders.valid(starts, lengths, 12)
    batch = batch.masked_fill(batch > 50, 40)
    call = {"input_ids": batch, "attention_mask": mask}
    want = weights_of(model, **call)
    probe = flashsink.attach(model, segment_mass=True)
    model(**call)
    assert probe.sinks[0].segment_mass is None and probe.segment_masks == {}
    groups = {"one": [40, *range(3, 12)], "two": list(range(8, 30))}
    probe.segments(groups)
    model(**call)
    kinds = torch.where(torch.isin(batch, torch.tensor(groups["two"])), 1, -1)
    kinds = kinds.masked_fill(torch.isin(batch, torch.tensor(groups["one"])), 0)
    for stats, a in zip(probe.sinks, want, strict=True):
        check(stats, a, kinds, 2, valid)
    place = torch.arange(12).expand(len(batch), -1)
    own = {"even": place % 2 == 0, "three": place % 3 == 0, "none": place < 0}
    with probe.spans(segments=own):
        model(**call)
    assert list(probe.segment_masks) == list(own)
    assert torch.equal(probe.segment_masks["three"], own["three"] & valid)
    kinds = torch.where(own["even"], 0, torch.where(own["three"], 1, -1))
    for stats, a in zip(probe.sinks, want, strict=True):
        check(stats, a, kinds, 3, valid)


def test_with_spans_and_queries_after_them(tiny):
    """Segments change nothing of the loss, and the counted queries are those of ``received``."""
    model, batch, spans = tiny("llama"), ids(3, 9), torch.tensor([4, 9, 1])
    want = weights_of(model, input_ids=batch)
    probe = flashsink.attach(model, segment_mass=True, queries="after_span")
    with probe.spans(spans):
        model(input_ids=batch)
    loss, count = float(probe.decorrelation_loss.detach()), int(probe.decorrelation_count)
    masks = {"odd": (batch % 2 == 1), "even": (batch % 2 == 0)}
    with probe.spans(spans, segments=masks):
        model(input_ids=batch)
    assert float(probe.decorrelation_loss.detach()) == loss and int(probe.decorrelation_count) == count
    kinds = torch.where(masks["odd"], 0, 1)
    for stats, a in zip(probe.sinks, want, strict=True):
        check(stats, a, kinds, 2, torch.ones(3, 9).bool(), spans)


def test_packed_sequences_have_masses_of_their_own(tiny):
    model, lengths = tiny("llama"), [4, 7]
    rows = [ids(1, n, seed=n) for n in lengths]
    probe = flashsink.attach(model, segment_mass=True)
    masks = [{"first": torch.arange(n)[None] < 2, "rest": torch.arange(n)[None] >= 2} for n in lengths]
    apart = []
    for row, own in zip(rows, masks, strict=True):
        with probe.spans(segments=own):
            model(input_ids=row)
        apart.append(probe.sinks)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    both = {name: torch.cat([own[name] for own in masks], dim=1) for name in masks[0]}
    with probe.spans(segments=both):
        model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False)
    for layer, stats in enumerate(probe.sinks):
        mass = torch.cat([own[layer].segment_mass for own in apart])
        torch.testing.assert_close(stats.segment_mass, mass, rtol=1e-4, atol=1e-5)
        entropy = torch.cat([own[layer].entropy for own in apart], dim=2)
        torch.testing.assert_close(stats.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_attention_of_the_models_own_code():
    """Dropout, which flashsink's operators do not compute: what is dropped is not missing."""
    torch.manual_seed(0)
    model = decoders.build("llama", attention_dropout=0.5)
    batch, kinds = ids(2, 8), torch.arange(8).expand(2, -1) % 2
    want = weights_of(model, input_ids=batch)
    probe = flashsink.attach(model.train(), segment_mass=True)
    with probe.spans(segments={"a": kinds == 0, "b": kinds == 1}):
        model(input_ids=batch)
    check(probe.sinks[0], want[0], kinds, 2, torch.ones(2, 8).bool())


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ({}, "segments: expected 1 to 64 names with .* got 0"),
        ([torch.ones(1, 8).bool()], "segments: expected 1 to 64 names with .* got list"),
        ({str(n): torch.ones(2, 8).bool() for n in range(65)}, "got 65"),
        ({"a": torch.ones(2, 8)}, r"segments: a: expected a \(B, S\) bool mask, got \(2, 8\) torch.float32"),
        ({"a": torch.ones(8).bool()}, r"segments: a: expected a \(B, S\) bool mask"),
        ({"a": torch.ones(2, 7).bool()}, r"segments: expected .* of the layers' \(2, 8\) tokens, got \(2, 7\)"),
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_bad_masks(tiny, segments, words, measured):
    model = tiny("llama")
    probe = flashsink.attach(model, segment_mass=measured)
    with pytest.raises(ValueError, match=words), probe.spans(segments=segments):
        model(input_ids=ids(2, 8))


def test_what_cannot_be_measured_is_refused(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="segment_mass: expected with attention=True"):
        flashsink.attach(model, attention=False, segment_mass=True)
    probe = flashsink.attach(model, segment_mass=True)
    probe.segments({str(n): n for n in range(65)})
    with pytest.raises(ValueError, match="segments: expected at most 64 for segment_mass, got 65"):
        model(input_ids=ids(2, 8))


def test_a_compiled_model_measures_the_same(tiny):
    model, batch = tiny("llama"), ids(2, 8)
    probe = flashsink.attach(model, segment_mass=True)
    masks = {"odd": batch % 2 == 1, "even": batch % 2 == 0}

    def run(called):
        with torch.no_grad(), probe.spans(segments=masks):
            called(input_ids=batch, use_cache=False)
        return [(stats.segment_mass, stats.entropy) for stats in probe.sinks]

    want = run(model)
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager")), want, rtol=1e-5, atol=1e-6)
