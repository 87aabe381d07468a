"""Nothing between a call and its kernels waits for the device: no value is read on the host, as a CUDA graph wants it.

On a CPU the values of lengths, starts and bounds are checked, which reads them; here that is switched off, as on a GPU.
"""

from __future__ import annotations

import families
import pytest
import torch
from decoders import build, ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import flashsink
from flashsink import checks, dispatch
from flashsink.hf import attention, layouts, masks, nonfinite, spans
from flashsink.triton import launch

pytestmark = pytest.mark.integration

# what reads values, or gives a shape that depends on them; lift_fresh: torch.tensor(), a copy to the device
STOPS = {
    *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor", "lift_fresh", "allclose"),
}


class NoStop(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        flags = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        if {name, str(func).removeprefix("aten.")} & STOPS or any(x.dtype == torch.bool for x in flags):
            raise AssertionError(f"a stop: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unstopped(monkeypatch):
    """A context in which a stop raises; kernels are left out, whose interpreter reads what it likes."""
    for module in (checks, attention, layouts, masks, nonfinite):
        monkeypatch.setattr(module, "check_values", lambda *_: False)
    assert spans.checks is checks

    def stop(*_, **__):
        raise AssertionError("a stop: a tensor is copied to the host")

    for name in ("tolist", "numpy", "cpu", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, stop)
    with launch.observe(lambda one: False):
        yield NoStop


def test_what_counts_as_a_stop(unstopped):
    x = torch.arange(3.0)
    for call in (
        lambda: bool(x.any()),
        lambda: int(x[0]),
        lambda: float(x[0]),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.tolist(),
        lambda: torch.tensor([1]),
        lambda: torch.equal(x, x),
    ):
        with pytest.raises(AssertionError, match="a stop"), unstopped():
            call()


def inputs(rows, tokens):
    q, k, v = (torch.randn(rows, heads, tokens, 16, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v, torch.randn(3, rows, tokens, 32, requires_grad=True)


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_public_functions(unstopped, kind):
    packed = kind == "packed"
    q, k, v, hidden = inputs(1 if packed else 2, 9)
    where = {"cu_seqlens": torch.tensor([0, 4, 9])} if packed else {"lengths": torch.tensor([9, 5])}
    places = {name: value for name, value in where.items() if packed} or {"starts": torch.tensor([0, 2])}
    span, sinks, logits = torch.tensor([3, 2]), torch.rand(2, 4, 9) > 0.5, torch.randn(4, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    up, ones = torch.randn(q.shape), torch.ones(())
    layout = checks.resolve_layout(len(q), 9, torch.device("cpu"), **where)
    pattern = {"window": 3, "softcap": 2.0, "prefix": torch.tensor([3, 2]), "blocks": torch.zeros(len(q), 9).long()}
    with unstopped():
        for options in ({}, {"sink_logits": logits}, pattern):
            out, stats = flashsink.attention(q, k, v, **where, **options, return_stats=True, backend="triton")
            out.backward(up)
            stats.sink_rate()
        with torch.no_grad():
            flashsink.attention(q, k, v, **where, return_stats=True, backend="triton")[1].sink_rate()
            if not packed:
                flashsink.attention(q[:, :, 8:], k, v, **where, backend="triton")
                flashsink.calibrated_attention(q, k, v, sinks, **where, backend="triton")
        flashsink.decorrelation_loss(hidden, span, **places, backend="triton").backward(ones)
        normed = dispatch.implementation("triton", "cpu").rms_norm(hidden[0], weight, 1e-5, layout, span, 0.0)
        torch.autograd.backward([normed.out, normed.total], [torch.ones_like(normed.out), ones])
        if not packed:
            flashsink.activation_stats(hidden, **where, backend="triton")


def attached(checkpointing=False, backend="triton", window=None):
    model = (build("llama") if window is None else build("mistral", sliding_window=window)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, flashsink.attach(model, backend=backend)


def train(model, probe, span, unstopped, **given):
    up = torch.ones(())
    with unstopped(), probe.spans(span):
        out = model.model(**given, use_cache=False).last_hidden_state
        (out.mean() + probe.decorrelation_loss).backward(up)


@pytest.mark.parametrize(("checkpointing", "window"), [(False, None), (True, None), (False, 3)])
def test_an_attached_model_over_packed_rows(unstopped, checkpointing, window):
    model, probe = attached(checkpointing, window=window)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    packing = {"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 4, 7, 12])}
    train(model, probe, torch.tensor([2, 1, 3]), unstopped, input_ids=ids(1, 12), **packing)


@pytest.mark.parametrize(("checkpointing", "window"), [(False, None), (True, None), (False, 3)])
def test_an_attached_model_over_padded_rows(unstopped, checkpointing, window):
    """Without a mask transformers itself looks whether the positions restart."""
    model, probe = attached(checkpointing, window=window)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    train(model, probe, torch.tensor([4, 3]), unstopped, input_ids=ids(2, 12), attention_mask=mask)


def test_a_step_of_decoding_with_a_static_cache(unstopped):
    """Its mask is a pattern, which on a GPU the reference computes."""
    model, _ = attached(backend="reference")
    model.eval()
    cache = StaticCache(config=model.config, max_cache_len=16)
    batch, mask = ids(2, 12), torch.ones(2, 16, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=batch, past_key_values=cache)
        step = {"input_ids": batch[:, :1], "position_ids": torch.full((2, 1), 12)}
        with unstopped():
            model(**step, attention_mask=mask, past_key_values=cache)


# ---- bounds beside positions that restart


def packing(*sizes):
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    return {"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, *sizes]).cumsum(0).int()}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", [(4, 3, 5), (12,), (1, 11)])
def test_bounds_change_nothing(sizes, window):
    model, given, batch = build("mistral", sliding_window=window), packing(*sizes), ids(1, 12)
    with torch.no_grad():
        parts = [model(input_ids=own).logits for own in batch.split(sizes, dim=1)]
        probe = flashsink.attach(model)
        found = []
        for bounds in ({}, {"cu_seq_lens_q": given["cu_seq_lens_q"]}):
            logits = model(input_ids=batch, position_ids=given["position_ids"], use_cache=False, **bounds).logits
            found.append([logits, probe.decorrelation_loss, *(own.received for own in probe.sinks)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[1][0], torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bounds_are_the_models_own_where_attention_is():
    """With attention=False the model packs by the positions itself."""
    model, given, batch = build("llama"), packing(4, 3, 5), ids(1, 12)
    want = model(input_ids=batch, **given, use_cache=False).logits
    flashsink.attach(model, attention=False)
    torch.testing.assert_close(model(input_ids=batch, **given, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


def test_bounds_beside_a_mask_that_packs_by_the_positions():
    """As that of chunks, which transformers counts by them."""
    model, given, batch = families.build("llama4", attention_chunk_size=3), packing(4, 3, 5), ids(1, 12)
    want = model(input_ids=batch, position_ids=given["position_ids"], use_cache=False).logits
    flashsink.attach(model)
    got = model(input_ids=batch, **given, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected the places where position_ids restart"):
        model(input_ids=batch, **given | {"cu_seq_lens_q": torch.tensor([0, 4, 12])}, use_cache=False)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bounds", [[0, 4, 12], [0, 4, 7, 9, 12], [0, 5, 7, 12], [0, 7, 4, 12], [0, 3, 4, 7, 11]])
def test_other_bounds_are_refused(bounds, window, monkeypatch):
    model = build("mistral", sliding_window=window)
    given = packing(4, 3, 5) | {"cu_seq_lens_q": torch.tensor(bounds)}
    probe = flashsink.attach(model)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected"):
        model(input_ids=ids(1, 12), **given, use_cache=False)
    for module in (checks, attention, layouts, masks):
        monkeypatch.setattr(module, "check_values", lambda *_: False)
    assert model(input_ids=ids(1, 12), **given, use_cache=False).logits.isnan().all()
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected"):
        _ = probe.sinks
