"""Which tokens stand out and where their massive activations are made, where it is known because it was planted."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from avsr.errors import UserError
from avsr.models.speech_llm import Assembled
from avsr.tools.analysis.causal import causal_test
from avsr.tools.analysis.origin import Untraceable, trace_origin
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.tokens import choose, label, look

planted: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted_sinks.py"))))


@torch.no_grad()
def test_what_was_seen_is_what_transformers_hands_out() -> None:
    subject = planted.planted_subject(planted.planted_model(), stray=True)
    seen = look(subject)
    subject.decoder.set_attn_implementation("eager")
    for batch, rows in zip(seen, subject.batches(), strict=True):
        out = subject.decoder(
            inputs_embeds=rows.embeddings,
            attention_mask=rows.mask,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        for b, length in enumerate(rows.mask.sum(dim=1).tolist()):
            for layer in range(subject.layers - 1):
                h = out.hidden_states[layer + 1][b, :length].abs()
                torch.testing.assert_close(batch.size[layer, b, :length].double(), h.amax(dim=-1), rtol=1e-5, atol=0)
                assert float(batch.median[layer, b]) == pytest.approx(float(h.median()), rel=1e-5)
                seen_by = torch.arange(length, 0, -1)
                received = out.attentions[layer][b, :, :length, :length].sum(dim=1) / seen_by
                want = ((received > 0.3) & (seen_by >= 8)).double().mean(dim=0)
                torch.testing.assert_close(batch.rate[layer, b, :length].double(), want)
            assert batch.massive[b].nonzero().flatten().tolist() == [0, 1]
            assert batch.sinks[b].nonzero().flatten().tolist() == [0, 1]
            assert batch.ordinary[b].nonzero().flatten().tolist() == list(range(2, length))


def test_a_token_half_way_to_a_sink_is_neither() -> None:
    seen = look(planted.planted_subject(planted.planted_model()))[0]
    size = seen.size.clone()
    size[3, 0, 5] = 250 * seen.median[3, 0]
    size[5, 1, 5] = 250 * seen.median[5, 1]  # of the last layer, which does not count
    changed = dataclasses.replace(seen, size=size)
    assert not changed.outstanding[0, 5] and not changed.ordinary[0, 5]
    assert changed.ordinary.sum() == seen.ordinary.sum() - 1


def test_what_is_massive_in_the_last_layer_alone_is_not() -> None:
    seen = look(planted.planted_subject(planted.planted_model()))[0]
    size = seen.size.clone()
    size[5, 0, 5] = size[4, 0, 6] = 1e5
    changed = dataclasses.replace(seen, size=size)
    assert not changed.massive[0, 5] and changed.massive[0, 6]


def test_keys_that_few_queries_see_are_no_sinks() -> None:
    """In rows of five tokens every key would be one by its mean; none has the eight queries that count."""
    subject = planted.planted_subject(planted.planted_model())

    def short() -> Iterator[Assembled]:
        for rows in subject.batches():
            names = [row[:5] for row in rows.names]
            yield Assembled(rows.embeddings[:, :5], rows.mask[:, :5], rows.spans.clamp(max=5), names)

    for batch in look(dataclasses.replace(subject, batches=short)):
        assert not batch.sinks.any() and not batch.rate.any()
        assert batch.massive[:, :2].all() and not batch.massive[:, 2:].any()


def test_labels() -> None:
    row = ["BOS", "<audio>", "a0", "v12", "f3", "Trans", " a1b", "a", "<x>", "a0", "\n", " word"]
    assert [label(name, s, 8) for s, name in enumerate(row)] == [
        *("BOS", "<audio>", "a0", "v12", "f3", "prompt Trans", "prompt a1b", "prompt a"),
        *("text <x>", "text a0", "text '\\n'", "text word"),
    ]


def test_chosen_are_bos_the_opener_and_what_stands_out() -> None:
    subject = planted.planted_subject(planted.planted_model(stray=True), stray=True)
    assert choose(subject, look(subject)) == ["BOS", "<audio>", f"text w{planted.STRAY}"]
    plain = dataclasses.replace(subject, opener="")
    assert choose(plain, look(plain)) == ["BOS", "<audio>", f"text w{planted.STRAY}"]
    calm = planted.planted_subject(_calm(planted.planted_model()))
    assert choose(calm, look(calm)) == ["BOS", "<audio>"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_planted_unit_is_found(family: str) -> None:
    subject = planted.planted_subject(planted.planted_model(family))
    found = trace_origin(subject)
    assert found["layers"] == planted.LAYERS
    assert list(found["tokens"]) == ["BOS", "<audio>"]
    for table in found["tokens"].values():
        assert (table["count"], table["traced"], table["massive"]) == (6, 6, 6)
        assert table["sinks"] == 6 or family == "qwen3"  # whose sinks are not planted
        assert (table["layer"], table["block"], table["feature"]) == (planted.LAYER, "mlp", planted.FEATURE)
        inside = table["inside"]
        assert (inside["layer"], inside["ordinary_tokens"]) == (planted.LAYER, 128 - 2 * 6)
        unit = inside["units"][0]
        assert unit["unit"] == planted.UNIT and unit["down"] == 20.0 and len(inside["units"]) == 4
        assert unit["share"] == pytest.approx(1.0, abs=1e-6)
        assert unit["gate"] > 15 and unit["gate_positive"] == 1.0 and unit["up"] > 15
        assert unit["activated"] == pytest.approx(unit["gate"], rel=1e-6)
        assert unit["contribution"] == pytest.approx(unit["product"] * 20.0)
        assert unit["ordinary"]["gate"] < -15 and unit["ordinary"]["gate_positive"] == 0.0
        assert abs(unit["ordinary"]["product"]) < 1e-5
        assert inside["sum"] == pytest.approx(table["mlp"][planted.LAYER - 1], rel=1e-12)


@torch.no_grad()
def test_what_the_blocks_add_sums_to_the_residual() -> None:
    """Exactly, and the residual is that of transformers' hidden states."""
    subject = planted.planted_subject(planted.planted_model(stray=True), stray=True)
    tables = trace_origin(subject)["tokens"]
    states: dict[str, list[torch.Tensor]] = {name: [] for name in tables}
    for batch, rows in zip(look(subject), subject.batches(), strict=True):
        out = _states(subject, rows)
        for name, table in tables.items():
            b, s = batch.where(name, outstanding=True)
            states[name].append(out[:, b, s, table["feature"]])
    for name, table in tables.items():
        want = torch.cat(states[name], dim=1).mean(dim=1)
        residual = torch.tensor([table["embedding"], *table["residual"]], dtype=torch.float64)
        torch.testing.assert_close(residual[:-1], want[:-1], rtol=1e-12, atol=1e-12)  # the last is after the norm
        added = torch.tensor(table["attention"], dtype=torch.float64) + torch.tensor(table["mlp"], dtype=torch.float64)
        torch.testing.assert_close(residual[1:], residual[:-1] + added, rtol=1e-12, atol=1e-12)
    assert tables[f"text w{planted.STRAY}"]["feature"] == planted.OTHER_FEATURE
    assert tables[f"text w{planted.STRAY}"]["inside"]["units"][0]["unit"] == planted.OTHER_UNIT


