"""attach computes what the model itself wants: windows, chunks, images, bidirectional layers, softcap, learned sinks.

Held to the model's own eager attention: logits, attention maps, hidden states and gradients.
"""

from __future__ import annotations

import families
import pytest
import torch
import transformers as hf

import flashsink
from flashsink.triton import launch
from flashsink.triton.launch import INTERPRETED

pytestmark = pytest.mark.integration

BACKENDS = ("cpu", "reference")


def ids(rows=2, tokens=12):
    return torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))


def padding(side="right"):
    mask = torch.ones(2, 12, dtype=torch.long)
    if side == "right":
        mask[1, 7:] = 0
    else:
        mask[1, :5] = 0
    return mask


def kept(inputs, logits):
    """(B, S) bool: the valid tokens."""
    mask = inputs.get("attention_mask")
    valid = mask is not None and mask.dim() == 2
    return mask.bool() if valid else torch.ones(logits.shape[:2], dtype=torch.bool)


def eager(model, inputs):
    """(logits, maps of the layers that have one, hidden states, gradient of the embeddings)."""
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    table = model.get_input_embeddings().weight
    grad = torch.autograd.grad(out[0][kept(inputs, out[0])].tanh().sum(), table, retain_graph=True)[0]
    hidden = out.hidden_states
    return out[0].detach(), [a for a in out.attentions if a is not None], hidden, grad


