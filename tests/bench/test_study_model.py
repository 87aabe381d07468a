"""What the study changes in a model: INT8, massive activations, sink logits, the reference's habits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.study.faithful import _round
from bench.study.interventions import MassiveMeans, intervene
from bench.study.side_effects import int8_inputs, rounded
from bench.study.sink_logits import SCALE, _attend, add_sink_logits


class Model(nn.Module):
    """The part of a SpeechLLM that the study touches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 50}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
        self.decoder: Any = LlamaForCausalLM(config).eval()

    def assemble(self, mask: Tensor) -> Any:
        return SimpleNamespace(mask=mask)


def test_rounding_leaves_255_levels_of_one_scale() -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 9, 16) * torch.logspace(-2, 2, 16)
    out = rounded(x)
    scale = float(x.abs().max()) / 127
    assert float((out - x).abs().max()) <= scale / 2 * 1.0001
    levels = out / scale
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert torch.equal(rounded(torch.zeros(3)), torch.zeros(3))


def test_int8_rounds_every_linear_layer_and_only_inside() -> None:
    model = Model()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain = model.decoder(ids).logits
        seen: list[Tensor] = []
        layer = model.decoder.model.layers[1].mlp.down_proj
        with int8_inputs(model.decoder.model):
            hook = layer.register_forward_hook(lambda m, args, out: seen.append(args[0]))
            rough = model.decoder(ids).logits
            hook.remove()
        assert torch.equal(rounded(seen[0]), seen[0]) and seen[0].unique().numel() <= 255
        assert not torch.equal(rough, plain) and torch.allclose(rough, plain, atol=1.0)
        assert torch.equal(model.decoder(ids).logits, plain)


def test_int8_rounds_what_an_adapter_reads_too() -> None:
    """It would be merged. Against the merged model: the same, but for bits."""
    model = Model()
    peft: Any = get_peft_model(model.decoder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        ids = torch.arange(8)[None]
        with int8_inputs(peft.get_base_model().model):
            apart = peft(ids).logits
        merged = peft.merge_and_unload().eval()
        with int8_inputs(merged.model):
            torch.testing.assert_close(merged(ids).logits, apart, atol=2e-2, rtol=2e-2)
        assert float((merged(ids).logits - apart).abs().max()) > 2e-2


def massive_model() -> tuple[Model, Tensor]:
    """A model whose first layer makes feature 5 huge in its first valid and its fourth token."""
    model = Model()

    def plant(module: Any, args: Any, out: Any) -> Tensor:
        out = out.clone()
        out[0, 2, 5], out[0, 5, 5], out[1, 0, 5] = 40000.0, -30000.0, 50000.0
        return out

    model.decoder.model.layers[0].register_forward_hook(plant)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    return model, mask


def states(model: Model, mask: Tensor, kind: str, means: MassiveMeans | None = None) -> Tensor:
    """(2, 8, 32) output of layer 1."""
    torch.manual_seed(2)
    inputs = torch.randn(2, 8, 32)
    seen: list[Tensor] = []
    with torch.no_grad(), intervene(model, kind, means):  # type: ignore[arg-type]
        hook = model.decoder.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model.decoder.model(inputs_embeds=inputs, attention_mask=model.assemble(mask).mask)
        hook.remove()
    return seen[0]


@pytest.mark.parametrize(("kind", "bos", "other"), [("zero", 0.0, 0.0), ("zero others", 40000.0, 0.0)])
def test_massive_activations_are_set_to_zero(kind: str, bos: float, other: float) -> None:
    model, mask = massive_model()
    out = states(model, mask, kind)
    assert (float(out[0, 2, 5]), float(out[0, 5, 5])) == (bos, other)
    untouched = states(model, mask, "watch")
    assert float(untouched[0, 5, 5]) == -30000.0
    changed = (out != untouched).nonzero().tolist()
    assert changed == ([[0, 2, 5], [0, 5, 5], [1, 0, 5]] if kind == "zero" else [[0, 5, 5]])


def test_means_are_apart_for_bos_and_others() -> None:
    model, mask = massive_model()
    means = MassiveMeans()
    states(model, mask, "watch", means)
    assert means.get(0, 5, True) == 45000.0 and means.get(0, 5, False) == -30000.0
    out = states(model, mask, "mean", means)
    assert float(out[0, 2, 5]) == float(out[1, 0, 5]) == 45000.0


def test_sink_logits_are_one_more_column_of_the_softmax() -> None:
    """Against attention by hand: probabilities over keys and the sink, without the sink's share."""
    model = Model()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0  # left padding
    ids = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        plain = model.decoder(ids, attention_mask=mask).logits
        add_sink_logits(model)  # type: ignore[arg-type]
        model.sink_weights.fill_(-1e4 / SCALE)
        off = model.decoder(ids, attention_mask=mask).logits
        torch.testing.assert_close(off[mask.bool()], plain[mask.bool()], atol=1e-4, rtol=1e-4)
    attention = model.decoder.model.layers[1].self_attn
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    model.sink_weights.data.normal_(std=0.02)
    causal = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    out, _ = _attend(attention, q, k, v, causal, scaling=0.3)
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) + causal
    z = (SCALE * model.sink_weights[1])[None, :, None, None].expand(1, 4, 5, 1)
    weights = torch.cat([z, scores], -1).softmax(-1)[..., 1:]
    torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2), atol=1e-5, rtol=1e-5)
    out.sum().backward()
    assert model.sink_weights.grad is not None and model.sink_weights.grad[1].all()


def test_weights_and_moments_stay_on_the_grid_of_bf16() -> None:
    parameter = nn.Parameter(torch.randn(7))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.grad = torch.randn(7)
    optimizer.step()
    _round(optimizer, (), {})
    kept = [parameter.data, *(v for v in optimizer.state[parameter].values() if v.dim())]
    assert len(kept) == 3 and all(torch.equal(value, value.bfloat16().float()) for value in kept)
