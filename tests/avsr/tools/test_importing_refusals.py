"""What ``avsr import`` refuses: the message names the tensor, both shapes and what in the config would fit."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

pytestmark = pytest.mark.integration

Refuse = Callable[..., str]
QUERY = "llm.model.layers.0.self_attn.lora_{}_Q.weight"


@pytest.fixture
def refused(refuse: Refuse, audio_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The message of a refused import, which leaves nothing behind."""

    def run(official: Any, *overrides: str, recipe: Path | None = None, names_file: bool = True) -> str:
        path = official.write(tmp_path / "model.pth")
        out = tmp_path / "official"
        message = refuse("import", path, "--config", recipe or audio_recipe(), "--out", out, *overrides)
        assert not out.exists() and not out.with_name("official.part").exists()
        assert (str(path) in message) == names_file
        return message

    return run


def has(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def test_values_that_are_not_finite(official: Any, refused: Callable[..., str]) -> None:
    official.state[QUERY.format("up")][0, 0] = torch.nan
    has(refused(official), "llm.base_model.", "layers.0.self_attn.q_proj.lora_B", "has values that are not finite")


def test_another_compression(official: Any, refused: Callable[..., str]) -> None:
    """Issue 2 of Llama-AVSR: video_proj.0 of 3 frames stacked where the config stacks 2."""
    official.state["audio_proj.0.weight"] = torch.randn(32, 96)
    stack = ["model.audio.compression.kind=stack", "model.audio.compression.rate=2"]
    shapes = "audio_proj.0.weight is [32, 96] in the checkpoint and [32, {}] by the config"
    has(refused(official, *stack), shapes.format(64), "model.audio.compression.kind=stack", "compression.rate=3")
    has(refused(official), shapes.format(32), "model.audio.compression.kind=stack", "compression.rate=3")
    official.state["audio_proj.0.weight"] = torch.randn(32, 32)
    has(refused(official, *stack), "[32, 32]", "[32, 64]", "model.audio.compression.kind=average")
    official.state["audio_proj.0.weight"] = torch.randn(32, 40)
    has(refused(official), "[32, 40]", "another encoder than model.audio.encoder", "32 wide")


def test_another_projector(official: Any, refused: Callable[..., str]) -> None:
    message = refused(official, "model.projector.hidden=20")
    has(message, "audio_proj.0.weight is [32, 32] in the checkpoint and [20, 32]", "model.projector.hidden=32")
    has(refused(official, "model.projector.layernorm=false"), "audio_proj.3.", "model.projector.layernorm=true")
    for key in [key for key in official.state if ".3." in key]:
        del official.state[key]
    has(refused(official), "audio_proj.3.", "is missing", "model.projector.layernorm=false")
    official.state["audio_proj.5.weight"] = torch.zeros(1)
    has(refused(official, "model.projector.layernorm=false"), "audio_proj.5.weight [1]", "no place")


def test_another_rank(official: Any, refused: Callable[..., str]) -> None:
    message = refused(official, "model.lora.rank=4")
    has(message, QUERY.format("down"), "[8, 48]", "[4, 48]", "model.lora.rank=8", "--reduction")
    has(refused(official, "--reduction", "12", "--alpha", "3"), "[8, 48]", "[4, 48]")
    has(refused(official, "model.lora.rank=0"), "llm.model.layers.0.self_attn.lora_", "no place", "model.lora.rank")
    has(refused(official, "model.lora.targets=[q_proj,k_proj,v_proj]"), "k_proj", "q_proj and v_proj alone")
    has(refused(official, "model.lora.targets=[q_proj]"), "lora_down_V.weight", "no place")
    del official.state[QUERY.format("up")]
    has(refused(official), QUERY.format("up"), "is missing")


def other_llm(plain_llm: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(plain_llm, folder)
    config = LlamaConfig.from_pretrained(str(plain_llm))
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_another_language_model(official: Any, refused: Callable[..., str], plain_llm: Path, tmp_path: Path) -> None:
    """Issue 2 of Llama-AVSR: lora_up_V of grouped queries where the config's model has as many values as queries."""
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"num_key_value_heads": 4}, ["lora_up_V.weight is [24, 8]", "[48, 8] by the config", "another model"]),
        ({"hidden_size": 64}, ["llm.model.embed_tokens.weight is [77, 48]", "[77, 64]", "another language model"]),
        ({"num_hidden_layers": 4}, ["llm.model.layers.3.self_attn.lora_down_Q.weight is missing"]),
        ({"num_hidden_layers": 2}, ["llm.model.layers.2.", "no place"]),
        ({}, ["frozen llm.", "is not that of model.llm.name", "another model"]),
    ]
    for index, (changes, expected) in enumerate(cases):
        folder = other_llm(plain_llm, tmp_path / f"llm{index}", **changes)
        has(refused(official, f"model.llm.name={folder}"), *expected)


def test_another_tokenizer(official: Any, refused: Callable[..., str], tiny_llm: Path, parts: Any) -> None:
    """The table's rows are the tokenizer's and one for each added token."""
    size = len(parts.AutoTokenizer.from_pretrained(str(tiny_llm)))
    official.state["llm.model.embed_tokens.weight"] = torch.randn(size + 6, 48)
    has(refused(official), "llm.model.embed_tokens.weight is", "another language model")
    del official.state["llm.model.embed_tokens.weight"]
    has(refused(official), "llm.model.embed_tokens.weight is missing")
    has(refused(official, "--reduction", "6", "--alpha", "3"), "llm.model.embed_tokens.weight is missing")


