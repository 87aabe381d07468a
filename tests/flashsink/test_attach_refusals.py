"""attach is exact or refuses by name: other models than plain causal decoders, and calls that ask for more."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as hf

import flashsink
from flashsink.hf import attention as hf_attention
from flashsink.hf import layouts as hf_layouts
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


# ---- models


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
    """What they have is said, and what they have not; the layers' outputs are all observed."""
    types = ["full_attention", "linear_attention"] * 2
    model = causal_lm(hf.MiniMaxConfig(**SIZES, **MOE, layer_types=types, block_size=8))
    check_exact(model, input_ids=ids(), attention_mask=right_padding())
    probe = flashsink.attach(model)
    model(input_ids=ids())
    assert list(probe.sinks_by_layer) == [0, 2] and probe.activations.max_abs.shape == (4, 2, 12)
    with pytest.raises(RuntimeError, match=r"sinks: layers \[1, 3\] have no softmax attention"):
        _ = probe.sinks
    probe.calibrate([(1, 0)])
    with pytest.raises(ValueError, match=r"calibrate: layers \[1\] have no softmax attention"):
        model(input_ids=ids())


# ---- masks


def bad_masks():
    """name: (mask of two rows of 6 tokens, what is said about it)."""
    holes = torch.ones(3, 2, 6, dtype=torch.long)
    holes[:, 1] = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0]])
    seen = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    found = {f"hole {n}": (mask, "attention_mask.*holes") for n, mask in enumerate(holes)}
    others = {
        "neither causal nor packed": seen.flip(2),
        "a block in a batch": seen & torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool(),
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
def test_a_window_of_zero_in_the_call_is_none(tiny):
    model = tiny("mistral", sliding_window=None)
    want = model(input_ids=ids(tokens=9)).logits
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 0
    flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=ids(tokens=9)).logits, want, rtol=1e-5, atol=1e-5)


# ---- what else a call carries


@torch.no_grad()
def test_what_changes_nothing_passes(tiny):
    model = tiny("llama")
    harmless = {"output_attentions": False, "output_hidden_states": True, "num_items_in_batch": torch.tensor(3)}
    labels = {"labels": ids(), "shift_labels": ids(), "ignore_index": 7}
    check_exact(model, input_ids=ids(), **harmless, **labels, logits_to_keep=0, position_bias=None, sinks=None)


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
def test_a_mask_of_another_size(tiny):
    model = tiny("llama")
    flashsink.attach(model)
    layer, other = model.model.layers[1], torch.zeros(2, 1, 5, 5)
    layer.self_attn.register_forward_pre_hook(lambda m, a, k: (a, {**k, "attention_mask": other}), with_kwargs=True)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 1, 12, 12\), got \(2, 1, 5, 5\)"):
        model(input_ids=ids())


@torch.no_grad()
def test_layers_that_give_something_else_than_states():
    options = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0}
    model = causal_lm(hf.Gemma3nTextConfig(**SIZES, **options, laurel_rank=4, sliding_window=32))
    check_refused(model, r"model: expected layers that give \(B, S, C\), got \(4, 2, 12, 32\)", input_ids=ids())


@torch.no_grad()
def test_an_implementation_that_changes_while_attached(tiny):
    model = tiny("llama")
    want = model(input_ids=ids()).logits
    probe = flashsink.attach(model)
    model(input_ids=ids())
    model.set_attn_implementation("eager")
    for _ in range(2):
        with pytest.raises(ValueError, match="model: its attention implementation became 'eager' while attached"):
            model(input_ids=ids())
    probe.detach()
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(input_ids=ids()).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forward_that_does_not_end(tiny):
    model = tiny("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids())
    for name in ("sinks", "activations", "decorrelation_loss", "decorrelation_count", "fused"):
        with pytest.raises(RuntimeError, match="model: its last forward did not end"):
            getattr(probe, name)
    handle.remove()
    model(input_ids=ids())
    assert len(probe.sinks) == 3


# ---- what is not read on the host


def without_reading(monkeypatch):
    """As on a GPU, where reading a value waits for it."""
    for module in (hf_masks, hf_layouts):
        monkeypatch.setattr(module, "check_values", lambda *_: False)
    monkeypatch.setattr(hf_attention, "check_values", lambda *_: False)


@torch.no_grad()
def test_what_is_not_read_gives_nan_and_the_probe_says_why(tiny, monkeypatch):
    without_reading(monkeypatch)
    hole = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    pattern = torch.ones(2, 1, 6, 6).tril().flip(2)
    for attention in (True, False):
        for mask in (hole, pattern.bool(), torch.zeros(2, 1, 6, 6).masked_fill(pattern == 0, -torch.inf)):
            model = tiny("llama")
            probe = flashsink.attach(model, attention=attention)
            got = model(input_ids=ids(tokens=6), attention_mask=mask, use_cache=False).logits
            assert bool(got.isnan().all()) or not attention
            assert probe.decorrelation_loss.isnan()
            for name in ("sinks", "activations") if attention else ("activations",):
                with pytest.raises(
                    ValueError, match="attention_mask: expected .*" + ("outputs .* NaN" if attention else "")
                ):
                    getattr(probe, name)
            model(input_ids=ids(tokens=6), attention_mask=torch.ones(2, 6, dtype=torch.long))
            assert probe.activations.max_abs.isfinite().all() and probe.decorrelation_loss > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_image"])
def test_what_is_not_read_is_computed_all_the_same(monkeypatch, name):
    without_reading(monkeypatch)
    inputs = {"input_ids": ids(), "attention_mask": right_padding()}
    inputs |= {"token_type_ids": torch.zeros_like(ids())} if name == "gemma3_image" else {}
    check_exact(families.build(name), **inputs)


@torch.no_grad()
def test_a_compiled_model_says_what_it_cannot_see(tiny):
    """A hole in a mask, and positions that restart."""
    torch._dynamo.reset()
    model = tiny("llama")
    probe = flashsink.attach(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    hole = torch.tensor([[1, 1, 0, 1, 1, 1]])
    restart = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for inputs, match in (({"attention_mask": hole}, "holes"), ({"position_ids": restart}, "position_ids")):
        assert compiled(input_ids=ids(1, 6), use_cache=False, **inputs).logits.isnan().all()
        with pytest.raises(ValueError, match=match):
            _ = probe.sinks
        good = {name: torch.arange(6)[None] if "position" in name else torch.ones_like(hole) for name in inputs}
        want = model(input_ids=ids(1, 6), use_cache=False, **good).logits
        torch.testing.assert_close(compiled(input_ids=ids(1, 6), use_cache=False, **good).logits, want)
        assert len(probe.sinks) == 3
