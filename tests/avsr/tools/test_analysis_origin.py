"""Which tokens stand out, where their massive activations are made and in which features: planted, hence known."""

from __future__ import annotations

import dataclasses
import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from avsr.models.rows import Assembled
from avsr.tools.analysis.causal import causal_test
from avsr.tools.analysis.features import feature_sets, overlap_p
from avsr.tools.analysis.groups import label
from avsr.tools.analysis.origin import Untraceable, trace_origin
from avsr.tools.analysis.statistics import TokenStatistics, choose_labels, measure_tokens
from avsr.tools.analysis.subject import Subject

planted: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted_sinks.py"))))
STRAY = f"text w{planted.STRAY}"


def changed(subject: Subject, *places: tuple[int, int, float]) -> TokenStatistics:
    """The statistics of the first batch with other ratios of max |h| to the median, by layer and row, at position 5."""
    seen = measure_tokens(subject)[0]
    size = seen.max_abs.clone()
    for layer, row, ratio in places:
        size[layer, row, 5] = ratio * seen.median[layer, row]
    return dataclasses.replace(seen, max_abs=size)


def calm(model: Any) -> Any:
    """The model without its planted unit."""
    model.model.layers[planted.LAYER - 1].mlp.down_proj.weight[planted.FEATURE, planted.UNIT] = 0.0
    return model


def test_massive_sinks_and_ordinary_tokens_are_those_planted() -> None:
    subject = planted.plant()
    for batch, rows in zip(measure_tokens(subject), subject.batches(), strict=True):
        for b, length in enumerate(rows.mask.sum(dim=1).tolist()):
            assert batch.massive[b].nonzero().flatten().tolist() == [0, 1]
            assert batch.sinks[b].nonzero().flatten().tolist() == [0, 1]
            assert batch.ordinary[b].nonzero().flatten().tolist() == list(range(2, length))


def test_a_token_half_way_to_a_sink_is_neither() -> None:
    """Nor does the last layer count, of row 1."""
    subject = planted.plant()
    half = changed(subject, (3, 0, 250.0), (5, 1, 250.0))
    assert not half.outstanding[0, 5] and not half.ordinary[0, 5]
    assert half.ordinary.sum() == measure_tokens(subject)[0].ordinary.sum() - 1
    late = changed(subject, (5, 0, 1e5), (4, 1, 1e5))
    assert not late.massive[0, 5] and late.massive[1, 5]


def test_keys_that_few_queries_see_are_no_sinks() -> None:
    """In rows of five tokens every key would be one by its mean; none has the eight queries that count."""
    subject = planted.plant()

    def short() -> Iterator[Assembled]:
        for rows in subject.batches():
            names = [row[:5] for row in rows.names]
            yield Assembled(rows.embeddings[:, :5], rows.mask[:, :5], rows.spans.clamp(max=5), names)

    for batch in measure_tokens(dataclasses.replace(subject, batches=short)):
        assert not batch.sinks.any() and not batch.sink_rate.any()
        assert batch.massive[:, :2].all() and not batch.massive[:, 2:].any()


def test_labels() -> None:
    row = ["BOS", "<audio>", "a0", "v12", "f3", "Trans", " a1b", "a", "<x>", "a0", "\n", " word"]
    assert [label(name, s, 8) for s, name in enumerate(row)] == [
        *("BOS", "<audio>", "a0", "v12", "f3", "prompt Trans", "prompt a1b", "prompt a"),
        *("text <x>", "text a0", "text '\\n'", "text word"),
    ]


@torch.no_grad()
def test_chosen_are_bos_the_opener_and_what_stands_out() -> None:
    subject = planted.plant(stray=True)
    for one in (subject, dataclasses.replace(subject, opener="")):
        assert choose_labels(one, measure_tokens(one)) == ["BOS", "<audio>", STRAY]
    quiet = planted.planted_subject(calm(planted.planted_model()))
    assert choose_labels(quiet, measure_tokens(quiet)) == ["BOS", "<audio>"]


# ---- origin


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
        assert unit["share"] == pytest.approx(1.0, abs=1e-6) and unit["gate_positive"] == 1.0
        assert unit["contribution"] == pytest.approx(unit["product"] * 20.0)
        assert unit["ordinary"]["gate"] < -15 and unit["ordinary"]["gate_positive"] == 0.0
        assert inside["sum"] == pytest.approx(table["mlp"][planted.LAYER - 1], rel=1e-12)


