"""attach is exact or refuses by name: other models than plain causal decoders, and calls that ask for more."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import flashsink
from flashsink.hf import masks as hf_masks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def ids(rows=2, tokens=12):
    return torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))


def right_padding():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return mask


def causal_lm(config):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def check_exact(model, **inputs):
    """The attached model gives the logits of the model, at the tokens that count."""
    plain = model(**inputs).logits
    probe = flashsink.attach(model)
    got = model(**inputs).logits
    probe.detach()
    mask = inputs.get("attention_mask")
    keep = torch.ones(plain.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[keep], plain[keep], rtol=1e-4, atol=1e-4)


def check_refused(model, match, **inputs):
    """Refused with the reason, and detach restores the model."""
    plain = model(**inputs).logits
    probe = flashsink.attach(model)
    with pytest.raises(ValueError, match=match):
        model(**inputs)
    probe.detach()
    assert torch.equal(model(**inputs).logits, plain)


# ---- not causal


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_a_config_that_is_not_causal(tiny, kind):
    model = tiny(kind, is_causal=False)
    with pytest.raises(ValueError, match="model: .*is_causal=False"):
        flashsink.attach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    probe = flashsink.attach(model, attention=False)  # nothing of attention is computed or reported
    assert model(input_ids=ids()).logits.isfinite().all() and probe.decorrelation_loss > 0


@torch.no_grad()
def test_a_config_that_becomes_bidirectional(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal: expected causal attention"):
        model(input_ids=ids())
    probe.detach()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_module_that_is_not_causal(tiny, padded):
    """Without padding transformers leaves the mask out and asks the module."""
    model = tiny("llama")
    flashsink.attach(model)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal: expected causal attention, LlamaAttention has False"):
        model(input_ids=ids(), attention_mask=right_padding() if padded else None)


@torch.no_grad()
def test_a_call_that_is_not_causal(tiny):
    model = tiny("llama")
    check_exact(model, input_ids=ids(), is_causal=True)
    check_exact(model, input_ids=ids(), is_causal=None)
    check_refused(model, "is_causal: expected causal attention", input_ids=ids(), is_causal=False)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional_models(padded):
    """Their code asks for another mask, whatever their config says."""
    mask = right_padding() if padded else None
    torch.manual_seed(0)
    model = hf.EuroBertForMaskedLM(hf.EuroBertConfig(**SIZES)).eval()
    check_refused(model, "is_causal: expected causal attention", input_ids=ids(), attention_mask=mask)
    embedding = causal_lm(hf.Gemma3TextConfig(**SIZES, sliding_window=32, use_bidirectional_attention=True))
    check_refused(
        embedding, "is_causal: expected causal attention, Gemma3Attention", input_ids=ids(), attention_mask=mask
    )


# ---- windows, chunks, and layers of other kinds


@torch.no_grad()
@pytest.mark.parametrize("call", ["plain", "padded", "no cache"])
def test_chunks_shorter_than_the_sequence(call):
    options = {"num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 1, 0]}
    inputs = {"input_ids": ids(), "use_cache": call != "no cache"}
    inputs |= {"attention_mask": right_padding()} if call == "padded" else {}
    check_exact(causal_lm(hf.Llama4TextConfig(**SIZES, **options, attention_chunk_size=12)), **inputs)
    short = causal_lm(hf.Llama4TextConfig(**SIZES, **options, attention_chunk_size=5))
    check_refused(short, "attention_chunk_size: expected .* 5 tokens, got 12", **inputs)


@torch.no_grad()
def test_a_window_that_no_layer_has():
    """Qwen2-MoE makes masks of every kind; its window is 0 where it is switched off."""
    model = causal_lm(hf.Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16))
    assert model.config.sliding_window == 0
    check_exact(model, input_ids=ids(), attention_mask=right_padding())
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids(), attention_mask=torch.ones_like(ids()), **options)
    flashsink.attach(model)
    assert torch.equal(model.generate(ids(), attention_mask=torch.ones_like(ids()), **options), want)


@torch.no_grad()
def test_layers_without_softmax_attention():
    types = ["full_attention", "linear_attention"] * 2
    model = causal_lm(hf.MiniMaxConfig(**SIZES, **MOE, layer_types=types, block_size=8))
    with pytest.raises(ValueError, match="model: expected layers of .*full_attention.*, got linear_attention"):
        flashsink.attach(model)
    plain = model(input_ids=ids(), attention_mask=right_padding()).logits
    probe = flashsink.attach(model, attention=False)
    assert torch.equal(model(input_ids=ids(), attention_mask=right_padding()).logits, plain)
    assert probe.activations.max_abs.shape == (4, 2, 12)


@torch.no_grad()
def test_layers_that_change_the_mask():
    """Doge adds a term of its own to the mask before attention gets it."""
    model = causal_lm(hf.DogeConfig(**SIZES, sliding_window=None))
    with pytest.raises(ValueError, match="model: expected layers of .*, got masks that every layer of doge makes"):
        flashsink.attach(model)


def gemma3(window):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = hf.Gemma3Config(
        vision_config=vision,
        text_config=SIZES | {"sliding_window": window},
        mm_tokens_per_image=4,
        image_token_index=59,
        boi_token_index=58,
        eoi_token_index=57,
    )
    torch.manual_seed(0)
    return hf.Gemma3ForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_tokens_of_an_image_see_each_other(training):
    model = gemma3(32).train(training)
    tokens = ids()
    tokens[:, 3:7] = 59
    kinds = (tokens == 59).long()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    check_refused(
        model, "attention_mask: .*got another pattern", input_ids=tokens, token_type_ids=kinds, pixel_values=pixels
    )
    inputs = {"input_ids": ids(), "token_type_ids": torch.zeros_like(kinds)}
    for mask in (None, right_padding()):  # where there is no image the pattern comes to nothing
        check_exact(model, **inputs, attention_mask=mask)
    check_refused(gemma3(8).train(training), "attention_mask|sliding_window", **inputs)


def test_where_values_cost_a_synchronization_a_foreign_pattern_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(hf_masks, "check_values", lambda *_: False)
    inputs = {"input_ids": ids(), "token_type_ids": torch.zeros_like(ids())}
    check_refused(gemma3(32), "attention_mask: .*got another pattern", **inputs)


# ---- masks


def bad_masks():
    """name: (mask of two rows of 6 tokens, what is said about it)."""
    holes = torch.ones(3, 2, 6, dtype=torch.long)
    holes[:, 1] = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]])
    seen = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    found = {f"hole {n}": (mask, "attention_mask.*holes") for n, mask in enumerate(holes)}
    others = {
        "bool": seen,
        "additive": torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min),
        "int64": seen.long(),
        "int64 of one query": torch.ones(2, 1, 1, 6, dtype=torch.long),
        "int32": seen.int(),
    }
    others |= {str(size): torch.ones(size, dtype=torch.long) for size in ((2, 5), (3, 6), (6,), (2, 6, 6))}
    return found | {name: (mask, "attention_mask") for name, mask in others.items()}


@torch.no_grad()
@pytest.mark.parametrize("mask", bad_masks())
def test_masks_that_are_not_of_padding(tiny, mask):
    model = tiny("llama")
    probe = flashsink.attach(model)
    bad, match = bad_masks()[mask]
    with pytest.raises(ValueError, match=match):
        model(input_ids=ids(tokens=6), attention_mask=bad)
    model(input_ids=ids(tokens=6), attention_mask=torch.ones(2, 6, dtype=torch.long))
    assert len(probe.sinks) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_sliding_windows_shorter_than_the_sequence_are_refused(tiny, kind):
    options = {"sliding_window": 6}
    if kind != "mistral":
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny(kind, **options)
    short = model(input_ids=ids(tokens=6)).logits
    probe = flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=ids(tokens=6)).logits, short, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sliding_window"):
        model(input_ids=ids(tokens=7))
    model(input_ids=ids(tokens=5))
    assert probe.sinks[0].received.shape == (2, 4, 5)
    probe.detach()
    assert torch.equal(model(input_ids=ids(tokens=6)).logits, short)


@torch.no_grad()
def test_a_window_of_zero_in_the_call_is_none(tiny):
    model = tiny("mistral", sliding_window=None)
    want = model(input_ids=ids(tokens=9)).logits
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 0
    flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=ids(tokens=9)).logits, want, rtol=1e-5, atol=1e-5)


def test_attention_dropout_is_not_ignored(tiny):
    model = tiny("llama", attention_dropout=0.1)
    flashsink.attach(model)
    assert model(input_ids=ids()).logits.isfinite().all()
    with pytest.raises(ValueError, match="dropout"):
        model.train()(input_ids=ids())


def test_learned_sink_logits_are_not_ignored():
    """GPT-OSS adds a column to every softmax; without it every probability would be another."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, **heads)).eval()
    flashsink.attach(model)
    with pytest.raises(ValueError, match="s_aux.*GPT-OSS"):
        model(input_ids=ids())


