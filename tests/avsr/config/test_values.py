"""Values of keys that are refused, alone and together, and those that arrive."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from avsr.config import load_config
from avsr.errors import UserError


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps=many", ["training.steps", "many"]),
        ("training.steps=1.5", ["training.steps", "1.5"]),
        ("training.steps=null", ["training.steps"]),
        ("training.steps=0", ["training.steps", "at least 1", "0"]),
        ("training.steps=-3", ["training.steps", "at least 1", "-3"]),
        ("training.learning_rate=0", ["training.learning_rate", "more than 0"]),
        ("training.learning_rate=.nan", ["training.learning_rate", "nan"]),
        ("training.weight_decay=.nan", ["training.weight_decay", "nan"]),
        ("training.clip=-1", ["training.clip", "-1"]),
        ("training.betas=[0.9]", ["training.betas", "0.9"]),
        ("training.betas=[0.9, 1.0]", ["training.betas", "1.0"]),
        ("training.betas=0.9", ["training.betas"]),
        ("training.precision=fp64", ["training.precision", "fp32", "bf16", "fp64"]),
        ("training=3", ["training", "3"]),
        ("training.steps.more=3", ["training.steps"]),
        ("model.audio.compression.kind=sum", ["model.audio.compression.kind", "average", "stack", "sum"]),
        ("model.audio.compression.rate=0", ["model.audio.compression.rate", "at least 1"]),
        ("model.task=smell", ["model.task", "audio", "smell"]),
        ("model.lora.rank=-1", ["model.lora.rank", "at least 0"]),
        ("model.lora.dropout=2", ["model.lora.dropout", "2"]),
        ("model.projector.layernorm=perhaps", ["model.projector.layernorm", "perhaps"]),
        ("data.on_bad=ignore", ["data.on_bad", "refuse", "skip", "ignore"]),
        ("data.max_seconds=0", ["data.max_seconds", "more than 0"]),
        ("data.test=x.jsonl", ["data.test"]),
        ("loss.margin=1", ["loss.margin", "1"]),
        ("loss.margin=-0.1", ["loss.margin", "-0.1"]),
        ("loss.decorrelation=-1", ["loss.decorrelation", "at least 0"]),
        ("deepspeed.stage=4", ["deepspeed.stage", "4"]),
        ("decode.normaliser=google", ["decode.normaliser", "plain", "whisper", "google"]),
        ("decode.beams=0", ["decode.beams", "1 <= beams <= 256"]),
        ("run=", ["run"]),
        ("training.tasks={video: 1}", ["training.tasks", "model.task = audio knows audio", "'video'"]),
        ("decode.tasks=[fused]", ["decode.tasks", "'fused'"]),
        ("training.tasks={audio: -1}", ["training.tasks", "weights"]),
        ("training.tasks={audio: 0}", ["training.tasks", "weights"]),
        ("model.audio.encoder.lora.rank=4", ["model.audio.encoder.lora", "whisper"]),
        ("model.task=both", ["model.task", "audio, video, audiovisual, fused", "'both'"]),
        ("model.audio.encoder.kind=visual", ["model.audio.encoder.kind", "'visual'"]),
        ("noise.talkers=0", ["noise.talkers", "at least 1"]),
        ("noise.snr=[0,.nan]", ["noise.snr", "levels in dB", "nan"]),
        ("augment.snr=[-.inf]", ["augment.snr", "levels in dB", "-inf"]),
    ],
)
def test_bad_values_name_key_and_value(recipe: Callable[..., str], override: str, parts: list[str]) -> None:
    message = refusal(recipe(), override)
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("decode.nbest=10000 decode.beams=10000", "decode.beams: expected 1 <= beams <= 256, got 10000"),
        ("decode.nbest=2", "decode.nbest: expected at most decode.beams = 1, got 2"),
        ("decode.length_penalty=.inf", "decode.length_penalty: expected -10 <= length_penalty <= 10, got inf"),
        ("decode.length_penalty=1e308", "decode.length_penalty: expected -10 <= length_penalty <= 10, got 1e+308"),
        ("decode.length_penalty=-400", "decode.length_penalty: expected -10 <= length_penalty <= 10, got -400"),
        ("training.compile=true training.gradient_checkpointing=selective", "training.compile: not with"),
        ("training.compile=true training.kernels=liger", "training.compile: training.kernels=liger replaces"),
        ("training.gradient_norms_every=1 deepspeed.stage=3", "norms_every: not available under ZeRO stage 3"),
        (
            "training.gradient_norms_every=1 training.gradient_checkpointing=selective",
            "norms_every: not with training.g",
        ),
        ("training.gradient_norms_every=1 loss.cross_entropy=liger", "norms_every: not with loss.cross_entropy=liger"),
        ("training.packed=true model.llm.attention=sdpa", "training.packed: needs model.llm.attention=flashsink"),
        (
            "deepspeed.offload_optimizer=true deepspeed.stage=0",
            "offload_optimizer: needs deepspeed.stage of at",
        ),
        (
            "deepspeed.offload_parameters=true deepspeed.stage=2",
            "offload_parameters: needs deepspeed.stage of at",
        ),
        ("model.delimiters.init=none model.delimiters.train=true", "model.delimiters.train: there is nothing to train"),
        ("augment.time_mask=true data.cache=folder", "augment.views: a cache holds a fixed number of versions"),
    ],
)
def test_keys_that_do_not_go_together(recipe: Callable[..., str], overrides: str, part: str) -> None:
    message = refusal(recipe(), *overrides.split())
    assert part in message


@pytest.mark.parametrize(("task", "kind"), [("audio", "wavlm"), ("video", "visual")])
def test_only_avhubert_has_lora(recipe: Callable[..., str], task: str, kind: str) -> None:
    """cuDNN trains no recurrent layer in eval mode, and WavLM's attention never calls its linear layers."""
    stream = f"model.{task}.encoder"
    settings = [f"model.task={task}", f"{stream}.name=e", f"{stream}.kind={kind}", f"{stream}.lora.rank=4"]
    assert f"{stream}.lora: not available for {kind}" in refusal(recipe(), *settings)
    assert load_config(recipe(), [*settings[:2], f"{stream}.kind=avhubert", settings[3]]).model.task == task