def test_another_whisper(official: Any, refused: Callable[..., str], tiny_whisper: Path, tmp_path: Path) -> None:
    config = WhisperConfig.from_pretrained(str(tiny_whisper))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        WhisperModel(config).save_pretrained(tmp_path / "whisper")
    message = refused(official, f"model.audio.encoder.name={tmp_path / 'whisper'}")
    has(message, "frozen audio_encoder.", "is not that of model.audio.encoder.name")


def test_another_kind_of_encoder(
    parts: Any, plain_llm: Path, refused: Callable[..., str], official: Any, audio_recipe: Callable[..., Path]
) -> None:
    avhubert = parts.Official(plain_llm, {"audio_proj": (32, 32)})
    avhubert.add_avhubert("audio_encoder", lora=False)
    has(refused(avhubert), "audio_encoder is of another kind than Whisper", "model.audio.encoder")
    recipe = audio_recipe(**{"model.audio.encoder": {"kind": "avhubert", "name": "nowhere.pt"}})
    has(refused(official, recipe=recipe), "audio_encoder is of another kind than AV-HuBERT", "model.audio.encoder.kind")


def test_another_task(
    official: Any, refused: Callable[..., str], parts: Any, audio_recipe: Callable[..., Path]
) -> None:
    recipe = parts.mouth_recipe(audio_recipe, "video")
    has(refused(official, recipe=recipe), "task audio", "model.task=video")
    for key in [key for key in official.state if key.startswith("audio_proj.")]:
        official.state[key.replace("audio_proj", "video_proj")] = official.state[key]
    has(refused(official), "task audiovisual", "model.task=audio")
    for key in [key for key in official.state if "_proj." in key and not key.startswith("llm.")]:
        del official.state[key]
    has(refused(official), "expected a projector", "found none")


def test_lora_of_the_encoder(
    parts: Any, plain_llm: Path, refused: Callable[..., str], audio_recipe: Callable[..., Path]
) -> None:
    official = parts.mouth_checkpoint(plain_llm)
    recipe = parts.mouth_recipe(audio_recipe, "video")
    lora = "model.video.encoder.lora"
    scale = refused(official, f"{lora}.alpha=8", recipe=recipe, names_file=False)
    has(scale, f"{lora}.alpha", "scale (alpha / rank) of 2", "expected 16, got 8")
    key = "video_encoder.encoder.layers.0.self_attn.lora_down_"
    has(refused(official, f"{lora}.rank=4", f"{lora}.alpha=8", recipe=recipe), key, "[8, 128]", f"{lora}.rank=8")
    has(refused(official, f"{lora}.rank=0", recipe=recipe), key, "no place", "lora.rank=64")
    for name in [name for name in official.state if "video_encoder" in name and "lora" in name]:
        del official.state[name]
    has(refused(official, recipe=recipe), key, "is missing", f"{lora}.rank=0")


def test_other_adapters(official: Any, refused: Callable[..., str]) -> None:
    official.state["llm.model.layers.0.self_attn.adapter.weight"] = torch.zeros(3, 2)
    has(refused(official), "llm.model.layers.0.self_attn.adapter.weight [3, 2]", "no place")


def test_files_that_are_no_such_checkpoint(
    refuse: Refuse, audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path
) -> None:
    recipe, path = audio_recipe(), tmp_path / "model.pth"

    def message() -> str:
        found = refuse("import", path, "--config", recipe, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return found

    has(message(), str(path), "no such file")
    path.write_bytes(b"not a checkpoint")
    has(message(), str(path), "not a readable checkpoint: damaged, or not a file of torch.save")
    torch.save({"state_dict": {"model.llm.x": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, path)
    has(message(), str(path), "foreign class argparse.Namespace")
    path.write_bytes(path.read_bytes()[:-300])
    has(message(), str(path))
    torch.save([1, 2], path)
    has(message(), "expected a state dict", "list")
    torch.save({"llm.x": 3}, path)
    has(message(), "'llm.x'", "int")
    torch.save(AutoModelForCausalLM.from_pretrained(str(plain_llm)).state_dict(), path)
    has(message(), "is not a tensor of Llama-AVSR", "audio_proj")


def test_bad_options(refuse: Refuse, official: Any, audio_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path, recipe, out = official.write(tmp_path / "model.pth"), audio_recipe(), tmp_path / "out"
    command = ["import", path, "--config", recipe, "--out", out]
    has(refuse(*command, "--reduction", "6"), "--reduction and --alpha go together")
    has(refuse(*command, "--alpha", "6"), "--reduction and --alpha go together")
    has(refuse(*command, "--reduction", "0", "--alpha", "3"), "above 0")
    for alpha in ("nan", "inf", "-1"):
        has(refuse(*command, "--reduction", "6", f"--alpha={alpha}"), "above 0")
    has(refuse(*command, "model.lora.rnk=3"), "model.lora.rank")
    out.mkdir()
    (out / "something").write_text("")
    has(refuse(*command), str(out), "exists already")
    assert (out / "something").exists()
    file = tmp_path / "file"
    file.write_text("")
    has(refuse("import", path, "--config", recipe, "--out", file), "exists already")
    has(refuse("import", path, "--config", recipe, "--out", file / "run"), "--out", "cannot write")


def test_an_empty_folder_is_filled(official: Any, audio_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from avsr.tools.importing import import_checkpoint

    out = tmp_path / "out"
    out.mkdir()
    import_checkpoint(official.write(tmp_path / "model.pth"), str(audio_recipe()), out)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "checkpoints"}
