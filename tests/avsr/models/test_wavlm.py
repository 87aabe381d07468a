"""WavLM against transformers' own model, alone and in padded batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from avsr.config import EncoderConfig
from avsr.errors import UserError
from avsr.models.wavlm import WavLMEncoder


@pytest.fixture(scope="module", params=["layer", "group"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny WavLM like LARGE ("layer") or like BASE ("group")."""
    path = tmp_path_factory.mktemp(f"wavlm_{request.param}")
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=request.param,
        do_stable_layer_norm=request.param == "layer",
        conv_bias=request.param == "layer",
        initializer_range=0.3,
    )
    WavLMModel(config).save_pretrained(path)
    return path


def encoder(name: Path | str, *, normalise: bool | None = None) -> WavLMEncoder:
    return WavLMEncoder(EncoderConfig(kind="wavlm", name=str(name), batch=3, normalise=normalise))


def clip(samples: int, seed: int = 0) -> SimpleNamespace:
    wave = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed)) + 0.05
    return SimpleNamespace(wave=wave, mouth=None)


@pytest.mark.parametrize("normalise", [None, True, False])
def test_it_is_transformers_wavlm(folder: Path, normalise: bool | None) -> None:
    given = clip(9000)
    ours = encoder(folder, normalise=normalise).encode([given])[0]
    wave = given.wave.double()
    if normalise is not False:
        wave = (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-8).sqrt()
    with torch.no_grad():
        expected = WavLMModel.from_pretrained(folder).double().eval()(wave[None]).last_hidden_state[0]
    assert ours.dtype == torch.float32 and expected.std() > 0.3
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_a_clip_alone_and_in_a_padded_batch_is_the_same(folder: Path) -> None:
    model = encoder(folder)
    clips = [clip(samples, samples) for samples in (16000, 400, 719, 720, 5001, 11111, 16000)]
    together = model.encode(clips)
    for each, features in zip(clips, together, strict=True):
        assert features.shape == (model.frames(len(each.wave), 0), 32)
        torch.testing.assert_close(model.encode([each])[0], features, rtol=0, atol=1e-4)


def test_what_lies_in_the_padding_does_not_matter(folder: Path) -> None:
    model = encoder(folder)
    inputs, lengths = torch.randn(2, 6000, 1), torch.tensor([6000, 2500])
    clean = inputs.clone()
    clean[1, 2500:] = 0
    count = model.frames(2500, 0)
    torch.testing.assert_close(model(inputs, lengths)[1, :count], model(clean, lengths)[1, :count], rtol=0, atol=1e-4)


def test_frames_are_those_of_the_convolutions(folder: Path) -> None:
    model = encoder(folder)
    for samples in (400, 719, 720, 1039, 1040, 16000, 16079, 16080):
        assert len(model.encode([clip(samples)])[0]) == model.frames(samples, 7)
    assert [model.frames(n, 0) for n in (0, 9, 399, 400, 16000)] == [0, 0, 0, 1, 49]
    assert model.width == 32 and model.frames_per_second == 50 and model.needs == {"audio"}
    assert model.max_seconds == float("inf")


def test_it_is_frozen_and_its_identity_names_weights_and_options(folder: Path) -> None:
    model = encoder(folder).train()
    assert not any(part.training for part in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.identity == encoder(folder, normalise=True).identity != encoder(folder, normalise=False).identity


def test_bad_clips_and_models_are_refused(folder: Path, tmp_path: Path, tiny_whisper: Path) -> None:
    model = encoder(folder)
    with pytest.raises(UserError, match="no sound"):
        model.encode([SimpleNamespace(wave=None, mouth=None)])  # type: ignore[list-item]
    with pytest.raises(UserError, match="399 samples is too short"):
        model.encode([clip(399)])
    with pytest.raises(UserError, match="expected a WavLM model, got 'whisper'"):
        encoder(tiny_whisper)
    with pytest.raises(UserError, match="cannot load the WavLM model"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = WavLMModel.from_pretrained(folder).state_dict()
    WavLMModel.from_pretrained(folder).save_pretrained(
        tmp_path, state_dict={k: v for k, v in weights.items() if "layers.1.attention.q_proj" not in k}
    )
    with pytest.raises(UserError, match=r"weights lack encoder\.layers\.1\.attention\.q_proj\.bias"):
        encoder(tmp_path)