def test_what_the_blocks_add_sums_to_the_residual() -> None:
    """Exactly, and the residual stream is that of transformers' hidden states."""
    subject = planted.plant(stray=True)
    tables = trace_origin(subject)["tokens"]
    batches = [
        (batch, planted.states_of(subject, rows))
        for batch, rows in zip(measure_tokens(subject), subject.batches(), strict=True)
    ]
    for name, table in tables.items():
        parts = [out[:, *batch.where(name, outstanding=True), table["feature"]] for batch, out in batches]
        residual = torch.tensor([table["embedding"], *table["residual"]], dtype=torch.float64)
        want = torch.cat(parts, dim=1).mean(dim=1)
        torch.testing.assert_close(residual[:-1], want[:-1], rtol=1e-12, atol=1e-12)  # the last is after the norm
        added = torch.tensor(table["attention"], dtype=torch.float64) + torch.tensor(table["mlp"], dtype=torch.float64)
        torch.testing.assert_close(residual[1:], residual[:-1] + added, rtol=1e-12, atol=1e-12)
    assert tables[STRAY]["feature"] == planted.OTHER_FEATURE
    assert tables[STRAY]["inside"]["units"][0]["unit"] == planted.OTHER_UNIT


@torch.no_grad()
def test_values_of_a_unit_are_those_of_the_mlp() -> None:
    """Against the MLP run by hand on the normed states, token by token."""
    subject = planted.plant()
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


@torch.no_grad()
def test_a_step_of_attention_is_called_so() -> None:
    """Layer 2 moves what it reads at MARK to another feature, without rotary turns as it reads itself alone."""
    model = calm(planted.planted_model())
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight[0, planted.MARK] = 30.0
    attention.o_proj.weight[23, 0] = 100.0
    table = trace_origin(planted.planted_subject(model))["tokens"]["BOS"]
    assert (table["layer"], table["block"], table["feature"]) == (2, "attention", 23)
    assert table["step"] == pytest.approx(table["attention"][1]) and table["step"] > 1e4


@torch.no_grad()
def test_what_the_embedding_brings_along_is_made_by_no_layer() -> None:
    """Nor can a rotation before a layer say anything of it."""
    model = calm(planted.planted_model())
    model.get_input_embeddings().weight[planted.BOS, 23] = -5000.0
    subject = planted.planted_subject(model)
    found = trace_origin(subject)
    table = found["tokens"]["BOS"]
    assert (table["layer"], table["block"], table["feature"], table["massive"]) == (0, "embedding", 23, 6)
    assert table["step"] == table["embedding"] == -5000.0
    causal = causal_test(subject, origin=found)
    assert causal["sinks"]["BOS"] is None and causal["normal"] is None
    assert causal_test(subject, layer=2)["sinks"]["BOS"]["layer"] == 2


def test_decoders_that_cannot_be_traced() -> None:
    subject = planted.plant()
    hooks = planted.hooks_of(subject.lm)
    scaled = subject.decoder.layers[3].register_forward_hook(lambda module, args, output: output * 1.001)
    with pytest.raises(Untraceable, match="LlamaModel: layer 4 does not just add attention and MLP"):
        trace_origin(subject)
    scaled.remove()
    assert planted.hooks_of(subject.lm) == hooks and trace_origin(subject)["tokens"]
    config = GPTNeoXConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(Untraceable, match=r"GPTNeoXModel.*gate_proj"):
        trace_origin(Subject(SimpleNamespace(model=GPTNeoXForCausalLM(config).gpt_neox), 0, lambda: iter(())))


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
    assert table["inside"]["sum"] == pytest.approx(table["mlp"][table["inside"]["layer"] - 1], rel=1e-5)
    assert abs(table["inside"]["units"][0]["down"] - 20.0) > 1e-3
    assert planted.hooks_of(model) == hooks and model.config._attn_implementation == attention
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_gives_the_same_unit() -> None:
    table = trace_origin(planted.planted_subject(planted.planted_model(dtype=torch.bfloat16)))["tokens"]["BOS"]
    assert (table["layer"], table["feature"]) == (planted.LAYER, planted.FEATURE)
    assert table["inside"]["units"][0]["unit"] == planted.UNIT
    assert table["inside"]["sum"] == pytest.approx(table["mlp"][planted.LAYER - 1], rel=2e-2)


