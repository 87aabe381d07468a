"""attach with token masks, segments by id, anchors and cos^2 per token, against the stock model's hidden states."""

from __future__ import annotations

import copy

import decoders
import families
import oracle
import pytest
import torch
from decoders import ids

import flashsink

pytestmark = pytest.mark.integration


def cos2(a, h):
    return (a * h).sum() ** 2 / (oracle.norm(a) * oracle.norm(h)) ** 2


def states_of(model, **call):
    """The outputs of layers 1..L-1 of the stock model."""
    return model(**call, output_hidden_states=True).hidden_states[1:-1]


def exact(states, pairs, constants=None):
    """The loss over pairs (row, token, anchor's position), or (row, token, number of a constant (L, n, C))."""
    total = 0.0
    for index, h in enumerate(states):
        for b, s, a in pairs:
            total = total + cos2(h[b, a] if constants is None else constants[index, a], h[b, s])
    return total / len(states) / len(pairs)


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def same(got, want, tolerance=1e-8):
    for mine, other in zip(got, want, strict=True):
        if other is None or mine is None:
            assert (mine is None or not mine.any()) and (other is None or not other.any())
        else:
            assert float((mine - other).norm()) <= tolerance * float(other.norm()) + 1e-14


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["mask", "positions", "ids", "constants", "several constants"])
def test_loss_and_gradients(tiny, padding, form, checkpointing):
    _, batch, mask, starts, lengths = padding
    model = tiny("llama").double()
    call = {"input_ids": batch, "attention_mask": mask, "use_cache": False}
    rows = [range(int(f), int(f + n)) for f, n in zip(starts, lengths, strict=True)]
    spans = anchors = constants = None
    if form == "mask":
        spans = decoders.valid(starts, lengths, 12) & (torch.arange(12) % 3 < 2)
        pairs = [(b, s, row[0]) for b, row in enumerate(rows) for s in row if s != row[0] and spans[b, s]]
    elif form == "positions":
        spans = (lengths + 1) // 2
        places = [[row[len(row) // 2], row[-1] if b else -1] for b, row in enumerate(rows)]
        anchors = torch.tensor(places)
        counted = [row[: int(n)] for row, n in zip(rows, spans, strict=True)]
        pairs = [(b, s, a) for b, own in enumerate(counted) for s in own for a in places[b] if a not in (s, -1)]
    elif form == "ids":
        anchors = sorted({int(batch[0, rows[0][4]]), int(batch[1, rows[1][2]])})
        places = [[s for s in row if int(batch[b, s]) in anchors] for b, row in enumerate(rows)]
        pairs = [(b, s, a) for b, row in enumerate(rows) for s in row for a in places[b] if a != s]
    else:
        constants = torch.randn(3, 2 if form[0] == "s" else 1, 32, dtype=torch.float64)
        anchors = constants if form[0] == "s" else constants[:, 0]
        pairs = [(b, s, a) for b, row in enumerate(rows) for s in row[1:] for a in range(constants.shape[1])]
    want = exact(states_of(model, **call), pairs, constants)
    expected = gradients(model, want)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    probe = flashsink.attach(model)
    with probe.spans(spans, anchors):
        logits = model(**call).logits
        loss = probe.decorrelation_loss
    assert int(probe.decorrelation_count) == len(pairs)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    same(gradients(model, loss), expected, 1e-6)
    probe.detach()
    valid = decoders.valid(starts, lengths, 12)
    torch.testing.assert_close(model(**call).logits[valid], logits[valid], rtol=1e-5, atol=1e-5)


def test_two_forwards_before_a_backward_and_what_a_norm_still_observes(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    first, second, anchors = ids(2, 9, 1), ids(3, 6, 2), torch.tensor([[2], [5]])
    alone = []
    for batch, places in ((first, anchors), (second, None)):
        with probe.spans(anchors=places):
            model(input_ids=batch)
        alone.append(gradients(model, probe.decorrelation_loss))
    with probe.spans(anchors=anchors):
        model(input_ids=first)
    a, largest = probe.decorrelation_loss, probe.activations.max_abs
    assert probe.fused == [0, 1, 2]  # for the activations
    model(input_ids=second)
    same(
        gradients(model, a + probe.decorrelation_loss),
        [None if x is None else x + y for x, y in zip(*alone, strict=True)],
        1e-5,
    )
    model(input_ids=first)
    torch.testing.assert_close(probe.activations.max_abs, largest)


def test_packed_rows(tiny):
    model, batch = tiny("llama").double(), ids(1, 10)
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    probe = flashsink.attach(model, cosines=True)
    mask = torch.tensor([[False, True] * 5])
    with probe.spans(mask, torch.tensor([[2, 7]])):
        model(input_ids=batch, position_ids=positions, use_cache=False)
    packed, count, cosines = probe.decorrelation_loss, probe.decorrelation_count, probe.cosines
    total = 0.0
    for first, end, anchor in ((0, 6, 2), (6, 10, 7)):
        with probe.spans(mask[:, first:end], torch.tensor([[anchor - first]])):
            model(input_ids=batch[:, first:end])
        total = total + probe.decorrelation_loss * probe.decorrelation_count
        torch.testing.assert_close(cosines[..., first:end], probe.cosines)
    assert int(count) == 4
    torch.testing.assert_close(packed * count, total)


# ---- segments


def test_segments_stay_until_they_are_switched_off(tiny):
    model, batch = tiny("llama").double(), ids(2, 10).clamp(max=50)
    batch[0, [2, 3, 7]], batch[1, [4]] = 59, 58
    batch[:, 0] = 1
    probe = flashsink.attach(model)
    plain = probe_loss(model, probe, batch)
    probe.segments({"audio": 59, "prompt": [58, 57], "bos": 1}, anchors="bos")
    states = states_of(model, input_ids=batch)
    pairs = [(0, 2, 0), (0, 3, 0), (0, 7, 0), (1, 4, 0)]
    for _ in range(2):
        torch.testing.assert_close(probe_loss(model, probe, batch), exact(states, pairs).float())
        assert int(probe.decorrelation_count) == 4
    found = probe.segment_masks
    assert torch.equal(found["audio"], batch == 59) and torch.equal(found["prompt"], batch == 58)
    assert torch.equal(found["bos"], batch == 1)
    with probe.spans(torch.tensor([3, 2])):  # says otherwise
        model(input_ids=batch)
    assert int(probe.decorrelation_count) == 3
    with probe.spans(anchors="audio"):  # the second row has none
        model(input_ids=batch)
    assert int(probe.decorrelation_count) == 3 and probe.segment_masks.keys() == {"audio", "prompt", "bos"}
    probe.segments(None)
    assert torch.equal(probe_loss(model, probe, batch), plain) and probe.segment_masks == {}


def probe_loss(model, probe, batch):
    model(input_ids=batch)
    return probe.decorrelation_loss.detach()


def test_a_batch_without_the_ids_counts_nothing_and_says_so_once(tiny, caplog):
    model = tiny("llama")
    probe = flashsink.attach(model)
    probe.segments({"image": 41, "other": 3})
    batch = ids(2, 8).clamp(max=30)
    for _ in range(2):
        model(input_ids=batch.clamp(min=4))
    assert probe.decorrelation_loss.item() == 0.0 and int(probe.decorrelation_count) == 0
    assert [r.message for r in caplog.records if "image" in r.message] == [
        "segments: image: a batch has none of the token ids (41,), which then count nothing"
    ]


def test_padding_has_the_pad_token_and_does_not_count(tiny):
    model = tiny("llama")
    batch, mask = decoders.prompts([0, 3])
    batch[0, 4] = 0
    probe = flashsink.attach(model)
    probe.segments({"pad": 0})
    model(input_ids=batch, attention_mask=mask)
    assert int(probe.decorrelation_count) == 1 and int(probe.segment_masks["pad"].sum()) == 1


@pytest.mark.parametrize("wrap", ["lora", "qwen2_5_vl"])
def test_the_ids_of_the_model_around_the_decoder(tiny, wrap):
    """A composite model embeds its ids itself. What an earlier forward had is not taken for a later one's."""
    model = tiny("llama", True) if wrap == "lora" else families.build(wrap)
    probe = flashsink.attach(model)
    probe.segments({"audio": [40, 41]})
    batch = ids(2, 8)
    batch[:, 2], batch[1, 5] = 40, 41
    model(input_ids=batch)
    assert int(probe.decorrelation_count) == 3
    model.generate(input_ids=batch[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert int(probe.decorrelation_count) == 1 and probe.segment_masks["audio"].shape == (1, 8)
    inner = next(m for m in model.modules() if hasattr(m, "_flashsink_probe"))
    for called in (inner, model):
        with pytest.raises(ValueError, match=r"^segments: expected a forward with input_ids, got one without"):
            called(inputs_embeds=torch.randn(2, 8, 32))
    with probe.spans(torch.tensor([3, 4])):
        model(inputs_embeds=torch.randn(2, 8, 32))
    assert int(probe.decorrelation_count) == 5
    probe.detach()
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


def test_a_model_with_segments_can_be_copied(tiny):
    model, batch = tiny("llama"), ids(2, 8)
    probe = flashsink.attach(model)
    probe.segments({"one": int(batch[0, 4])})
    copied = copy.deepcopy(model)
    loss = probe_loss(model, probe, batch)
    assert loss > 0 and torch.equal(probe_loss(copied, copied.model._flashsink_probe, batch), loss)


# ---- an encoder


def test_an_encoder_has_the_anchors_that_are_named():
    model, batch = families.build("bert"), ids(2, 9)
    mask = decoders.valid(torch.tensor([0, 0]), torch.tensor([9, 5]), 9)
    states = states_of(model, input_ids=batch, attention_mask=mask.long())
    probe = flashsink.attach(model, cosines=True)
    model(input_ids=batch, attention_mask=mask.long())
    for name in ("decorrelation_loss", "cosines"):
        with pytest.raises(RuntimeError, match=f"^{name}: .* no BOS; expected anchors="):
            getattr(probe, name)
    with probe.spans(mask, torch.tensor([[4], [0]])):
        model(input_ids=batch, attention_mask=mask.long())
    pairs = [(b, s, a) for b, a, n in ((0, 4, 9), (1, 0, 5)) for s in range(n) if s != a]
    torch.testing.assert_close(probe.decorrelation_loss, exact(states, pairs), rtol=1e-4, atol=1e-6)
    assert int(probe.decorrelation_count) == len(pairs) and probe.cosines.shape == (3, 2, 9)


# ---- cos^2 as an output


@pytest.mark.parametrize("form", ["bos", "positions", "constants"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cosines(tiny, padding, form, checkpointing):
    _, batch, mask, starts, lengths = padding
    model = tiny("llama")
    call = {"input_ids": batch, "attention_mask": mask, "use_cache": False}
    states = [h.detach().double() for h in states_of(model, **call)]
    constants = torch.randn(3, 2, 32)
    anchors = {"bos": None, "positions": torch.stack([starts, starts + lengths // 2], 1), "constants": constants}[form]
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    probe = flashsink.attach(model, cosines=True)
    with probe.spans(anchors=anchors):
        model(**call)
    got = probe.cosines
    assert got.shape == (2, 3, 12) and got.dtype == torch.float32 and not got.requires_grad
    valid = decoders.valid(starts, lengths, 12)
    assert not got[:, ~valid].any()
    for index, h in enumerate(states):
        for b, s in valid.nonzero().tolist():
            own = [h[b, starts[b]]] if form == "bos" else constants[index].double()
            own = [h[b, p] for p in anchors[b]] if form == "positions" else own
            want = sum(cos2(a, h[b, s]) for a in own) / len(own)
            assert float(got[index, b, s]) == pytest.approx(float(want), rel=1e-3, abs=1e-5)
    if form == "bos":
        counted = valid & (torch.arange(12) != starts[:, None])
        torch.testing.assert_close(got[:, counted].mean(), probe.decorrelation_loss.detach(), rtol=1e-4, atol=1e-6)


def test_cosines_are_asked_for_and_follow_stats_every(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    with pytest.raises(RuntimeError, match="cosines=False"):
        _ = probe.cosines
    probe.detach()
    probe = flashsink.attach(
        model, cosines=True, stats_every=2, attention=False, decorrelation=False, activations=False
    )
    model(input_ids=ids())
    assert probe.cosines.shape == (2, 2, 8)
    model(input_ids=ids())
    with pytest.raises(RuntimeError, match="stats_every"):
        _ = probe.cosines


# ---- what else spans say


@torch.no_grad()
def test_the_span_of_a_mask_ends_with_its_last_token(tiny):
    model, batch = tiny("llama"), ids(2, 8)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [1, 4]], mask[1, 2] = True, True
    probe = flashsink.attach(model, queries="after_span")
    seen = []
    for spans in (mask, torch.tensor([5, 3])):
        with probe.spans(spans):
            model(input_ids=batch)
        seen.append((probe.sinks[1].received, probe.sinks[1].queries))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])


@torch.no_grad()
def test_compiled(tiny):
    model, batch = tiny("llama", num_hidden_layers=2), ids(2, 8)
    anchors = [int(batch[0, 3]), int(batch[1, 5])]
    probe = flashsink.attach(model, attention=False, activations=False, cosines=True, anchors=anchors)
    model(input_ids=batch)
    loss, cosines = probe.decorrelation_loss, probe.cosines
    torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=batch)
    torch.testing.assert_close(probe.decorrelation_loss, loss)
    torch.testing.assert_close(probe.cosines, cosines)


REFUSED = [
    ("spans", lambda probe: probe.spans(torch.ones(2, 7, dtype=torch.bool))),
    ("spans", lambda probe: probe.spans(torch.tensor([9, 1]))),
    ("anchors", lambda probe: probe.spans(anchors=torch.tensor([[0], [8]]))),
    ("anchors", lambda probe: probe.spans(anchors=torch.tensor([0, 1]))),
    ("anchors", lambda probe: probe.spans(anchors=torch.ones(2, 32))),
    ("anchors", lambda probe: probe.spans(anchors=torch.ones(3, 31))),
    ("anchors", lambda probe: probe.spans(anchors="audio")),
    ("anchors", lambda probe: probe.spans(anchors=[])),
    ("anchors", lambda probe: probe.spans(anchors=[-1])),
    ("audio", lambda probe: probe.segments({"audio": []})),
    ("audio", lambda probe: probe.segments({"audio": True})),
    ("audio", lambda probe: probe.segments({"audio": "<audio>"})),
    ("segments", lambda probe: probe.segments({})),
    ("segments", lambda probe: probe.segments({"bos": 1}, anchors="bos")),
    ("anchors", lambda probe: probe.segments({"bos": 1}, anchors="audio")),
    ("anchors", lambda probe: probe.segments({"bos": 1}, anchors=torch.tensor([[0], [0]]))),
    ("anchors", lambda probe: probe.segments(None, anchors=1)),
]


@pytest.mark.parametrize(("argument", "choose"), REFUSED)
def test_bad_input_is_refused_by_name_and_leaves_the_probe_as_it_was(tiny, argument, choose):
    model = tiny("llama")
    probe = flashsink.attach(model)
    with pytest.raises(ValueError, match=f"^{argument}: expected "), choose(probe):
        model(input_ids=ids())
    model(input_ids=ids())
    assert int(probe.decorrelation_count) == 14


@pytest.mark.parametrize("anchors", [torch.tensor([[0], [0]]), "bos", torch.ones(2, 32), 1.5])
def test_attach_refuses_anchors_that_cannot_stay(tiny, anchors):
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"^anchors: expected "):
        flashsink.attach(model, anchors=anchors)
    flashsink.attach(model).detach()


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_a_named_backend_without_it_is_refused(tiny, backend):
    model = tiny("llama")
    with pytest.raises(ValueError, match=f"^backend: '{backend}' cannot be used"):
        flashsink.attach(model, backend=backend, anchors=1)
    probe = flashsink.attach(model, backend=backend)
    for choose in (lambda: probe.segments({"bos": 1}), lambda: probe.spans(torch.ones(2, 8).bool()).__enter__()):
        with pytest.raises(ValueError, match=f"^backend: '{backend}' cannot be used"):
            choose()


def test_a_trainer_takes_one_constant_anchor_a_token():
    from flashsink.hf.trainer import SinkTrainerMixin

    for anchors in (1, torch.ones(3, 2, 32), torch.ones(2, 1).long()):
        with pytest.raises(ValueError, match=r"^attach_options: expected anchors \(L, C\)"):
            SinkTrainerMixin(attach_options={"anchors": anchors})
