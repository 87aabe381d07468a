"""A config that names flashsink's attention without a probe, and attention weights of attached models: as torch's
attention and the model's own eager attention have it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
import transformers as hf
from families import SIZES
from test_attach_patterns import ids, padding

import flashsink
from flashsink.hf import attention, masks


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """The calls that flashsink's operators compute."""
    attention.register()
    calls, run = [], attention.Call.run
    monkeypatch.setattr(attention.Call, "run", lambda call, *args: (calls.append(call), run(call, *args))[1])
    return calls


def mask_of(kind):
    if kind == "holes":
        return {
            "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0]])
        }
    return {} if kind is None else {"attention_mask": padding(kind)}


def results(model, inputs):
    out = model(input_ids=ids(), **inputs).logits[inputs.get("attention_mask", torch.ones(2, 12)).bool()]
    return out, torch.autograd.grad(out.tanh().sum(), model.get_input_embeddings().weight)[0]


def models(tiny, name):
    if name == "llama":
        return tiny("llama")
    if name == "mistral":
        return tiny("mistral", sliding_window=5)
    torch.manual_seed(0)
    if name == "gemma3":
        layers = ["full_attention", "sliding_attention"] * 2
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=layers)).eval()
    return hf.BertModel(hf.BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("kind", [None, "right", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_config_names_the_attention_without_a_probe(tiny, ran, name, kind):
    model, inputs = models(tiny, name), mask_of(kind)
    want = results(model, inputs)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    for got, expected in zip(results(model, inputs), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert len(ran) == len(model.model.layers)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "left"])
@pytest.mark.parametrize("static", [False, True])
def test_generation_without_a_probe(tiny, ran, kind, static):
    model, options = tiny("llama"), {"cache_implementation": "static", "disable_compile": True} if static else {}
    options |= {"max_new_tokens": 5, "do_sample": False, **mask_of(kind)}
    want = model.generate(ids(), **options)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(model.generate(ids(), **options), want)
    assert len(ran) == 3 * 5


@torch.no_grad()
def test_an_encoder_without_a_probe(tiny, ran):
    model = models(tiny, "bert")
    want = model(input_ids=ids(), **mask_of("holes")).last_hidden_state
    model.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(model(input_ids=ids(), **mask_of("holes")).last_hidden_state, want, rtol=1e-4, atol=1e-5)
    assert len(ran) == 4


@torch.no_grad()
@pytest.mark.parametrize("read", [True, False])
def test_what_the_operators_do_not_compute_torch_does(tiny, ran, monkeypatch, read):
    """Dropout, terms that a mask adds, arguments that nothing reads."""
    monkeypatch.setattr(attention, "check_values", lambda *_: read)
    model = tiny("llama", attention_dropout=0.5).train()
    eager = tiny("llama", attn_implementation="eager")
    bias = torch.randn(2, 1, 12, 12)
    want = eager(input_ids=ids(), attention_mask=bias).logits

    def dropped():
        torch.manual_seed(3)
        return model(input_ids=ids()).logits

    before = dropped()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(dropped(), before)
    model.eval()
    torch.testing.assert_close(model(input_ids=ids(), attention_mask=bias).logits, want, rtol=1e-4, atol=1e-4)
    want = eager(input_ids=ids()).logits
    torch.testing.assert_close(model(input_ids=ids(), something_new=1).logits, want, rtol=1e-4, atol=1e-4)
    assert not ran


@torch.no_grad()
def test_masks_of_a_model_without_a_probe_are_not_kept(tiny):
    """While another is attached, which refuses masks with holes."""
    attached, model = tiny("llama"), tiny("llama")
    want = model(input_ids=ids(), **mask_of("holes")).logits
    probe = flashsink.attach(attached)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    for _ in range(20):
        got = model(input_ids=ids(), **mask_of("holes")).logits
        model(input_ids=ids(), **mask_of("left"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(masks.here.made) < 10
    with pytest.raises(ValueError, match="attention_mask: expected the valid tokens of a row in one piece"):
        attached(input_ids=ids(), **mask_of("holes"))
    attached(input_ids=ids())
    assert len(probe.sinks) == 3 and not masks.here.made


# ---- attention weights


@pytest.mark.parametrize("kind", [None, "right", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_eager_model_gives_its_weights_while_attached(tiny, ran, name, kind):
    model, inputs = models(tiny, name), mask_of(kind)
    model.set_attn_implementation("eager")
    want = model(input_ids=ids(), **inputs, output_attentions=True)
    probe = flashsink.attach(model)
    got = model(input_ids=ids(), **inputs, output_attentions=True)
    keep = inputs.get("attention_mask", torch.ones(2, 12)).bool()
    assert len(got.attentions) == len(want.attentions) >= 3 and not ran
    for stats, a, expected in zip(probe.sinks, got.attentions, want.attentions, strict=True):
        a.retain_grad()
        rows = keep[:, None, :, None]
        torch.testing.assert_close(a * rows, expected * rows)
        torch.testing.assert_close(stats.received, (expected * rows).sum(dim=2), rtol=1e-4, atol=1e-5)
    got.logits[keep].tanh().sum().backward()
    assert all(a.grad is not None for a in got.attentions)
    model(input_ids=ids(), **inputs)
    assert len(ran) == len(want.attentions)


@torch.no_grad()
def test_weights_by_the_config_in_a_copy_and_in_generation(tiny):
    model, other = tiny("llama", attn_implementation="eager"), tiny("llama", attn_implementation="eager")
    model.config.output_attentions = other.config.output_attentions = True
    want = model(input_ids=ids()).attentions
    steps = model.generate(ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True).attentions
    flashsink.attach(model)
    flashsink.attach(other)
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(other))):
        torch.testing.assert_close(own(input_ids=ids()).attentions, want)
        got = own.generate(ids(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True).attentions
        torch.testing.assert_close(got, steps)


@torch.no_grad()
def test_weights_of_calibrated_heads_are_refused(tiny):
    model = tiny("llama", attn_implementation="eager")
    flashsink.attach(model).calibrate([(1, 0)])
    with pytest.raises(ValueError, match="output_attentions: expected None or False, got True"):
        model(input_ids=ids(), output_attentions=True)


@torch.no_grad()
def test_a_model_that_has_no_weights_says_so(tiny):
    model = tiny("llama")
    flashsink.attach(model)
    with pytest.warns(UserWarning, match="output_attentions: flashsink's attention returns no weights"):
        assert not any(model(input_ids=ids(), output_attentions=True).attentions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=ids(), output_attentions=False)


def test_models_that_share_a_config(tiny):
    """Each is attached and detached for itself; the config is as it was when the last has gone."""
    first = tiny("llama")
    second = type(first)(first.config).eval()
    config = first.config
    with torch.no_grad():
        want, named = [model(ids()).logits for model in (first, second)], config._attn_implementation
        probes = [flashsink.attach(model) for model in (first, second)]
        probes[0].detach()
        torch.testing.assert_close(second(ids()).logits, want[1])
        assert len(probes[1].sinks) == config.num_hidden_layers
        torch.testing.assert_close(first(ids()).logits, want[0])
        probes[1].detach()
        assert config._attn_implementation == named and masks.before(config) is None
        flashsink.attach(first)  # gone without being detached
    number = id(config)
    del first, second, probes, config
    gc.collect()
    assert number not in masks._held
