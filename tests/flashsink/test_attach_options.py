"""The options of attach, and what a probe remembers."""

from __future__ import annotations

import pytest
import torch
from decoders import ids

import flashsink


@torch.no_grad()
@pytest.mark.parametrize("off", ["attention", "decorrelation", "activations"])
def test_each_part_can_be_left_out(model, off):
    plain = model(input_ids=ids()).logits
    probe = flashsink.attach(model)
    model(input_ids=ids())
    want = {name: getattr(probe, name) for name in ("sinks", "decorrelation_loss", "activations")}
    probe.detach()
    probe = flashsink.attach(model, **{off: False})
    torch.testing.assert_close(model(input_ids=ids()).logits, plain, rtol=1e-5, atol=1e-5)
    if off == "attention":
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError, match="attention"):
            _ = probe.sinks
        with pytest.raises(ValueError, match="heads"):
            probe.calibrate([(0, 0)])
    else:
        torch.testing.assert_close(probe.sinks[2].received, want["sinks"][2].received)
    if off == "decorrelation":
        with pytest.raises(RuntimeError, match="decorrelation"):
            _ = probe.decorrelation_loss
    else:
        torch.testing.assert_close(probe.decorrelation_loss, want["decorrelation_loss"])
    if off == "activations":
        with pytest.raises(RuntimeError, match="activations"):
            _ = probe.activations
    else:
        torch.testing.assert_close(probe.activations.max_abs, want["activations"].max_abs)
    probe.detach()
    assert torch.equal(model(input_ids=ids()).logits, plain)


def test_nothing_to_read_before_the_first_forward(tiny):
    probe = flashsink.attach(tiny("llama"))
    for name in ("sinks", "decorrelation_loss", "activations"):
        with pytest.raises(RuntimeError):
            getattr(probe, name)


@torch.no_grad()
def test_the_probe_describes_the_last_forward(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids(2, 8))
    first, loss = probe.sinks, probe.decorrelation_loss
    model(input_ids=ids(3, 5, seed=1))
    assert probe.sinks[0].received.shape == (3, 4, 5) and probe.activations.max_abs.shape == (3, 3, 5)
    assert first[0].received.shape == (2, 4, 8)
    model(input_ids=ids(2, 8))
    torch.testing.assert_close(probe.decorrelation_loss, loss)


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3])
def test_stats_every(tiny, every):
    model = tiny("qwen2")
    probe = flashsink.attach(model, stats_every=every)
    for step in range(5):
        batch = ids(2, 6 + step, seed=step)
        model(input_ids=batch)
        assert probe.decorrelation_loss > 0
        if step % every == 0:
            assert len(probe.sinks) == 3 and probe.sinks[0].received.shape == (2, 4, 6 + step)
            assert probe.activations.max_abs.shape == (3, 2, 6 + step)
        else:
            for name in ("sinks", "activations"):
                with pytest.raises(RuntimeError, match="stats_every"):
                    getattr(probe, name)


