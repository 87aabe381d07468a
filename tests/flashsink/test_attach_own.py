"""Attention by the model's own code: terms in its scores that flashsink does not compute, dropout, no interface."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as hf
from families import SIZES
from test_attach_patterns import check_exact, ids, padding

import flashsink

pytestmark = pytest.mark.integration


def model_of(config, kind=hf.AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_a_layer_that_adds_to_its_mask(side):
    """Doge's."""
    mask = {} if side is None else {"attention_mask": padding(side)}
    check_exact(model_of(hf.DogeConfig(**SIZES, sliding_window=None)), input_ids=ids(), **mask)


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_attention_that_is_not_in_the_interface(side):
    """ALiBi, and relative positions of its own."""
    mask = {} if side is None else {"attention_mask": padding(side)}
    bloom = hf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3)
    bloom.hidden_dropout = bloom.attention_dropout = 0.0
    xglm = hf.XGLMConfig(vocab_size=60, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, pad_token_id=0)
    for config in (bloom, xglm):
        check_exact(model_of(config), input_ids=ids(), **mask)


@torch.no_grad()
@pytest.mark.parametrize("other", [torch.randn(2, 1, 12, 12), torch.randn(2, 4, 12, 12)])
def test_terms_that_a_layer_adds_to_the_scores(tiny, other):
    """One mask for all heads, and one for each."""
    model = tiny("llama", attn_implementation="eager")
    layer = model.model.layers[1]
    layer.self_attn.register_forward_pre_hook(lambda m, a, k: (a, {**k, "attention_mask": other}), with_kwargs=True)
    want = model(input_ids=ids(), output_attentions=True)
    probe = flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, want.logits, rtol=1e-4, atol=1e-4)
    for stats, a in zip(probe.sinks, want.attentions, strict=True):
        torch.testing.assert_close(stats.received, a.sum(dim=2), rtol=1e-4, atol=1e-5)
    probe.calibrate([(1, 0)])
    with pytest.raises(ValueError, match="attention_mask: expected"):
        model(input_ids=ids())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gptj"])
def test_dropout(name):
    """The same numbers are dropped as without flashsink; what is received is before dropout."""
    model = families.build(name).train()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.4
        if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
            module.attn_dropout.p = 0.4
    results = []
    for attached in (False, True):
        probe = flashsink.attach(model) if attached else None
        torch.manual_seed(3)
        logits = model(input_ids=ids(), attention_mask=padding("left"), use_cache=False).logits
        model.zero_grad()
        logits[padding("left").bool()].tanh().sum().backward()
        results.append((logits.detach(), model.get_input_embeddings().weight.grad))
        if probe is not None:
            keep = padding("left").bool()
            for stats in probe.sinks:  # every query gives 1
                torch.testing.assert_close(stats.received.sum(-1), keep.sum(1)[:, None].expand(2, 4).float())
            probe.detach()
    keep = padding("left").bool()
    torch.testing.assert_close(results[1][0][keep], results[0][0][keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_relative_positions_of_a_decoder_with_an_encoder():
    """T5's, whose cross-attention is left alone; and ``module`` chooses the encoder."""
    if hf.__version__ < "5.20":
        pytest.skip("this release of transformers does not return all attentions")
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_heads": 4,
        "vocab_size": 60,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": ids(), "attention_mask": padding("right"), "decoder_input_ids": ids(2, 9)}
    want = model(**inputs, output_attentions=True, output_hidden_states=True)
    probe = flashsink.attach(model)
    torch.testing.assert_close(model(**inputs).logits, want.logits, rtol=1e-4, atol=1e-4)
    for stats, a in zip(probe.sinks, want.decoder_attentions, strict=True):
        torch.testing.assert_close(stats.received, a.sum(dim=2), rtol=1e-4, atol=1e-5)
    probe.detach()
    probe, keep = flashsink.attach(model, module="encoder"), padding("right").bool()
    torch.testing.assert_close(model(**inputs).logits, want.logits, rtol=1e-4, atol=1e-4)
    for stats, a in zip(probe.sinks, want.encoder_attentions, strict=True):
        given = (a * keep[:, None, :, None]).sum(dim=2)
        torch.testing.assert_close(stats.received, given, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="the first token is no BOS"):
        _ = probe.decorrelation_loss


def test_attention_that_flashsink_cannot_see_is_said(tiny):
    """Layers without a softmax: nothing is changed."""
    model = families.build("llama")
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type(
            "OwnAttention",
            (torch.nn.Module,),
            {"forward": lambda m, hidden_states, **_: (torch.nn.Module.__getattr__(m, "o_proj")(hidden_states), None)},
        )
        assert kind is not type(layer.self_attn)
    want = model(input_ids=ids()).logits
    probe = flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, want)
    with pytest.raises(RuntimeError, match=r"sinks: layers \[0, 1, 2, 3\] have no softmax attention"):
        _ = probe.sinks
    probe.calibrate([(1, 0)])
    with pytest.raises(ValueError, match=r"calibrate: layers \[1\] have no softmax attention"):
        model(input_ids=ids())


@torch.no_grad()
def test_statistics_with_and_without_a_learned_sink():
    model = families.build("gpt_oss")
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids(), output_attentions=True).attentions  # without the sink's column
    for learned, rows in ((True, maps), (False, [a / a.sum(-1, keepdim=True) for a in maps])):
        probe = flashsink.attach(model, learned_sinks=learned)
        model(input_ids=ids())
        for stats, a in zip(probe.sinks, rows, strict=True):
            torch.testing.assert_close(stats.received, a.sum(dim=2), rtol=1e-4, atol=1e-5)
        probe.detach()