@torch.no_grad()
def test_values_of_a_unit_are_those_of_the_mlp() -> None:
    """Against the MLP run by hand on the normed states, token by token."""
    subject = planted.planted_subject(planted.planted_model())
    inside = trace_origin(subject)["tokens"]["<audio>"]["inside"]
    layer = subject.decoder.layers[planted.LAYER - 1]
    taken: list[torch.Tensor] = []
    hook = layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: taken.append(out))
    for rows in subject.batches():
        subject.forward(rows)
    hook.remove()
    sinks = torch.cat([x[:, 1] for x in taken])
    masks = [rows.mask.bool() for rows in subject.batches()]
    ordinary = torch.cat([x[:, 2:][mask[:, 2:]] for x, mask in zip(taken, masks, strict=True)])
    for unit in inside["units"]:
        u = unit["unit"]
        for tokens, values in ((sinks, unit), (ordinary, unit["ordinary"])):
            gate, up = tokens @ layer.mlp.gate_proj.weight[u], tokens @ layer.mlp.up_proj.weight[u]
            swish = gate / (1 + (-gate).exp())
            for key, want in (("gate", gate), ("activated", swish), ("up", up), ("product", swish * up)):
                assert values[key] == pytest.approx(float(want.mean()), rel=1e-9, abs=1e-12), key


