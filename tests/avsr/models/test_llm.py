"""Loading the language model, its two framing tokens, and LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from avsr.config import LLMConfig, LoraConfig
from avsr.errors import UserError
from avsr.models import llm
from avsr.models.llm import add_lora, load_llm, lora_from_reduction


def test_loaded_frozen_in_eval_mode_with_its_own_tokens(tiny_llm: Path) -> None:
    loaded = load_llm(LLMConfig(name=str(tiny_llm)))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.bos == loaded.tokenizer.convert_tokens_to_ids("<s>")
    assert loaded.eos == loaded.tokenizer.convert_tokens_to_ids("</s>")
    ids = loaded.tokenize("bin blue")
    assert loaded.bos not in ids and loaded.tokenizer.decode(ids) == "bin blue"


def without_special(folder: Path, target: Path, key: str) -> Path:
    """A copy of the model whose tokenizer does not name ``key``."""
    target.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name in ("tokenizer_config.json", "special_tokens_map.json"):
            table = json.loads(content)
            table.pop(key, None)
            content = json.dumps(table).encode()
        (target / path.name).write_bytes(content)
    return target


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
def test_a_tokenizer_without_it_needs_a_name_in_the_config(tiny_llm: Path, tmp_path: Path, key: str) -> None:
    folder = without_special(tiny_llm, tmp_path / "model", key)
    with pytest.raises(UserError, match=rf"model\.llm\.{key}"):
        load_llm(LLMConfig(name=str(folder)))
    loaded = load_llm(LLMConfig(name=str(folder), **{key: "<pad>"}))
    value = loaded.bos if key == "bos_token" else loaded.eos
    assert value == loaded.tokenizer.convert_tokens_to_ids("<pad>")
    with pytest.raises(UserError, match="no token '<nothing>'"):
        load_llm(LLMConfig(name=str(folder), **{key: "<nothing>"}))


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(tiny_llm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llm))
    tokenizer.add_tokens(["bonjour"])
    folder = tmp_path / "model"
    shutil.copytree(tiny_llm, folder)
    tokenizer.save_pretrained(folder)
    loaded = load_llm(LLMConfig(name=str(folder)))
    rows = loaded.model.get_input_embeddings().num_embeddings
    assert loaded.tokenize("bin") and len(loaded.tokenizer) == rows + 1  # a token that is never used does no harm
    with pytest.raises(UserError, match=rf"model\.llm\.name: .*'bonjour' has the id {rows}, .*table has {rows} rows"):
        loaded.tokenize("bin bonjour")
    with pytest.raises(UserError, match="'bonjour'"):
        load_llm(LLMConfig(name=str(folder), eos_token="bonjour"))


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_llm(LLMConfig(name=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.llm\.name"):
        load_llm(LLMConfig(name=str(tmp_path / "empty")))


def test_lora_has_peft_rank_and_scale_and_starts_as_identity(tiny_llm: Path) -> None:
    loaded = load_llm(LLMConfig(name=str(tiny_llm)))
    ids = torch.tensor([[1, 5, 6, 7]])
    before = loaded.model(ids).logits
    wrapped = add_lora(loaded.model, LoraConfig(rank=4, alpha=8.0))
    torch.testing.assert_close(wrapped(ids).logits, before)
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 2 * 2  # layers x (q, v) x (A, B)
    assert all("q_proj" in name or "v_proj" in name for name in trainable)
    layer = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 4
    assert layer.scaling["default"] == 2.0


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (["nothing"], "'nothing'"),
        (["q_proj", "v_porj"], "'v_porj'"),
        (["q_proj", "lm_head"], "'lm_head'"),
        (["embed_tokens"], "'embed_tokens'"),
        (["all-linear", "input_layernorm"], "'input_layernorm'"),
        ([], "names no layer"),
    ],
)
def test_every_lora_target_means_a_linear_layer(tiny_llm: Path, targets: list[str], wrong: str) -> None:
    with pytest.raises(UserError, match=r"^model\.lora\.targets: ") as caught:
        add_lora(load_llm(LLMConfig(name=str(tiny_llm))).model, LoraConfig(targets=targets))
    message = str(caught.value)
    assert wrong in message
    assert "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; all-linear means them all" in message


def test_all_linear_adapts_everything_but_the_head(tiny_llm: Path) -> None:
    model = add_lora(load_llm(LLMConfig(name=str(tiny_llm))).model, LoraConfig(targets=["all-linear"]))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 3 * 7 and not any("lm_head" in name or "embed" in name for name in adapted)
    one = add_lora(load_llm(LLMConfig(name=str(tiny_llm))).model, LoraConfig(targets=["layers.1.self_attn.o_proj"]))
    assert [name for name, _ in one.named_parameters() if "lora_A" in name and "layers.1.self_attn.o_proj" in name]
    assert sum("lora_A" in name for name, _ in one.named_parameters()) == 1


@pytest.mark.parametrize(
    ("hidden", "reduction", "alpha", "rank", "scale"),
    [(3072, 32, 4, 96, 0.125), (2048, 32, 4, 64, 0.125), (4096, 64, 8, 64, 0.125), (5120, 64, 8, 80, 0.125)],
)
def test_the_papers_reduction_factor(hidden: int, reduction: int, alpha: float, rank: int, scale: float) -> None:
    """rank = hidden / R and scale = alpha / R, as Llama-AVSR computes them; there "rank" is a divisor."""
    config = lora_from_reduction(hidden, reduction, alpha)
    assert config.rank == rank
    assert config.alpha / config.rank == pytest.approx(scale)


def test_another_gguf_of_the_same_name_and_size_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "convert_once", lambda source, target, last, write: target)
    path = tmp_path / "model.gguf"
    content = bytearray(3 * 2**20)
    path.write_bytes(content)
    first = llm.convert_gguf(path)
    assert llm.convert_gguf(path) == first
    places = (0, 2**16 - 1, len(content) - 1)
    for place in places:  # in the first and last of the pieces that are read
        content[place] = 1
        path.write_bytes(content)
        assert llm.convert_gguf(path) != first
        content[place] = 0
    path.write_bytes(content[:-1])
    assert llm.convert_gguf(path) != first
    with pytest.raises(UserError, match="cannot be read"):
        llm.convert_gguf(tmp_path / "gone.gguf")
