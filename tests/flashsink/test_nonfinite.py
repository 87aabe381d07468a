"""``Probe.first_nonfinite``: the place that overflows, planted."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from decoders import build, ids, padded
from torch import nn

import flashsink

pytestmark = pytest.mark.integration

TOKEN = 5


def only(**options):
    return {"attention": False, "decorrelation": False, "activations": False, "nonfinite": True, **options}


def planted(layer=1, feature=3, **sizes):
    """A half-precision Llama of which ``TOKEN`` alone (id 1) overflows in ``down_proj``: a large product of its gate
    and up times a large weight."""
    model = build("llama", **sizes)
    mlp, norm = model.model.layers[layer].mlp, model.model.layers[layer].post_attention_layernorm
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 7] = 0
        model.get_input_embeddings().weight[1, 7] = 1000.0
        for own in model.model.layers:  # nothing else writes to feature 7
            own.self_attn.o_proj.weight.mul_(1e-2)
            own.mlp.down_proj.weight.mul_(1e-2)
        norm.weight[7] = 1.0
        for name in ("gate_proj", "up_proj"):
            getattr(mlp, name).weight[2] = 0
            getattr(mlp, name).weight[2, 7] = 20.0
        mlp.down_proj.weight[feature, 2] = 1000.0
    batch = ids(2, 12)
    batch[1, TOKEN] = 1
    return model.half(), batch


def test_the_overflow_of_down_proj_is_found_in_half_precision():
    """Against torch's own forward: the first module in order of execution whose output is not finite."""
    model, batch = planted()
    wrong = []

    def see(name, module, args, out):
        if isinstance(out, torch.Tensor) and not out.isfinite().all():
            wrong.append((name, out))

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [m.register_forward_hook(lambda *x, name=name: see(name, *x)) for name, m in leaves]
    with torch.no_grad():
        plain = model(input_ids=batch).logits
    for hook in hooks:
        hook.remove()
    name, out = wrong[0]
    assert name == "model.layers.1.mlp.down_proj"
    places = (~out.isfinite()).nonzero().tolist()
    assert places == [[1, TOKEN, 3]]
    probe = flashsink.attach(model, nonfinite=True)
    with torch.no_grad():
        logits = model(input_ids=batch).logits
    assert probe.first_nonfinite == (1, "mlp.down_proj", (1, TOKEN), 3, float(out[1, TOKEN, 3]))
    finite = plain.isfinite()
    torch.testing.assert_close(logits[finite], plain[finite], rtol=1e-2, atol=1e-2)
    assert torch.equal(logits.isfinite(), finite)


def test_a_finite_forward_has_none_and_the_last_forward_counts():
    model, batch = planted()
    probe = flashsink.attach(model, **only())
    model(input_ids=batch.clamp(min=3))
    assert probe.first_nonfinite is None
    model(input_ids=batch[1:])
    assert probe.first_nonfinite[:4] == (1, "mlp.down_proj", (0, TOKEN), 3)
    model.generate(batch.clamp(min=3), max_new_tokens=3, pad_token_id=0)
    assert probe.first_nonfinite is None
    probe.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("where", "block", "value"),
    [
        ("self_attn.v_proj", "self_attn.v_proj", math.inf),
        ("input_layernorm", "input_layernorm", -math.inf),
        ("mlp", "mlp.down_proj", math.nan),
    ],
)
def test_the_innermost_block_that_makes_it_is_named(where, block, value):
    model, batch = build("llama"), ids(2, 12)
    module = model.model.layers[2].get_submodule(block)
    module.register_forward_hook(
        lambda m, args, out: out.index_put((torch.tensor(1), torch.tensor(4), torch.tensor(6)), torch.tensor(value))
    )
    probe = flashsink.attach(model, **only())
    model(input_ids=batch)
    layer, name, place, feature, found = probe.first_nonfinite
    assert (layer, name, place, feature) == (2, block, (1, 4), 6)
    assert found == value or math.isnan(value) and math.isnan(found)


def test_what_no_submodule_makes_belongs_to_the_code_around_it():
    model, batch = build("llama"), ids(1, 12)
    big = torch.finfo(torch.float32).max
    probe = flashsink.attach(model, **only())
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embeds = embedding(batch)
        embeds[0, 3, 9] = -torch.inf
        model(inputs_embeds=embeds)
        assert probe.first_nonfinite == (0, "input", (0, 3), 9, -torch.inf)
        model.model.layers[1].mlp.act_fn = Constant(1e30)
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, out: torch.full_like(out, 1e30))
        probe.detach()
        probe = flashsink.attach(model, **only())
        model(input_ids=batch)
        assert probe.first_nonfinite == (1, "mlp", (0, 0), 0, torch.inf)  # the product of two finite factors
        for own in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            own.register_forward_hook(lambda m, args, out: torch.full_like(out, big))
        probe.detach()
        probe = flashsink.attach(model, **only())
        model(input_ids=batch)
        assert probe.first_nonfinite == (0, "residual", (0, 0), 0, torch.inf)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full_like(x, self.value)


def test_padding_does_not_count():
    model = build("llama")
    batch, mask = padded(ids(2, 12), torch.tensor([0, 4]), torch.tensor([12, 8]))
    embeds = model.get_input_embeddings()(batch).detach()
    embeds[1, 2, 3] = torch.inf
    probe = flashsink.attach(model, **only(attention=True))
    model(inputs_embeds=embeds, attention_mask=mask)
    assert probe.first_nonfinite is None
    embeds[1, 6, 5] = torch.nan
    model(inputs_embeds=embeds, attention_mask=mask)
    assert probe.first_nonfinite[:4] == (0, "input", (1, 6), 5)


def test_in_training_with_checkpoints_and_in_a_copy():
    model, batch = planted()
    model = model.float()
    probe = flashsink.attach(model, nonfinite=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 2] = torch.inf
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model(input_ids=batch, labels=batch)
    want = probe.first_nonfinite
    assert want[:2] == (1, "mlp.down_proj")
    out.loss.backward()
    assert probe.first_nonfinite[:4] == want[:4]
    other = copy.deepcopy(model)
    other(input_ids=batch)
    assert other.model._flashsink_probe.first_nonfinite[:4] == want[:4]


def test_compiled_it_finds_the_same():
    model, batch = planted(0, num_hidden_layers=1)
    probe = flashsink.attach(model, **only())
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        run(input_ids=batch)
    assert probe.first_nonfinite[:4] == (0, "mlp.down_proj", (1, TOKEN), 3)


def test_mixtures_of_experts_are_read_as_rows():
    import transformers as hf

    config = hf.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, num_local_experts=4,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 4] = torch.nan
    batch = ids(2, 7)
    batch[1, 3] = 1
    probe = flashsink.attach(model, **only())
    model(input_ids=batch)
    assert probe.first_nonfinite[:4] == (0, "input", (1, 3), 4)
    probe.detach()
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 4] = 0
    moe = model.model.layers[1].mlp
    moe.gate.register_forward_pre_hook(lambda m, args: args[0].index_fill(1, torch.tensor(6), -torch.inf))
    probe = flashsink.attach(model, **only())
    model(input_ids=batch)
    assert probe.first_nonfinite == (1, "mlp", (0, 0), 6, -torch.inf)  # of (B S, C)


def test_it_wants_to_be_asked_for():
    model = build("llama")
    probe = flashsink.attach(model)
    model(input_ids=ids())
    with pytest.raises(RuntimeError, match="nonfinite=False"):
        _ = probe.first_nonfinite
