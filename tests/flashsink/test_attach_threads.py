"""Threads that share one attached model: one at a time, and each reads what its own last forward left."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from decoders import ids
from torch.utils.checkpoint import checkpoint

import flashsink


def in_thread(run):
    """What ``run`` returns or raises in a thread of its own."""
    found = []

    def note():
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=note)
    thread.start()
    thread.join(60)
    return found[0]


@pytest.fixture
def waiting(tiny):
    """(model, probe, begin, end): ``begin(batch)`` starts a forward in another thread that stops in its second layer;
    ``end()`` lets it go on and returns its logits and losses."""
    model = tiny("llama")
    probe = flashsink.attach(model)
    reached, go_on, results = threading.Event(), threading.Event(), []

    def stop(*_):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert go_on.wait(60)

    def run(batch):
        with torch.no_grad(), probe.spans(torch.tensor([5, 6, 7])):
            logits = model(input_ids=batch).logits
        results.append((logits, probe.decorrelation_loss, probe.sinks[2].received, probe.activations.max_abs))

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    threads = []

    def begin(batch):
        threads.append(threading.Thread(target=run, args=(batch,)))
        threads[0].start()
        assert reached.wait(60)

    def end():
        go_on.set()
        threads[0].join(60)
        return results[0]

    yield model, probe, begin, end
    go_on.set()
    for thread in threads:
        thread.join(60)
    handle.remove()


@torch.no_grad()
def test_a_forward_during_another_is_refused_and_does_no_harm(waiting):
    model, probe, begin, end = waiting
    slow, fast = ids(3, 9, seed=1), ids(2, 8, seed=2)
    with probe.spans(torch.tensor([5, 6, 7])):
        want = [model(input_ids=slow).logits, probe.decorrelation_loss]
    want += [probe.sinks[2].received, probe.activations.max_abs]
    model(input_ids=fast)
    own = probe.sinks[2].received
    begin(slow)
    with pytest.raises(RuntimeError, match="model: another thread is inside a forward"):
        model(input_ids=fast)
    with pytest.raises(RuntimeError, match="model: another thread is inside a forward"):
        model.generate(fast, max_new_tokens=2)
    assert torch.equal(probe.sinks[2].received, own)
    torch.testing.assert_close(list(end()), want)
    assert torch.equal(probe.sinks[2].received, own)
    assert model(input_ids=fast).logits.isfinite().all()  # it is free again


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_model_free(tiny):
    model = tiny("llama")
    flashsink.attach(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    assert isinstance(in_thread(lambda: model(input_ids=ids())), ZeroDivisionError)
    handle.remove()
    assert model(input_ids=ids()).logits.isfinite().all()
    assert isinstance(in_thread(lambda: model(input_ids=ids(), attention_mask=torch.ones(3, 3))), ValueError)
    assert model(input_ids=ids()).logits.isfinite().all()


@torch.no_grad()
def test_a_thread_reads_its_own_forward_or_nothing(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    names = ("sinks", "decorrelation_loss", "decorrelation_count", "activations")
    model(input_ids=ids(2, 8))
    for name in names:
        assert "this thread" in str(in_thread(lambda name=name: getattr(probe, name)))
    loss = probe.decorrelation_loss

    def other():
        with torch.no_grad():
            model(input_ids=ids(3, 5, seed=1))
        return probe.sinks[0].received.shape, probe.activations.max_abs.shape, probe.decorrelation_loss

    sinks, activations, another = in_thread(other)
    assert sinks == (3, 4, 5) and activations == (3, 3, 5) and another != loss
    assert probe.sinks[0].received.shape == (2, 4, 8) and torch.equal(probe.decorrelation_loss, loss)


@torch.no_grad()
def test_many_threads_that_take_turns(tiny):
    """Fifteen batches a thread, each as it is alone."""
    model = tiny("llama")
    batches = [ids(1 + n % 3, 5 + n, seed=n) for n in range(15)]
    plain = [model(input_ids=batch).logits for batch in batches]
    probe, turn, wrong = flashsink.attach(model), threading.Lock(), []

    def run(first):
        for n in (*range(first, 15), *range(first)):
            with torch.no_grad(), turn:
                logits = model(input_ids=batches[n]).logits
            shape = (len(batches[n]), 4, batches[n].shape[1])
            if (logits - plain[n]).abs().max() > 1e-4 or probe.sinks[1].received.shape != shape:
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(4 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong


def trained(model, probe, whole=False):
    """The total loss of one forward, whose layers (or all of it) are recomputed in the backward."""

    def run(embeds):
        return model(inputs_embeds=embeds, labels=ids(), use_cache=False).loss

    with probe.spans(torch.tensor([4, 5])):
        embeds = model.get_input_embeddings()(ids())
        loss = checkpoint(run, embeds, use_reentrant=False) if whole else run(embeds)
    return loss + 3.0 * probe.decorrelation_loss


@pytest.mark.parametrize("whole", [False, True])
def test_layers_are_recomputed_in_the_thread_that_autograd_chooses(tiny, whole):
    """On a GPU that is one of its own, which has run no forward."""
    model = tiny("llama").train()
    if not whole:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    probe = flashsink.attach(model, queries="after_span")
    results = []
    for run in (lambda backward: backward(), in_thread, in_thread):
        model.zero_grad()
        total = trained(model, probe, whole)
        with probe.spans(torch.tensor([4, 5])):
            assert run(total.backward) is None
        results.append([p.grad.clone() for p in model.parameters()] + [s.received for s in probe.sinks])
    for again in results[1:]:
        torch.testing.assert_close(again, results[0], rtol=1e-5, atol=1e-6)


def test_recomputation_that_cannot_tell_whose_forward_it_is_is_refused(tiny):
    model = tiny("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    probe = flashsink.attach(model)
    totals = [trained(model, probe), in_thread(lambda: trained(model, probe))]
    assert "thread of autograd" in str(in_thread(totals[1].backward))
    model.zero_grad()
    totals[0].backward()  # in the thread that ran it
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fresh = tiny("llama").train()
    trained(fresh, flashsink.attach(fresh)).backward()
    torch.testing.assert_close(grads, [p.grad for p in fresh.parameters()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calibration_belongs_to_the_thread_of_the_prompt(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    probe.calibrate([(1, 0), (2, 1)], threshold=0.05)
    cache = model(input_ids=ids(), use_cache=True).past_key_values

    def step():
        with torch.no_grad():
            return model(input_ids=ids(2, 1), past_key_values=cache)

    assert "another thread" in str(in_thread(step)) and probe.calibrated_sinks.keys() == {1, 2}
    assert in_thread(lambda: probe.calibrated_sinks) == {}


def test_a_copy_has_a_probe_of_its_own(tiny):
    """Also after a forward with a graph, and while another thread is inside the original."""
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    want = probe.sinks[0].received
    copied = copy.deepcopy(model)
    own = copied.model._flashsink_probe
    with pytest.raises(RuntimeError, match="no full forward yet"):
        _ = own.sinks
    plain = copied(input_ids=ids(3, 5, seed=4)).logits
    assert own.sinks[0].received.shape == (3, 4, 5) and torch.equal(probe.sinks[0].received, want)
    torch.testing.assert_close(model(input_ids=ids(3, 5, seed=4)).logits, plain)
