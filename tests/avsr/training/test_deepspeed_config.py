"""A user's own DeepSpeed JSON combined with the recipe."""

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


@pytest.mark.parametrize("fp16", [{"enabled": False}, {}, None, False])
def test_fp16_switched_off_is_fine(resolve: Callable[..., dict[str, Any]], fp16: Any) -> None:
    assert resolve({"fp16": fp16})["gradient_clipping"] == 2.5


FP16 = ["fp16", "65,504", "bf16"]


@pytest.mark.parametrize(
    ("theirs", "parts"),
    [
        *(({"fp16": fp16}, FP16) for fp16 in ({"enabled": True}, {"enabled": "auto"}, {"enabled": 1}, True)),
        # contradictions: the key and both values
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0", "2.5"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps", "8", "3"]),
        ({"bf16": {"enabled": True}}, ["bf16", "True", "False"]),
        # a JSON written for the trainer of transformers
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 2}}, ["optimizer"]),
        *((text, ["JSON"]) for text in ("", "{", "{'a': 1}", "\x00")),
        *((text, ["JSON object"]) for text in ("[]", "3", "null", '"x"')),
    ],
    ids=repr,
)
def test_what_cannot_work_is_refused_in_one_line(
    resolve: Callable[..., dict[str, Any]], theirs: Any, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(theirs)
    message = str(caught.value)
    assert all(part in message for part in ["deepspeed.config", "ds.json", *parts]) and "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"deepspeed\.config: .*no\.json"):
        deepspeed_config(Config(deepspeed=DeepSpeedConfig(config=str(tmp_path / "no.json"))))