# ---- features


@pytest.mark.parametrize(
    ("total", "first", "second", "shared"),
    [(576, 1, 1, 1), (3072, 4, 4, 4), (3072, 4, 6, 2), (50, 10, 20, 5), (50, 10, 20, 0), (48, 0, 3, 0), (48, 3, 0, 0)],
)
def test_p_values_are_those_of_scipy(total: int, first: int, second: int, shared: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    want = float(stats.hypergeom.sf(shared - 1, total, first, second))
    assert overlap_p(total, first, second, shared) == pytest.approx(want, rel=1e-9)


@torch.no_grad()
def test_sets_are_those_of_the_hidden_states() -> None:
    """With a second unit on MARK the set has two features; counted by hand from transformers' states."""
    subject = planted.plant()
    subject.decoder.layers[planted.LAYER - 1].mlp.down_proj.weight[30, planted.UNIT] = -7.0
    got = feature_sets(subject)
    sets, cosines = [], []
    for rows in subject.batches():
        states = planted.states_of(subject, rows)[got["layer"]]
        for b, length in enumerate(rows.mask.sum(dim=1).tolist()):
            h = states[b, :length].abs()
            sets.append(((h[1] >= 1000 * h.median()) & (h[1] > 100)).nonzero().flatten().tolist())
            cosines.append(float(torch.cosine_similarity(states[b, 0], states[b, 1], dim=0)))
    assert sets == [[planted.FEATURE, 30]] * 6 and planted.LAYER <= got["layer"] < planted.LAYERS
    assert got["hidden"] == planted.HIDDEN and got["same"] is got["same_massive"] is True
    audio, bos = got["tokens"]["<audio>"], got["tokens"]["BOS"]
    assert list(got["tokens"]) == ["BOS", "<audio>"] and audio["common"] == got["bos"] == [planted.FEATURE, 30]
    values = {entry["feature"]: entry["value"] for entry in bos["features"]}
    assert values[30] < -1000 and values[planted.FEATURE] > 1000 and bos["p_value"] is None
    assert (audio["count"], audio["identical"], audio["jaccard"]) == (6, 6, 1.0)
    assert audio["cosine"] == pytest.approx(sum(cosines) / 6, abs=1e-6)
    assert audio["p_value"] == pytest.approx(1 / math.comb(planted.HIDDEN, 2))


def test_a_token_with_another_feature_is_not_the_same() -> None:
    got = feature_sets(planted.plant(stray=True), layer=4)
    assert got["same"] is False and got["same_massive"] is False and got["layer"] == 4
    stray = got["tokens"][STRAY]
    assert stray["common"] == [planted.OTHER_FEATURE]
    assert (stray["count"], stray["identical"], stray["jaccard"], stray["p_value"]) == (6, 0, 0.0, 1.0)
    assert abs(stray["cosine"]) < 0.1


def test_the_threshold_is_that_of_the_tokens_own_row() -> None:
    subject = planted.plant()
    seen = measure_tokens(subject)
    seen[0].median[:, 1] = 1e3  # nothing in this row reaches a thousand times that
    audio = feature_sets(subject, seen, layer=4)["tokens"]["<audio>"]
    assert (audio["count"], audio["identical"], audio["features"][0]["count"]) == (6, 5, 5)
    assert audio["common"] == [planted.FEATURE]


@torch.no_grad()
def test_without_massive_features_or_other_sinks_nothing_is_the_same() -> None:
    """Before the planted layer every set is empty, and empty sets share nothing."""
    got = feature_sets(planted.plant(), layer=planted.LAYER - 1)
    assert got["bos"] == [] and got["same"] is False and got["same_massive"] is None
    assert got["tokens"]["<audio>"]["identical"] == 0 and got["tokens"]["<audio>"]["jaccard"] == 0.0
    model = planted.planted_model()
    model.get_input_embeddings().weight[planted.AUDIO] = model.get_input_embeddings().weight[5]
    got = feature_sets(planted.planted_subject(model))
    assert got["same"] is got["same_massive"] is None
    assert list(got["tokens"]) == ["BOS"] and got["bos"] == [planted.FEATURE]