# ---- packed rows


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, None])
def test_positions_that_restart_with_a_cache(tiny, use_cache):
    """Transformers then takes the row for one sequence."""
    model = tiny("llama")
    packed = {"input_ids": ids(1), "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    check_exact(model, **packed, use_cache=False)
    check_refused(model, "position_ids: they restart, .*use_cache=False", **packed, use_cache=use_cache)
    check_exact(model, **packed, attention_mask=torch.ones(1, 12, dtype=torch.long), use_cache=False)


@torch.no_grad()
def test_positions_of_several_axes_that_restart():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=SIZES | {"rope_parameters": rope})
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    restart = torch.cat([torch.arange(5), torch.arange(7)])
    check_exact(model, input_ids=ids(1), position_ids=restart.expand(3, 1, -1), use_cache=False)
    check_exact(model, input_ids=ids(1), position_ids=torch.arange(12).expand(4, 1, -1), use_cache=False)
    packed = {"input_ids": ids(1), "position_ids": restart.expand(4, 1, -1), "use_cache": False}
    check_refused(model, "position_ids: the model takes the rows for packed sequences", **packed)


# ---- what else a call carries


@torch.no_grad()
def test_what_changes_nothing_passes(tiny):
    model = tiny("llama")
    harmless = {"output_attentions": False, "output_hidden_states": True, "num_items_in_batch": torch.tensor(3)}
    check_exact(model, input_ids=ids(), **harmless, logits_to_keep=0, position_bias=None, sinks=None)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_bias", torch.zeros(2, 4, 12, 12)),
        ("sinks", torch.zeros(2, 4, 12, 1)),
        ("indices", torch.zeros(2, 12, 4, dtype=torch.long)),
        ("block_indices", torch.zeros(2, 12, 4, dtype=torch.long)),
        ("s_aux", torch.zeros(4)),
        ("softcap", 50.0),
        ("cache", object()),
        ("something_new", False),
    ],
)
def test_what_is_not_known_is_refused(tiny, name, value):
    """Any argument that the model passes to attention in addition to q, k, v and the mask."""
    model = tiny("llama")
    probe = flashsink.attach(model)
    with pytest.raises(ValueError, match=f"{name}: flashsink's attention does not know it, expected None"):
        model(input_ids=ids(), **{name: value})
    model(input_ids=ids())
    assert len(probe.sinks) == 4 - 1


