"""The recipes of the paper's rows: composed as their names say, and with other corpora, models and encoders."""

from __future__ import annotations

import pytest

from avsr.config import load_config
from avsr.config.composing import configs_folder, differences
from avsr.errors import UserError

RECIPES = sorted(path.stem for path in configs_folder().glob("recipe/*.yaml"))
PAPER = [name for name in RECIPES if not name.startswith("demo")]
HIDDEN = {  # hidden size and Llama-AVSR's reduction factor (its rank is hidden / factor, its scale alpha / factor)
    "llama_2_7b": (4096, 64, 8),
    "llama_3_1_8b": (4096, 64, 8),
    "llama_3_2_1b": (2048, 32, 4),
    "llama_3_2_3b": (3072, 32, 4),
    "qwen2_5_3b": (2048, 32, 4),
    "qwen3_1_7b": (2048, 32, 4),
    "smollm2_1_7b": (2048, 32, 4),
    "tinyllama": (2048, 32, 4),
}


def test_parts_joined_by_a_plus_say_what_they_do() -> None:
    config, plain = load_config("asr_16+data/lrs2+llm/llama_3_2_1b"), load_config("asr_16")
    assert config.data.train == "data/lrs2/train.jsonl" and config.data.test == {"lrs2": "data/lrs2/test.jsonl"}
    assert config.model.llm.name == "meta-llama/Llama-3.2-1B" and config.model.lora.rank == 64
    changed = {line.split(":")[0] for line in differences(plain, config)}
    assert changed == {
        "data.train",
        "data.validation",
        "data.test",
        "model.llm.name",
        "model.lora.rank",
        "model.lora.alpha",
    }
    assert load_config("llm/llama_3_2_1b+asr_16").model.llm.name == "meta-llama/Llama-3.2-3B"  # the later wins
    with pytest.raises(UserError, match="no config 'nothing'"):
        load_config("asr_16+nothing")


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_ranks_are_those_of_the_reduction_factor(name: str) -> None:
    hidden, factor, alpha = HIDDEN[name]
    lora = load_config(f"asr_16+llm/{name}").model.lora
    assert lora.rank == round(hidden / factor) and lora.alpha / lora.rank == alpha / factor
    assert lora.targets == ["q_proj", "v_proj"]
    assert {path.stem for path in configs_folder().glob("llm/*.yaml")} == HIDDEN.keys()


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_are_their_rows(name: str) -> None:
    config = load_config(name)
    row, on = name.removesuffix("_decorrelation"), name.endswith("_decorrelation")
    task, *rates = row.split("_")
    streams = {"asr": ["audio"], "vsr": ["video"], "avsr": ["audio", "video"]}[task]
    assert list(config.model.streams) == streams
    assert [part.compression.rate for part in config.model.streams.values()] == [int(rate) for rate in rates]
    assert (config.loss.decorrelation, config.loss.margin) == ((1.0e4, 0.0) if on else (0.0, 0.0))
    assert config.run == f"runs/{name}" and config.augment.snr == [-5, 0, 5, 10, 15, 20, float("inf")]
    lora = config.model.video.encoder.lora
    assert (lora.rank, lora.alpha) == ((64, 128.0) if task == "vsr" else (0, 32.0))
    if on:  # composed, not copied: only the loss differs
        changed = {line.split(":")[0] for line in differences(load_config(row), config)}
        assert changed == {"run", "loss.decorrelation"}
    for corpus in ("lrs2", "lrs3"):
        assert load_config(f"{name}+data/{corpus}").data.test == {corpus: f"data/{corpus}/test.jsonl"}


def test_every_row_of_the_paper_has_both_recipes() -> None:
    rows = ["asr_16", "asr_32", "vsr_2", "vsr_3", "vsr_5", "avsr_4_2", "avsr_16_2", "avsr_16_5"]
    assert sorted(PAPER) == sorted([*rows, *(f"{row}_decorrelation" for row in rows)])


@pytest.mark.parametrize("part", ["encoder/avhubert_large_both", "encoder/avhubert_large_fused", "encoder/wavlm_large"])
def test_other_encoders_join_a_recipe(part: str) -> None:
    config = load_config(f"avsr_16_2+{part}")
    kinds = {name: stream.encoder.kind for name, stream in config.model.streams.items()}
    expected = {
        "encoder/avhubert_large_both": {"audio": "avhubert", "video": "avhubert"},
        "encoder/avhubert_large_fused": {"fused": "avhubert"},
        "encoder/wavlm_large": {"audio": "wavlm", "video": "avhubert"},
    }
    assert kinds == expected[part]
