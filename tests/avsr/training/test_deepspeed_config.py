"""A user's own DeepSpeed JSON combined with the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avsr.config import Config, DeepSpeedConfig, TrainingConfig
from avsr.errors import UserError
from avsr.training.deepspeed_json import check_deepspeed, deepspeed_config

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


@pytest.mark.parametrize("fp16", [{"enabled": False}, {"enabled": "auto", "loss_scale": 0}, "auto", {}, None, False])
def test_fp16_switched_off_is_fine(resolve: Callable[..., dict[str, Any]], fp16: Any) -> None:
    settings = resolve({"fp16": fp16}, "bf16")
    assert settings["gradient_clipping"] == 2.5 and settings["bf16"]["enabled"] and "fp16" not in settings


# As in the documentation of transformers
STANDARD = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_the_standard_json_of_transformers_gets_the_recipes_values(resolve: Callable[..., dict[str, Any]]) -> None:
    settings = resolve(STANDARD, "bf16")
    assert settings["optimizer"]["params"] == {"lr": 3e-4, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.05}
    assert settings["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 3e-4,
        "warmup_num_steps": 0,
        "total_num_steps": 1000,
    }
    assert settings["zero_optimization"]["stage"] == 3 and "reduce_bucket_size" not in settings["zero_optimization"]
    assert '"auto"' not in json.dumps(settings)


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def check(settings: dict[str, Any], **ours: Any) -> list[str]:
        path = tmp_path / "ds.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(settings).encode())
        return check_deepspeed(Config(training=TRAINING, deepspeed=DeepSpeedConfig(config=str(path), **ours)))

    return check


@pytest.mark.integration
def test_what_has_no_effect_is_named(checked: Callable[..., list[str]]) -> None:
    assert checked({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}) == []
    text = "\n".join(checked(STANDARD))
    for part in ("steps_per_print = 2000 is ignored", "training.learning_rate", "training.warmup"):
        assert part in text
    assert "train_batch_size" not in text  # auto
    theirs = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 32, "_comment": "mine"}
    lines = checked(theirs, stage=3, offload_optimizer=True)
    for part in (
        "per_gpu = 4 is",
        "batch_size = 32 is",
        "_comment is",
        "deepspeed.stage = 3 is",
        "offload_optimizer is",
    ):
        assert sum(part in line and "ignored" in line and "ds.json" in line for line in lines) == 1, part
    assert len(lines) == 5
    assert check_deepspeed(Config()) == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("theirs", "parts"),
    [
        ({"zero_optimization": {"stage": 5}}, ["zero_optimization.stage", "0, 1, 2 or 3", "5"]),
        ({"zero_optimization": {"stage": "3"}}, ["zero_optimization.stage", "'3'"]),
        ({"zero_optimization": {"stage": 2, "ofload_param": {}}}, ["ofload_param"]),
        ({"zero_optimization": [2]}, ["zero_optimization", "[2]"]),
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
        ({"gradient_cliping": 1.0}, ["'gradient_cliping'", "did you mean 'gradient_clipping'"]),
        ({"optimiser": {"type": "AdamW"}}, ["'optimiser'", "did you mean 'optimizer'"]),
        ({"optimizer": {"type": "Adamm"}}, ["optimizer.type", "'Adamm'", "did you mean 'Adam'"]),
        ({"optimizer": {"params": {}}}, ["optimizer.type", "None", "adamw"]),
        ({"optimizer": "AdamW"}, ["optimizer", "'AdamW'"]),
        ({"scheduler": {"type": "WarmupLr2"}}, ["scheduler.type", "'WarmupLr2'", "did you mean 'WarmupLR'"]),
        ({"activation_checkpointing": 3}, ["DeepSpeed refuses it"]),
        ({"communication_data_type": "fp8"}, ["communication_data_type", "fp8"]),
    ],
    ids=repr,
)
def test_what_deepspeed_would_refuse_is_refused_before_it_starts(
    checked: Callable[..., list[str]], theirs: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        checked(theirs)
    message = str(caught.value)
    assert all(part in message for part in ["deepspeed.config", "ds.json", *parts]) and "\n" not in message


FP16 = ["fp16", "65,504", "bf16"]


@pytest.mark.parametrize(
    ("theirs", "parts"),
    [
        *(({"fp16": fp16}, FP16) for fp16 in ({"enabled": True}, {"enabled": 1}, True)),
        # contradictions: the key and both values
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0", "2.5"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps", "8", "3"]),
        ({"bf16": {"enabled": True}}, ["bf16", "True", "False"]),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": "auto"}}}, ["optimizer", "'auto'"]),
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
