"""A user's own DeepSpeed JSON beside the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avsr.config import Config, DeepSpeedConfig, TrainingConfig
from avsr.errors import UserError
from avsr.training.engine import deepspeed_config

TRAINING = TrainingConfig(accumulation=3, clip=2.5, learning_rate=3e-4, weight_decay=0.05)


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(settings: Any, precision: str = "fp32") -> dict[str, Any]:
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
        training = TrainingConfig(**{**vars(TRAINING), "precision": precision})
        return deepspeed_config(Config(training=training, deepspeed=DeepSpeedConfig(config=str(path))))

    return make


def refusal(resolve: Callable[..., dict[str, Any]], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*arguments)
    message = str(caught.value)
    assert "deepspeed.config" in message and "ds.json" in message and "\n" not in message
    return message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ours(stage: int, precision: str) -> None:
    training = TrainingConfig(**{**vars(TRAINING), "precision": precision})
    settings = deepspeed_config(Config(training=training, deepspeed=DeepSpeedConfig(stage=stage)))
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 2.5
    assert settings["bf16"]["enabled"] is (precision == "bf16")
    assert not settings.get("fp16", {}).get("enabled")


def test_what_is_missing_or_auto_is_filled_in(resolve: Callable[..., dict[str, Any]]) -> None:
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }
    for settings in (resolve(auto, "bf16"), resolve({}, "bf16"), resolve({"bf16": "auto"}, "bf16")):
        assert settings["gradient_accumulation_steps"] == 3
        assert settings["gradient_clipping"] == 2.5
        assert settings["bf16"]["enabled"] is True
        assert settings["train_micro_batch_size_per_gpu"] == 1
        assert "auto" not in json.dumps(settings)


def test_what_agrees_and_what_is_not_ours_is_kept(resolve: Callable[..., dict[str, Any]]) -> None:
    theirs = {
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 2.5,
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "wall_clock_breakdown": True,
    }
    settings = resolve(theirs, "bf16")
    for key in ("zero_optimization", "optimizer", "scheduler", "wall_clock_breakdown", "bf16"):
        assert settings[key] == theirs[key]


@pytest.mark.parametrize("fp16", [{"enabled": True}, {"enabled": "auto"}, {"enabled": 1}, True])
def test_fp16_is_refused_with_the_reason(resolve: Callable[..., dict[str, Any]], fp16: Any) -> None:
    message = refusal(resolve, {"fp16": fp16})
    assert "fp16" in message and "65,504" in message and "bf16" in message


@pytest.mark.parametrize("fp16", [{"enabled": False}, {}, None, False])
def test_fp16_switched_off_is_fine(resolve: Callable[..., dict[str, Any]], fp16: Any) -> None:
    assert resolve({"fp16": fp16})["gradient_clipping"] == 2.5


@pytest.mark.parametrize(
    ("theirs", "parts"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0", "2.5"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps", "8", "3"]),
        ({"bf16": {"enabled": True}}, ["bf16", "True", "False"]),
    ],
)
def test_contradictions_name_key_and_both_values(
    resolve: Callable[..., dict[str, Any]], theirs: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(resolve, theirs)
    for part in parts:
        assert part in message


def test_nothing_auto_is_left_for_deepspeed_to_stumble_over(resolve: Callable[..., dict[str, Any]]) -> None:
    """A JSON written for the trainer of transformers: filled in, or refused by name."""
    theirs = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2},
    }
    try:
        settings = resolve(theirs)
    except UserError as error:
        assert "optimizer" in str(error)
    else:
        assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "\x00"])
def test_broken_json(resolve: Callable[..., dict[str, Any]], text: str) -> None:
    assert "JSON" in refusal(resolve, text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_json_that_is_no_object(resolve: Callable[..., dict[str, Any]], text: str) -> None:
    assert "JSON object" in refusal(resolve, text)


def test_a_missing_file(tmp_path: Path) -> None:
    config = Config(deepspeed=DeepSpeedConfig(config=str(tmp_path / "no.json")))
    with pytest.raises(UserError) as caught:
        deepspeed_config(config)
    assert "deepspeed.config" in str(caught.value) and "no.json" in str(caught.value)