@torch.no_grad()
def test_queries_after_the_span(model, padding):
    _, batch, mask, starts, lengths = padding
    spans = (lengths + 1) // 2
    base = flashsink.attach(model)
    model(input_ids=batch, attention_mask=mask)
    base.detach()
    model.set_attn_implementation("eager")
    maps = model(input_ids=batch, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    probe = flashsink.attach(model, queries="after_span")
    with probe.spans(spans):
        model(input_ids=batch, attention_mask=mask)
    for stats, a in zip(probe.sinks, maps, strict=True):
        for b in range(3):
            first, end = int(starts[b]), int(starts[b] + lengths[b])
            queries = range(first + int(spans[b]), end)
            expected = sum((a[b, :, i] for i in queries), torch.zeros(4, 12))
            torch.testing.assert_close(stats.received[b], expected, rtol=1e-5, atol=1e-5)
            seen = [sum(i >= j for i in queries) if first <= j < end else 0 for j in range(12)]
            assert stats.queries[b].tolist() == seen


@torch.no_grad()
def test_queries_after_the_span_in_a_packed_row(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model, queries="after_span")
    batch, spans = ids(1, 10), torch.tensor([4, 2])
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    with probe.spans(spans):
        model(input_ids=batch, position_ids=positions, use_cache=False)
    packed = probe.sinks
    for first, end, span in ((0, 6, 4), (6, 10, 2)):
        with probe.spans(torch.tensor([span])):
            model(input_ids=batch[:, first:end])
        for stats, alone in zip(packed, probe.sinks, strict=True):
            torch.testing.assert_close(stats.received[:, :, first:end], alone.received, rtol=1e-4, atol=1e-5)
            assert torch.equal(stats.queries[:, first:end], alone.queries)


@torch.no_grad()
def test_median_only_on_request(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    assert probe.activations.median is None
    probe.detach()
    probe = flashsink.attach(model, median=True)
    model(input_ids=ids())
    assert probe.activations.median.shape == (3, 2) and (probe.activations.median > 0).all()


@torch.no_grad()
def test_spans_are_captured_at_the_forward(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    everything = probe.decorrelation_loss
    spans = torch.tensor([3, 5])
    with probe.spans(spans):
        model(input_ids=ids())
    inside, count = probe.decorrelation_loss.clone(), probe.decorrelation_count
    spans.fill_(2)
    assert torch.equal(probe.decorrelation_loss, inside) and int(probe.decorrelation_count) == int(count) == 6
    assert not torch.allclose(inside, everything)
    model(input_ids=ids())  # outside the context every valid token counts again
    torch.testing.assert_close(probe.decorrelation_loss, everything)


@torch.no_grad()
@pytest.mark.parametrize(
    "spans",
    [
        torch.tensor([3]),
        torch.tensor([3, 9]),
        torch.tensor([-1, 3]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[3, 3]]),
    ],
    ids=["size", "too long", "negative", "float", "matrix"],
)
def test_wrong_spans_are_refused_and_the_probe_goes_on(tiny, spans):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    want = probe.decorrelation_loss
    with pytest.raises(ValueError, match="spans"), probe.spans(spans):
        model(input_ids=ids())
    model(input_ids=ids())
    torch.testing.assert_close(probe.decorrelation_loss, want)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("margin", {"margin": 1.0}),
        ("margin", {"margin": -0.5}),
        ("stats_every", {"stats_every": 0}),
        ("queries", {"queries": "some"}),
        ("backend", {"backend": "cuda"}),
        ("module", {"module": "no_such_tower"}),
    ],
)
def test_wrong_options(tiny, argument, options):
    model = tiny("llama")
    with pytest.raises(ValueError, match=argument):
        flashsink.attach(model, **options)
    flashsink.attach(model).detach()  # nothing was left behind


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(ValueError, match="model"):
        flashsink.attach(torch.nn.Sequential(torch.nn.Linear(3, 3)))


@torch.no_grad()
def test_two_models_have_their_own_probes(tiny):
    a, b = tiny("llama"), tiny("qwen3", seed=1)
    probe_a, probe_b = flashsink.attach(a), flashsink.attach(b)
    a(input_ids=ids(2, 8))
    loss = probe_a.decorrelation_loss
    b(input_ids=ids(3, 5))
    assert torch.equal(probe_a.decorrelation_loss, loss)
    assert probe_a.sinks[0].received.shape == (2, 4, 8) and probe_b.sinks[0].received.shape == (3, 4, 5)
    probe_a.detach()
    b(input_ids=ids(3, 6))
    assert probe_b.sinks[0].received.shape == (3, 4, 6)
    assert a(input_ids=ids(2, 8)).logits.isfinite().all()


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_probe_usable(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    want = probe.decorrelation_loss
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids())
    handle.remove()
    model(input_ids=ids())
    torch.testing.assert_close(probe.decorrelation_loss, want)
    assert len(probe.sinks) == 3 and probe.activations.max_abs.shape[0] == 3


@torch.no_grad()
def test_a_row_without_tokens(tiny):
    model = tiny("llama")
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1] = 0
    plain = model(input_ids=ids(3, 6), attention_mask=mask).logits
    probe = flashsink.attach(model, median=True)
    got = model(input_ids=ids(3, 6), attention_mask=mask).logits
    torch.testing.assert_close(got[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-5)
    assert probe.decorrelation_loss.isfinite() and int(probe.decorrelation_count) == 10
    assert not probe.sinks[1].received[1].any() and not probe.activations.max_abs[:, 1].any()
    assert (probe.activations.feature[:, 1] == -1).all() and not probe.activations.median[:, 1].any()


@torch.no_grad()
def test_positional_arguments_of_the_decoder(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model.model(ids(2, 6), mask)
    assert probe.sinks[0].queries[0].tolist() == [0, 0, 4, 3, 2, 1]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    model.model(ids(1, 6), None, packed, use_cache=False)
    assert probe.sinks[0].queries[0].tolist() == [3, 2, 1, 3, 2, 1]
    cache = model.model(ids(1, 6)).past_key_values
    model.model(ids(1, 1, seed=3), None, None, cache)  # a decode step
    assert probe.sinks[0].received.shape == (1, 4, 6)


def test_autocast(tiny):
    """Rotary embeddings leave queries and keys in float32 and values in bfloat16."""
    model = tiny("llama").train()
    ids = torch.randint(3, 60, (2, 9))
    probe = flashsink.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    (out.loss + probe.decorrelation_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