@torch.no_grad()
def test_what_packs_must_agree_with_the_positions(tiny):
    """Other implementations read bounds where this one reads positions."""
    model = tiny("llama")
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    check_exact(model, input_ids=ids(1), position_ids=positions, use_cache=False, **packing)
    check_refused(model, "cu_seq_lens_q: .*without position_ids that restart", input_ids=ids(1), **packing)


@torch.no_grad()
def test_a_mask_that_flashsink_did_not_make(tiny):
    """A model whose layers get another mask, or none, than the interface made."""
    for other in (None, torch.zeros(2, 1, 12, 12)):
        model = tiny("llama")
        flashsink.attach(model)
        layer = model.model.layers[1]
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k, other=other: (a, {**k, "attention_mask": other}), with_kwargs=True
        )
        with pytest.raises(ValueError, match="attention_mask: expected what flashsink's mask function made"):
            model(input_ids=ids())


@torch.no_grad()
def test_layers_whose_attention_is_their_own():
    """XGLM's does not run through the interface: nothing is changed, and what cannot be observed is said."""
    config = hf.XGLMConfig(vocab_size=60, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, pad_token_id=0)
    model = hf.XGLMForCausalLM(config).eval()
    check_exact(model, input_ids=ids(), attention_mask=right_padding())
    probe = flashsink.attach(model)
    model(input_ids=ids())
    assert probe.decorrelation_loss > 0
    with pytest.raises(RuntimeError, match=r"sinks: layers \[0, 1\] have no softmax attention"):
        _ = probe.sinks
    probe.calibrate([(1, 0)])
    with pytest.raises(ValueError, match=r"calibrate: layers \[1\] have no softmax attention"):
        model(input_ids=ids())


@torch.no_grad()
def test_layers_that_give_something_else_than_states():
    options = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0}
    model = causal_lm(hf.Gemma3nTextConfig(**SIZES, **options, laurel_rank=4, sliding_window=32))
    flashsink.attach(model)
    with pytest.raises(ValueError, match=r"model: expected decoder layers that give \(B, S, C\)"):
        model(input_ids=ids())
