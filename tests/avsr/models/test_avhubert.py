"""AV-HuBERT: official keys, an independent construction of every part, padding, missing modalities."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertEncoderStableLayerNorm

from avsr.errors import UserError
from avsr.models import resnet
from avsr.models.avhubert import AVHubertEncoder
from avsr.models.avhubert_network import BASE, LARGE, AVHubert, AVHubertConfig

TINY = AVHubertConfig(width=128, ffn=160, layers=3, channels=4)
_log = logging.getLogger(__name__)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that leave no part without effect: norms, PReLU slopes and batch statistics vary by channel."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith(("running_var", "weight_g")):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.dim() == 1:
            tensor.copy_(0.3 * noise + (0.8 if name.endswith("weight") else 0.0))
        else:
            tensor.copy_(noise * (1.5 / tensor[0].numel() ** 0.5))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> AVHubert:
    model = randomise(AVHubert(TINY))
    assert isinstance(model, AVHubert)
    return model


@pytest.fixture
def make_encoder(network: AVHubert, tmp_path: Path) -> Callable[..., AVHubertEncoder]:
    path = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), str(path))

    def make(stream: str, rank: int = 0, **options: Any) -> AVHubertEncoder:
        lora = SimpleNamespace(rank=rank, alpha=2.0 * rank, dropout=0.0, targets=["q_proj", "v_proj"])
        return AVHubertEncoder(SimpleNamespace(name=str(path), batch=3, lora=lora, **options), stream)

    return make


def clip(samples: int | None, frames: int | None, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    wave = None if samples is None else 0.1 * torch.randn(samples, generator=generator)
    mouth = None
    if frames is not None:
        mouth = torch.randint(0, 256, (frames, 96, 96), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(wave=wave, mouth=mouth)


# ---- keys and shapes


def official_keys(width: int, ffn: int, layers: int) -> dict[str, list[int]]:
    """Names and shapes of the published state dict."""

    def norm(name: str, size: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [size], f"{name}.bias": [size]}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}

    def batch_norm(name: str, size: int) -> dict[str, list[int]]:
        statistics = {f"{name}.running_mean": [size], f"{name}.running_var": [size], f"{name}.num_batches_tracked": []}
        return {**norm(name, size), **statistics}

    eye = "feature_extractor_video.resnet."
    keys: dict[str, list[int]] = {"mask_emb": [104], **linear("feature_extractor_audio.proj", width, 104)}
    keys |= {eye + "frontend3D.0.weight": [64, 1, 5, 7, 7], eye + "frontend3D.2.weight": [64]}
    keys |= batch_norm(eye + "frontend3D.1", 64)
    before = 64
    for stage, planes in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            name = f"{eye}trunk.layer{stage}.{block}."
            inputs = before if block == 0 else planes
            keys |= {name + "conv1.weight": [planes, inputs, 3, 3], name + "conv2.weight": [planes, planes, 3, 3]}
            keys |= batch_norm(name + "bn1", planes) | batch_norm(name + "bn2", planes)
            keys |= {name + "relu1.weight": [planes], name + "relu2.weight": [planes]}
            if stage > 1 and block == 0:
                keys |= {name + "downsample.0.weight": [planes, before, 1, 1]}
                keys |= batch_norm(name + "downsample.1", planes)
        before = planes
    keys |= linear("feature_extractor_video.proj", width, 512) | norm("layer_norm", 2 * width)
    keys |= linear("post_extract_proj", width, 2 * width) | norm("encoder.layer_norm", width)
    keys |= {"encoder.pos_conv.0.bias": [width], "encoder.pos_conv.0.weight_g": [1, 1, 128]}
    keys |= {"encoder.pos_conv.0.weight_v": [width, width // 16, 128]}
    for i in range(layers):
        layer = f"encoder.layers.{i}."
        for part in "qkv":
            keys |= linear(f"{layer}self_attn.{part}_proj", width, width)
        keys |= linear(layer + "self_attn.out_proj", width, width)
        keys |= norm(layer + "self_attn_layer_norm", width) | norm(layer + "final_layer_norm", width)
        keys |= linear(layer + "fc1", ffn, width) | linear(layer + "fc2", width, ffn)
    return keys


@pytest.mark.parametrize(("config", "sizes"), [(BASE, (768, 3072, 12)), (LARGE, (1024, 4096, 24))])
def test_keys_and_shapes_are_the_official_ones(config: AVHubertConfig, sizes: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        state = AVHubert(config).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == official_keys(*sizes)


def test_large_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AVHubert(LARGE)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_modules()}
    assert counts["encoder.layers"] + counts["encoder.layer_norm"] == pytest.approx(302.3e6, rel=1e-3)
    assert counts["encoder.pos_conv"] == pytest.approx(8.4e6, rel=2e-3)
    assert counts["feature_extractor_video.resnet"] == pytest.approx(11.2e6, rel=5e-3)


# ---- an independent construction, float64, with the same weights


def functional_front_end(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """(T, 88, 88) -> (T, 8 c), of torch.nn.functional calls and the state dict alone."""

    def bn(x: Tensor, name: str) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, variance, weight, bias = (
            state[f"{name}.{part}"].view(shape) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def prelu(x: Tensor, name: str) -> Tensor:
        slope = state[f"{name}.weight"].view([1, -1] + [1] * (x.dim() - 2))
        return x.clamp(min=0) + slope * x.clamp(max=0)

    x = F.conv3d(frames[None, None], state["frontend3D.0.weight"], stride=(1, 2, 2), padding=(2, 3, 3))
    x = prelu(bn(x, "frontend3D.1"), "frontend3D.2")
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))[0].transpose(0, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, before = f"trunk.layer{stage}.{block}.", x
            stride = 2 if stage > 1 and block == 0 else 1
            x = F.conv2d(x, state[name + "conv1.weight"], stride=stride, padding=1)
            x = F.conv2d(prelu(bn(x, name + "bn1"), name + "relu1"), state[name + "conv2.weight"], padding=1)
            if stride == 2:
                before = bn(F.conv2d(before, state[name + "downsample.0.weight"], stride=2), name + "downsample.1")
            x = prelu(bn(x, name + "bn2") + before, name + "relu2")
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def hugging_face_encoder(model: AVHubert) -> HubertEncoderStableLayerNorm:
    """The transformer as transformers builds it for HuBERT-large, with the weights of ``model``."""
    config = HubertConfig(
        hidden_size=model.config.width,
        num_hidden_layers=model.config.layers,
        num_attention_heads=model.config.width // 64,
        intermediate_size=model.config.ffn,
        num_conv_pos_embeddings=model.config.kernel,
        num_conv_pos_embedding_groups=model.config.groups,
        hidden_act="gelu",
        feat_extract_activation="gelu",
        attn_implementation="eager",
    )
    names = {
        "pos_conv.0.bias": "pos_conv_embed.conv.bias",
        "pos_conv.0.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
        "pos_conv.0.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
    }
    parts = {"self_attn.": "attention.", "self_attn_layer_norm": "layer_norm"}
    parts |= {"fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense"}
    state = {}
    for key, tensor in model.encoder.state_dict().items():
        if key.startswith("layers."):
            for ours, theirs in parts.items():
                key = key.replace(ours, theirs)
        state[names.get(key, key)] = tensor
    encoder = HubertEncoderStableLayerNorm(config).to(next(model.parameters()).dtype).eval()
    encoder.load_state_dict(state)
    return encoder


def independent(model: AVHubert, audio: Tensor | None, video: Tensor | None) -> Tensor:
    """(T, D) of one clip."""
    width, steps = model.config.width, len(audio if audio is not None else video)  # type: ignore[arg-type]
    state = model.state_dict()
    halves = torch.zeros(steps, 2 * width, dtype=torch.float64)
    if audio is not None:
        name = "feature_extractor_audio.proj"
        halves[:, :width] = audio @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    if video is not None:
        eye = "feature_extractor_video.resnet."
        front = {key.removeprefix(eye): tensor for key, tensor in state.items() if key.startswith(eye)}
        name = "feature_extractor_video.proj"
        halves[:, width:] = functional_front_end(front, video) @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    fused = F.layer_norm(halves, (2 * width,), state["layer_norm.weight"], state["layer_norm.bias"])
    fused = fused @ state["post_extract_proj.weight"].T + state["post_extract_proj.bias"]
    with torch.no_grad():
        return hugging_face_encoder(model)(fused[None]).last_hidden_state[0]


@pytest.mark.parametrize("given", ["audio", "video", "fused"])
def test_it_is_the_independent_construction(network: AVHubert, given: str) -> None:
    generator = torch.Generator().manual_seed(3)
    audio = torch.randn(19, 104, generator=generator) if given != "video" else None
    video = torch.randn(19, 88, 88, generator=generator) if given != "audio" else None
    double = AVHubert(TINY).double().eval().requires_grad_(False)
    double.load_state_dict(network.state_dict())
    inputs = [None if x is None else x.double() for x in (audio, video)]
    expected = independent(double, *inputs)
    lengths = torch.tensor([19])
    exact = double(*(None if x is None else x[None] for x in inputs), lengths)[0]
    single = network(*(None if x is None else x[None] for x in (audio, video)), lengths)[0]
    errors = [float((x.double() - expected).abs().max()) for x in (exact, single)]
    _log.info("%s: max abs error %.1e in float64, %.1e in float32", given, *errors)
    assert expected.std() > 0.3
    assert errors[0] < 1e-12
    assert errors[1] < 2e-5


# ---- padding, chunks, modalities


@pytest.mark.parametrize("stream", ["audio", "video", "fused"])
def test_a_clip_alone_and_in_a_padded_batch_is_the_same(
    make_encoder: Callable[..., AVHubertEncoder], stream: str
) -> None:
    encoder = make_encoder(stream)
    clips = [clip(640 * n + extra, n, n) for n, extra in ((9, 0), (1, 30), (70, -200), (5, 900), (12, 0))]
    together = encoder.encode(clips)
    for each, features in zip(clips, together, strict=True):
        assert features.shape == (encoder.frames(len(each.wave), len(each.mouth)), 128)
        torch.testing.assert_close(encoder.encode([each])[0], features, rtol=0, atol=1e-5)


def test_what_lies_in_the_padding_does_not_matter(network: AVHubert) -> None:
    generator = torch.Generator().manual_seed(5)
    audio, video = torch.randn(2, 8, 104, generator=generator), torch.randn(2, 8, 88, 88, generator=generator)
    lengths = torch.tensor([8, 3])
    clean_audio, clean_video = audio.clone(), video.clone()
    clean_audio[1, 3:], clean_video[1, 3:] = 0, 0
    full, clean = network(audio, video, lengths), network(clean_audio, clean_video, lengths)
    torch.testing.assert_close(full[1, :3], clean[1, :3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_front_end_in_chunks_is_the_front_end(
    network: AVHubert, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = copy.deepcopy(network.feature_extractor_video.resnet).double()
    video = torch.randn(3, 6, 88, 88, generator=torch.Generator().manual_seed(6)).double()
    lengths = torch.tensor([5, 0, 6])
    whole = front(video, lengths)
    monkeypatch.setattr(resnet, "_CHUNK", chunk)
    torch.testing.assert_close(front(video, lengths), whole, rtol=0, atol=1e-11)
    assert not whole[1].any() and not whole[0, 5:].any() and whole[0, :5].any(dim=1).all()


def test_the_front_end_with_channels_last_is_the_front_end(network: AVHubert) -> None:
    frames, lengths = torch.randn(2, 7, 88, 88).double(), torch.tensor([7, 4])
    front = copy.deepcopy(network.feature_extractor_video.resnet).double()
    other = copy.deepcopy(front)
    other.use_channels_last()
    convolutions = [part.weight for part in other.trunk.modules() if isinstance(part, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    with torch.no_grad():
        torch.testing.assert_close(other(frames, lengths), front(frames, lengths), rtol=0, atol=1e-11)


def test_a_missing_modality_is_a_half_of_zeros(make_encoder: Callable[..., AVHubertEncoder], network: AVHubert) -> None:
    """Fused clips that lack one side are what the encoder of the other side alone makes of them, in any batch."""
    fused, hearing, seeing = make_encoder("fused"), make_encoder("audio"), make_encoder("video")
    both, sound, sight = clip(640 * 7, 7, 1), clip(640 * 7, None, 2), clip(None, 9, 3)
    features = fused.encode([both, sound, sight])
    torch.testing.assert_close(features[1], hearing.encode([sound])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(features[2], seeing.encode([sight])[0], rtol=0, atol=1e-5)
    assert (features[0] - hearing.encode([both])[0]).abs().max() > 0.1


def test_batches_of_mouths_are_bytes(make_encoder: Callable[..., AVHubertEncoder], network: AVHubert) -> None:
    """Scaled by the encoder, where it runs: a batch of float32 would be four times as large."""
    encoder, given = make_encoder("video"), clip(None, 6)
    inputs = encoder.prepare(given)
    assert inputs.dtype == torch.uint8 and inputs.shape == (6, 88 * 88)
    scaled = (given.mouth[:, 4:92, 4:92].double() / 255.0 - 0.421) / 0.165
    expected = copy.deepcopy(network).double()(None, scaled[None], torch.tensor([6]))[0]
    torch.testing.assert_close(encoder(inputs[None], torch.tensor([6]))[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [640 * 3, 640 * 20])
def test_mouth_frames_decide_the_length_of_a_fused_clip(
    make_encoder: Callable[..., AVHubertEncoder], samples: int
) -> None:
    encoder = make_encoder("fused")
    prepared = encoder.prepare(clip(samples, 8))
    assert prepared.shape == (8, 104 + 88 * 88)
    heard = make_encoder("audio").prepare(clip(samples, 8))[:8]
    torch.testing.assert_close(prepared[: len(heard), :104], heard)
    assert not prepared[len(heard) :, :104].any()


def test_frames_and_attributes(make_encoder: Callable[..., AVHubertEncoder]) -> None:
    encoders = {stream: make_encoder(stream) for stream in ("audio", "video", "fused")}
    assert [e.frames(640 * 10, 9) for e in encoders.values()] == [10, 9, 9]
    assert encoders["fused"].frames(640 * 10, 0) == 10
    assert encoders["fused"].needs == {"audio", "video"} and encoders["audio"].needs == {"audio"}
    assert all(e.width == 128 and e.frames_per_second == 25 for e in encoders.values())
    assert len({e.identity for e in encoders.values()}) == 3


def test_it_stays_frozen_and_in_eval_mode(make_encoder: Callable[..., AVHubertEncoder]) -> None:
    encoder = make_encoder("video").train()
    assert not any(part.training for part in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.encode([clip(None, 4)])
    assert all(torch.equal(before[key], tensor) for key, tensor in encoder.state_dict().items())


def test_lora_sits_in_the_encoder_and_takes_gradients(make_encoder: Callable[..., AVHubertEncoder]) -> None:
    plain, encoder = make_encoder("video"), make_encoder("video", rank=4).train()
    row = encoder.prepare(clip(None, 5))[None]
    out = encoder(row, torch.tensor([5]))
    torch.testing.assert_close(out, plain(row, torch.tensor([5])), rtol=0, atol=0)
    out.square().sum().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 2 * 2 and all("lora_" in name for name in trained)
    assert all(grad is not None and grad.any() for name, grad in trained.items() if "lora_B" in name)
    assert not encoder.encode([clip(None, 5)])[0].requires_grad


@pytest.mark.parametrize(
    ("stream", "given", "message"),
    [
        ("audio", clip(None, 3), "no sound, which the AV-HuBERT"),
        ("video", clip(640, None), "no mouth video"),
        ("video", clip(640, 0), "no mouth video"),
        ("fused", clip(None, None), "no sound and no mouth video"),
        ("both", clip(640, 1), "expected one of audio, video, fused, got 'both'"),
    ],
)
def test_clips_and_streams_that_do_not_fit_are_refused(
    make_encoder: Callable[..., AVHubertEncoder], stream: str, given: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_encoder(stream).encode([given])