def test_a_step_of_attention_is_called_so() -> None:
    """Layer 2 moves what it reads at MARK to another feature, without a turn as every token reads itself alone."""
    model = planted.planted_model()
    with torch.no_grad():
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[0, planted.MARK] = 30.0
        attention.o_proj.weight[23, 0] = 100.0
        _calm(model)
    table = trace_origin(planted.planted_subject(model))["tokens"]["BOS"]
    assert (table["layer"], table["block"], table["feature"]) == (2, "attention", 23)
    assert table["step"] == pytest.approx(table["attention"][1]) and table["step"] > 1e4


def test_what_the_embedding_brings_along_is_made_by_no_layer() -> None:
    """Nor can a turn before a layer say anything of it."""
    model = planted.planted_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[planted.BOS, 23] = -5000.0
        _calm(model)
    subject = planted.planted_subject(model)
    found = trace_origin(subject)
    table = found["tokens"]["BOS"]
    assert (table["layer"], table["block"], table["feature"], table["massive"]) == (0, "embedding", 23, 6)
    assert table["step"] == table["embedding"] == -5000.0
    causal = causal_test(subject, origin=found)
    assert causal["sinks"]["BOS"] is None and causal["normal"] is None
    assert causal_test(subject, layer=2)["sinks"]["BOS"]["layer"] == 2


def test_a_layer_that_scales_what_it_adds_is_refused() -> None:
    model = planted.planted_model()
    subject = planted.planted_subject(model)
    hooks = planted.hooks_of(model)
    half = model.model.layers[3].register_forward_hook(lambda module, args, output: output * 1.001)
    with pytest.raises(Untraceable, match="LlamaModel: layer 4 does not just add attention and MLP"):
        trace_origin(subject)
    half.remove()
    assert planted.hooks_of(model) == hooks and trace_origin(subject)["tokens"]


def test_adapters_count_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(planted.planted_model(), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.train()
    hooks, attention = planted.hooks_of(model), model.config._attn_implementation
    table = trace_origin(planted.planted_subject(model))["tokens"]["BOS"]
    bare = trace_origin(planted.planted_subject(planted.planted_model()))["tokens"]["BOS"]
    assert table["inside"]["sum"] == pytest.approx(table["mlp"][table["inside"]["layer"] - 1], rel=1e-5)
    assert abs(table["inside"]["units"][0]["down"] - bare["inside"]["units"][0]["down"]) > 1e-3
    assert planted.hooks_of(model) == hooks and model.config._attn_implementation == attention
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_no_hook_stays_after_an_error() -> None:
    subject = planted.planted_subject(planted.planted_model())
    seen, hooks = look(subject), planted.hooks_of(subject.lm)

    def broken() -> Iterator[Assembled]:
        yield next(iter(subject.batches()))
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        trace_origin(dataclasses.replace(subject, batches=broken), seen)
    with pytest.raises(RuntimeError, match="disk gone"):
        look(dataclasses.replace(subject, batches=broken))
    assert planted.hooks_of(subject.lm) == hooks


def test_bfloat16_gives_the_same_unit() -> None:
    subject = planted.planted_subject(planted.planted_model(dtype=torch.bfloat16))
    table = trace_origin(subject)["tokens"]["BOS"]
    assert (table["layer"], table["feature"]) == (planted.LAYER, planted.FEATURE)
    assert table["inside"]["units"][0]["unit"] == planted.UNIT
    assert table["inside"]["sum"] == pytest.approx(table["mlp"][planted.LAYER - 1], rel=2e-2)


def test_mlps_without_a_gate_are_refused() -> None:
    config = GPTNeoXConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    lm = SimpleNamespace(model=GPTNeoXForCausalLM(config).gpt_neox)
    with pytest.raises(UserError, match="GPTNeoXModel.*gate_proj"):
        trace_origin(Subject(lm, 0, lambda: iter(())))


def _states(subject: Subject, rows: Assembled) -> torch.Tensor:
    """(L + 1, B, S, C): embeddings and outputs of the layers, the last one normed."""
    out = subject.decoder(
        inputs_embeds=rows.embeddings, attention_mask=rows.mask, use_cache=False, output_hidden_states=True
    )
    return torch.stack(out.hidden_states)


def _calm(model: Any) -> Any:
    """The model without its planted unit."""
    with torch.no_grad():
        model.model.layers[planted.LAYER - 1].mlp.down_proj.weight[planted.FEATURE, planted.UNIT] = 0.0
    return model