def test_bad_values_in_a_file(recipe: Callable[..., str]) -> None:
    path = recipe("training: {steps: soon}\n")
    message = refusal(path)
    assert path in message and "training.steps" in message and "soon" in message
    assert "loss" in refusal(recipe("loss: 3\n"))


def test_fp16_is_refused_with_the_reason(recipe: Callable[..., str]) -> None:
    message = refusal(recipe(), "training.precision=fp16")
    assert "training.precision" in message and "65,504" in message and "activations" in message


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", "training.steps=[1"])
def test_overrides_that_are_none(recipe: Callable[..., str], override: str) -> None:
    assert override in refusal(recipe(), override)


@pytest.mark.parametrize("spelling", ["data/x/test.jsonl", "data/x/../x/test.jsonl", "./data/x/test.jsonl"])
def test_validation_on_a_test_manifest_is_refused(recipe: Callable[..., str], spelling: str) -> None:
    message = refusal(recipe(), "data.test.a=data/x/test.jsonl", f"data.validation={spelling}")
    assert "data.validation" in message and "test" in message


def test_good_overrides_arrive_with_their_type(recipe: Callable[..., str]) -> None:
    config = load_config(
        recipe(),
        [
            "training.steps=7",
            "training.learning_rate=1e-4",
            "training.betas=[0.8, 0.9]",
            "model.lora.targets=[q_proj]",
            "model.projector.layernorm=false",
            "data.test.more=b=c.jsonl",
            "data.cache=null",
            "training.precision=bf16",
            "loss.margin=0.5",
        ],
    )
    assert config.training.steps == 7 and isinstance(config.training.steps, int)
    assert config.training.learning_rate == 1e-4
    assert config.training.betas == [0.8, 0.9]
    assert config.model.lora.targets == ["q_proj"]
    assert config.model.projector.layernorm is False
    assert config.data.test == {"a": "a.jsonl", "more": "b=c.jsonl"}
    assert config.data.cache is None
    assert config.training.precision == "bf16"
    assert config.loss.margin == 0.5
