"""Frozen encoders in bfloat16: near the features of float32, and never taken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import WavLMConfig, WavLMModel

from avsr.cli import main
from avsr.config import EncoderConfig, load_config
from avsr.data.clip import Clip
from avsr.models.avhubert_network import AVHubert, AVHubertConfig
from avsr.models.build import build_store
from avsr.models.encoders import build_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path) -> dict[str, Path]:
    """With 16 channels a group in grouped convolutions, since torch computes 4 and 8 wrongly in bf16 on AMX."""
    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = AVHubert(AVHubertConfig(width=256, ffn=96, layers=2, channels=4))
        wavlm = WavLMModel(
            WavLMConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                conv_dim=(16,) * 7,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                conv_bias=True,
            )
        )
    save_file(network.state_dict(), str(folder / "avhubert.safetensors"))
    wavlm.save_pretrained(folder / "wavlm")
    return {"whisper": tiny_whisper, "wavlm": folder / "wavlm", "avhubert": folder / "avhubert.safetensors"}


def clips() -> list[Clip]:
    """Noise of two lengths, and squares that move."""
    made = []
    for seed, seconds in enumerate((0.6, 0.4)):
        rng = np.random.default_rng(seed)
        wave = torch.from_numpy(0.1 * rng.standard_normal(round(seconds * 16_000))).float()
        mouth = torch.full((round(seconds * 25), 96, 96), 150, dtype=torch.uint8)
        for t in range(len(mouth)):
            mouth[t, 30 : 40 + 2 * t, 20 + 3 * t : 60] = 30
        made.append(Clip(wave, mouth))
    return made


@pytest.mark.parametrize(
    ("kind", "stream", "most"), [("whisper", "audio", 0.02), ("wavlm", "audio", 0.02), ("avhubert", "fused", 0.03)]
)
def test_features_are_near_those_of_float32(networks: dict[str, Path], kind: str, stream: str, most: float) -> None:
    settings = EncoderConfig(kind=kind, name=str(networks[kind]), batch=2)
    exact = build_encoder(settings, stream)
    settings.precision = "bf16"
    rounded = build_encoder(settings, stream)
    assert rounded.dtype == torch.bfloat16 and rounded.identity != exact.identity
    for expected, got in zip(exact.encode(clips()), rounded.encode(clips()), strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        error = float((got - expected).norm() / expected.norm())
        assert 1e-4 < error < most


def test_both_have_a_cache_of_their_own(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))
    found: list[Any] = []
    for precision in ("fp32", "bf16", "fp32"):
        config = load_config(recipe, [f"model.audio.encoder.precision={precision}"])
        store = build_store(config, CPU)
        found.append(next(iter(store._caches.values()))._folder)
    assert found[0] == found[2] != found[1]


def test_a_run_is_evaluated_in_the_precision_it_was_trained_in(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless it is told otherwise, which it says."""
    for file in (run_folder / "config.yaml", *run_folder.glob("checkpoints/*/config.yaml")):
        text = file.read_text(encoding="utf-8")
        assert "precision: fp32" in text
        file.write_text(text.replace("      precision: fp32", "      precision: bf16"), encoding="utf-8")
    seen = []
    real = build_store

    def watched(*args: Any, **kwargs: Any) -> Any:
        store = real(*args, **kwargs)
        seen.append(store.encoders["audio"].dtype)  # type: ignore[attr-defined]
        return store

    monkeypatch.setattr("avsr.models.build.build_store", watched)
    clip = str(tmp_path / "corpus" / "sentences" / "u000.wav")
    main(["transcribe", str(run_folder), clip])
    assert seen == [torch.bfloat16] and "precision" not in caplog.text
    main(["transcribe", str(run_folder), clip, "model.audio.encoder.precision=fp32"])
    assert seen[1:] == [torch.float32]
    assert "model.audio.encoder.precision: trained with 'bf16', evaluated with 'fp32'" in caplog.text


def test_a_trained_encoder_has_the_precision_of_training(refuse_training: Callable[..., str]) -> None:
    changes = {"model.task": "video", "model.video.encoder": {"kind": "avhubert", "name": "x", "precision": "bf16"}}
    changes["model.video.encoder"]["lora"] = {"rank": 2}  # type: ignore[index]
    message = refuse_training(**changes)
    assert "model.video.encoder.precision: with LoRA, training.precision decides" in message