def check_exact(model, *, bos=True, layers=None, backends=BACKENDS, **inputs):
    """The attached model gives the model's logits and gradients, and the probe what its maps and states say.

    ``layers``: those with softmax attention, default all; ``bos``: whether rows begin with one.
    """
    logits, maps, hidden, grad = eager(model, inputs)
    keep = kept(inputs, logits)
    starts = keep.int().argmax(dim=1)
    states = torch.stack(hidden[1:-1]).double()
    loss, count = states.new_zeros(()), 0
    for row, start in enumerate(starts.tolist()):
        end = start + int(keep[row].sum())
        cosine = torch.cosine_similarity(states[:, row, start : start + 1], states[:, row, start + 1 : end], dim=-1)
        loss, count = loss + cosine.square().sum(), count + end - start - 1
    loss = loss / (count * len(states))
    for backend in backends:
        probe = flashsink.attach(model, backend=backend)
        got = model(**inputs)[0]
        table = model.get_input_embeddings().weight
        grad2 = torch.autograd.grad(got[keep].tanh().sum(), table, retain_graph=True)[0]
        scale = logits[keep].abs().max()
        assert (got - logits)[keep].abs().max() <= 1e-4 * scale, backend
        torch.testing.assert_close(grad2, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
        sinks = probe.sinks_by_layer
        if layers is not None and len(maps) == len(hidden) - 1:  # other layers give something too
            maps = [maps[index] for index in layers]
        assert list(sinks) == (list(range(len(hidden) - 1)) if layers is None else layers)
        for stats, own in zip(sinks.values(), maps, strict=True):
            want = (own * keep[:, None, :, None]).sum(dim=2)
            torch.testing.assert_close(
                stats.received * keep[:, None],
                want * keep[:, None],
                rtol=1e-4,
                atol=1e-4,
            )
            seen = ((own > 0).any(dim=1) & keep[:, :, None]).sum(dim=1)
            assert torch.equal(stats.queries[keep], seen[keep])
        top = torch.stack(hidden[1:-1]).abs().amax(dim=-1)
        torch.testing.assert_close(probe.activations.max_abs[:-1][:, keep], top[:, keep], rtol=1e-4, atol=1e-5)
        if bos:
            torch.testing.assert_close(probe.decorrelation_loss.double(), loss, rtol=1e-4, atol=1e-6)
            assert probe.decorrelation_loss.requires_grad
        else:
            with pytest.raises(RuntimeError, match="not causal, so the first token is no BOS"):
                _ = probe.decorrelation_loss
        probe.detach()


def check_generates(model, **options):
    """Greedy, beams and a static cache give the tokens and scores of the model itself."""
    model.set_attn_implementation("eager")
    wanted = {"attention_mask": padding("left"), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted |= {"output_logits": True, "return_dict_in_generate": True} | options
    static = {"cache_implementation": "static", "disable_compile": True}
    modes = [{}, {"num_beams": 2}, {"use_cache": False}, static]
    plain = [model.generate(ids(), **wanted, **mode) for mode in modes]
    probe = flashsink.attach(model)
    for mode, want in zip(modes, plain, strict=True):
        got = model.generate(ids(), **wanted, **mode)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    probe.detach()


CALLS = {
    "nothing": lambda: {},
    "ones": lambda: {"attention_mask": torch.ones(2, 12, dtype=torch.long)},
    "right": lambda: {"attention_mask": padding("right")},
    "left": lambda: {"attention_mask": padding("left")},
    "no cache": lambda: {"use_cache": False},
}
# name: (layers with softmax attention or None for all)
DECODERS = {
    "llama": None,
    "mistral": None,  # a window of 5
    "qwen2": None,  # a window in the upper layers
    "gemma2": None,  # softcap and windows
    "gemma3": None,
    "llama4": None,  # chunks of 5
    "gpt_oss": None,  # learned sinks and windows
    "deepseek_v3": None,  # values of another size than keys
    "olmo2": None,
    "phi3": None,
    "gpt2": None,
    "gpt_neox": None,
    "opt": None,
    "gptj": None,
    "gpt_neo": None,
    "codegen": None,
    "falcon": None,
    "falcon_new": None,
    "minimax": [0, 2],
    "qwen3_next": [3],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, call):
    model = families.build(name)
    check_exact(model, layers=DECODERS[name], input_ids=ids(), **CALLS[call]())


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_decoders_on_triton(name):
    """Masks with a cap, with learned sinks, and values of another size, all forward and backward by the kernels."""
    kernels = set()
    with launch.observe(lambda one: kernels.add(one.kernel.__name__) is None):
        check_exact(families.build(name), backends=["triton"], input_ids=ids(), **CALLS["left"]())
    assert {"forward_kernel", "gradient_kv_kernel", "gradient_q_kernel"} <= kernels


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate(name):
    if name == "llama4" and hf.__version__ < "5.20":
        pytest.skip("this release of transformers fails by itself")
    check_generates(families.build(name))


@pytest.mark.parametrize("padded", [None, "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_config_that_is_not_causal(tiny, name, padded):
    inputs = {"input_ids": ids(), "use_cache": False}
    inputs |= {"attention_mask": padding()} if padded else {}
    check_exact(tiny(name, is_causal=False), **inputs)  # it generates, so it has a BOS


@pytest.mark.parametrize("padded", [None, "right"])
@pytest.mark.parametrize("name", ["eurobert", "embedding_gemma", "bert"])
def test_encoders(name, padded):
    inputs = {"attention_mask": padding()} if padded else {}
    check_exact(families.build(name), bos=name == "embedding_gemma", input_ids=ids(), **inputs)


@pytest.mark.parametrize("padded", [None, "right"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("window", [5, 32])
def test_tokens_of_an_image_see_each_other(training, padded, window):
    model = families.build("gemma3_image", sliding_window=window).train(training)
    tokens = ids()
    tokens[:, 3:7] = families.IMAGE
    inputs = {"input_ids": tokens, "token_type_ids": (tokens == families.IMAGE).long()}
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    check_exact(model, **inputs, **({"attention_mask": padding()} if padded else {}))
    text = {"input_ids": ids(), "token_type_ids": torch.zeros_like(tokens)}  # the pattern comes to nothing
    check_exact(model, **text, **({"attention_mask": padding()} if padded else {}))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_four_dimensions(tiny, kind):
    """Causal with padding, and blocks of a packed row, as the caller may pass them."""
    seen = torch.ones(12, 12).tril().bool().expand(2, 1, 12, 12) & padding("left").bool()[:, None, None]
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]
    for rows, pattern, positions in ((2, seen, None), (1, blocks, torch.cat([torch.arange(5), torch.arange(7)])[None])):
        added = torch.zeros(pattern.shape).masked_fill(~pattern, torch.finfo(torch.float32).min)
        model = tiny("llama")
        inputs = {"input_ids": ids(rows), "attention_mask": added, "position_ids": positions, "use_cache": False}
        model.set_attn_implementation("eager")
        out = model(**inputs, output_attentions=True)
        inputs["attention_mask"] = added if kind.is_floating_point else pattern
        valid = torch.ones(rows, 12, dtype=torch.bool) if rows == 1 else padding("left").bool()
        probe = flashsink.attach(model)
        got = model(**inputs).logits
        torch.testing.assert_close(got[valid], out.logits[valid], rtol=1e-4, atol=1e-4)
        for stats, own in zip(probe.sinks, out.attentions, strict=True):
            want = (own * valid[:, None, :, None]).sum(dim=2)
            torch.testing.assert_close(stats.received, want * valid[:, None], rtol=1e-4, atol=1e-4)
        assert probe.decorrelation_count == (10 if rows == 1 else 11 + 6)


@torch.no_grad()
@pytest.mark.parametrize("axes", [2, 3, 4])
def test_rows_are_packed_where_the_model_packs_them(axes):
    """Positions that restart pack a row unless there is a cache or a mask; of several axes the first of four counts."""
    restart = torch.cat([torch.arange(5), torch.arange(7)])
    repeated = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10])  # also two sequences, as transformers reads it
    if axes == 2:
        model = families.build("llama")
        shaped = [row[None] for row in (restart, repeated, torch.arange(12))]
    else:
        model = families.build("qwen2_5_vl")
        shaped = [row.expand(axes, 1, -1).contiguous() for row in (restart, repeated, torch.arange(12))]
    for positions, tokens in zip(shaped, (10, 10, 11), strict=True):
        packs = axes != 3
        for extra in ({"use_cache": False}, {}, {"use_cache": True}, {"attention_mask": torch.ones(1, 12).long()}):
            inputs = {"input_ids": ids(1), "position_ids": positions} | extra
            model.set_attn_implementation("eager")
            out = model(**inputs, output_attentions=True)
            packed = packs and extra == {"use_cache": False}
            for attention in (True, False):
                probe = flashsink.attach(model, attention=attention)
                got = model(**inputs).logits
                torch.testing.assert_close(got, out.logits, rtol=1e-4, atol=1e-4)
                assert probe.decorrelation_count == (tokens if packed else 11), (extra, attention)
                if attention:
                    for stats, own in zip(probe.sinks, out.attentions, strict=True):
                        torch.testing.assert_close(stats.received, own.sum(dim=2), rtol=1e-4, atol=1e-4)
                probe.detach()


def test_a_packed_row_with_a_window():
    positions = torch.cat([torch.arange(3), torch.arange(9)])[None]
    model = families.build("mistral")
    inputs = {"input_ids": ids(1), "position_ids": positions, "use_cache": False}
    logits, maps, _, _ = eager(model, inputs)
    for backend in BACKENDS:
        probe = flashsink.attach(model, backend=backend)
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
        assert probe.decorrelation_count == 2 + 8
        for stats, own in zip(probe.sinks, maps, strict=True):
            torch.testing.assert_close(stats.received, own.sum(dim=2), rtol=1e-4, atol=1e-4)
        probe.detach()


@torch.no_grad()
def test_a_layer_that_gets_another_mask(tiny):
    """None, or a mask that a module made: what the layer gets is what counts."""
    for other in (None, torch.zeros(2, 1, 12, 12), torch.ones(1, 1, 12, 12).tril().bool()):
        model = tiny("llama")
        layer = model.model.layers[1]
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k, other=other: (a, {**k, "attention_mask": other}), with_kwargs=True
        )
        plain = model(input_ids=ids()).logits
        flashsink.attach(model)
        torch.testing.assert_close(model(input_ids=ids()).logits, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_module_or_a_call_that_is_not_causal(tiny):
    model = tiny("llama")
    want = model(input_ids=ids()).logits
    probe = flashsink.attach(model)
    for causal in (True, None):
        torch.testing.assert_close(model(input_ids=ids(), is_causal=causal).logits, want, rtol=1e-4, atol=1e-4)
    probe.detach()


def test_a_sequence_prefilled_in_chunks():
    """The first chunk is the full forward; the rest are steps."""
    for name in ("llama", "mistral", "gemma2", "llama4"):
        model = families.build(name)
        results = []
        for attached in (False, True):
            probe = flashsink.attach(model) if attached else None
            cache = hf.DynamicCache(config=model.config)
            with torch.no_grad():
                parts = [
                    model(input_ids=ids()[:, low:high], past_key_values=cache, use_cache=True).logits
                    for low, high in ((0, 7), (7, 11), (11, 12))
                ]
            results.append(torch.cat(parts, dim=1))
            if probe is not None:
                assert probe.sinks[0].received.shape[-1] == 7
                probe.detach()
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
