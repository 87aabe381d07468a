"""LoRA on encoders: parameter count, gradients, start, scale, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avsr.config import LoraConfig
from avsr.errors import UserError
from avsr.models.avhubert import UNUSED
from avsr.models.avhubert_network import LARGE, AVHubert, AVHubertConfig
from avsr.models.encoder_lora import add_encoder_lora, set_lora_mode


def network() -> AVHubert:
    torch.manual_seed(0)
    return AVHubert(AVHubertConfig(width=64, ffn=64, layers=2, channels=2)).eval()


def run(model: AVHubert) -> torch.Tensor:
    audio = torch.randn(2, 6, 104, generator=torch.Generator().manual_seed(1))
    return model(audio, None, torch.tensor([6, 4]))


def test_llama_avsrs_lora_on_large_has_6_29_million_parameters() -> None:
    with torch.device("meta"):
        model = AVHubert(LARGE)
    add_encoder_lora(model, LoraConfig(rank=64, alpha=128.0))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 24 * 2 * (64 * 1024 + 1024 * 64) == 6_291_456
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_trained_lora_is_the_merged_weight() -> None:
    """W + alpha / rank * B A on q and v, so also before the scaling of the queries."""
    model = network()
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    add_encoder_lora(model, LoraConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(2)
    state = model.state_dict()
    for i in range(2):
        for part in ("q_proj", "v_proj"):
            name = f"encoder.layers.{i}.self_attn.{part}."
            up, down = state[name + "lora_B.default.weight"], state[name + "lora_A.default.weight"]
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
            plain[name + "weight"] += 2.0 * up @ down
    merged = network()
    before = run(merged)
    merged.load_state_dict(plain)
    torch.testing.assert_close(run(model), run(merged), rtol=0, atol=1e-5)
    assert (run(merged) - before).abs().max() > 0.01


def test_dropout_acts_in_training_alone() -> None:
    model = network()
    add_encoder_lora(model, LoraConfig(rank=4, alpha=8.0, dropout=0.5))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor)
    assert torch.equal(run(model), run(model))
    set_lora_mode(model, True)
    assert not torch.equal(run(model), run(model))
    assert not any(part.training for part in model.modules() if isinstance(part, nn.LayerNorm | nn.BatchNorm2d))
    set_lora_mode(model, False)
    assert torch.equal(run(model), run(model))


def test_adapters_are_float32_on_a_bfloat16_base() -> None:
    model = network().bfloat16()
    add_encoder_lora(model, LoraConfig(rank=4, alpha=8.0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(torch.randn(1, 3, 104).bfloat16(), None, torch.tensor([3])).dtype == torch.bfloat16


def test_any_module_with_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    add_encoder_lora(model, LoraConfig(rank=2, alpha=2.0, targets=["0"]))
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(2, 5), (7, 2)]


@pytest.mark.parametrize("target", ["query", "pos_conv", "proj_x"])
def test_a_target_that_is_no_linear_layer_is_refused(target: str) -> None:
    with pytest.raises(
        UserError, match=rf"my\.lora\.targets: the encoder has no linear layer '{target}' to adapt; it has proj"
    ):
        add_encoder_lora(network(), LoraConfig(targets=["q_proj", target]), key="my.lora")


def test_all_linear_leaves_out_the_branch_that_is_never_called() -> None:
    model = network()
    unused = UNUSED["audio"]
    add_encoder_lora(model, LoraConfig(rank=2, targets=["all-linear"]), unused=unused)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    linear = {name for name, part in network().named_modules() if isinstance(part, nn.Linear)}
    assert adapted == linear - {"feature_extractor_video.proj"}
    run(model).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
