"""Typed configuration: small YAML files that compose, ``key=value`` overrides, unknown keys refused.

A file may name others in its ``defaults`` list (paths below ``configs/`` without the ending); later ones win,
then the file itself, then the overrides. The result is checked against the dataclasses below.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from avsr.errors import UserError


@dataclass
class EncoderConfig:
    """A frozen Whisper encoder: ``name`` is a hub id, a folder, or ``package:NAME`` of an installed package."""

    name: str = MISSING
    pad_to_30s: bool = False  # exact parity with Hugging Face; else only the clip itself is encoded
    batch: int = 16  # clips encoded at once


@dataclass
class CompressionConfig:
    kind: str = "average"  # average | stack
    rate: int = 4  # encoder frames (50 a second) per token


@dataclass
class ProjectorConfig:
    hidden: int = 2048
    layernorm: bool = True


@dataclass
class DelimiterConfig:
    init: str = "normal:0.02"  # normal:STD | table (the embedding table's std) | mean (its mean)
    train: bool = False


@dataclass
class LLMConfig:
    """``name`` is a hub id, a folder, a .gguf file, or ``package:NAME`` of an installed package."""

    name: str = MISSING
    bos_token: str | None = None  # the anchor, when the tokenizer has no BOS
    eos_token: str | None = None  # the end, when the tokenizer has no EOS
    attention: str = "flashsink"  # in training; the others are transformers' own and measure no sinks


@dataclass
class LoraConfig:
    """Rank and alpha are PEFT's (scale = alpha / rank); rank 0 switches LoRA off."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class ModelConfig:
    task: str = "audio"
    prompt: str = "Transcribe speech to text."
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    delimiters: DelimiterConfig = field(default_factory=DelimiterConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    train: str = MISSING
    validation: str = MISSING
    test: dict[str, str] = field(default_factory=dict)  # name -> manifest
    on_bad: str = "refuse"  # refuse | skip: what to do about an utterance that cannot be used
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_text_tokens: int = 256
    cache: str | None = None  # folder of encoder features; null encodes in every step
    limit: int = 0  # first n utterances of every manifest, 0 = all
    workers: int = 0  # loader processes


@dataclass
class LossConfig:
    decorrelation: float = 0.0  # lambda; 0 = not computed
    margin: float = 0.0


@dataclass
class TrainingConfig:
    steps: int = 1000  # optimizer steps
    learning_rate: float = 1.0e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.1
    warmup: int = 0  # steps
    clip: float = 10.0  # norm of the whole gradient
    accumulation: int = 1  # micro-batches a step and rank
    frames: int = 1000  # encoder frames in a micro-batch, padding counted
    utterances: int = 64  # at most, in a micro-batch
    precision: str = "auto"  # fp32 | bf16 | auto: bf16 where the hardware multiplies it fast
    gradient_checkpointing: bool = False
    seed: int = 42
    validate_every: int = 100  # steps
    save_every: int = 0  # steps; 0 = with every validation
    keep_last: int = 0  # newest saves kept as checkpoints/step-NNNNNN, for `avsr average`
    gradient_norms_every: int = 0  # steps between norms of both loss terms alone; 0 = never


@dataclass
class DeepSpeedConfig:
    stage: int = 1
    config: str | None = None  # a DeepSpeed JSON of your own instead


@dataclass
class DecodeConfig:
    beams: int = 1
    nbest: int = 1  # hypotheses of an utterance in hypotheses.jsonl; at most beams
    batch: int = 16
    length_penalty: float = 1.0  # a hypothesis' score is its log-probability / tokens ** length_penalty
    base_tokens: int = 8  # budget = base_tokens + tokens_per_second * duration
    tokens_per_second: float = 12.0
    normaliser: str = "plain"  # plain | whisper


@dataclass
class LogConfig:
    tensorboard: bool = True
    wandb: str | None = None  # project name


@dataclass
class Config:
    run: str = MISSING  # folder of this run
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    log: LogConfig = field(default_factory=LogConfig)


_CHOICES = {
    "model.task": ("audio",),
    "model.compression.kind": ("average", "stack"),
    "data.on_bad": ("refuse", "skip"),
    "model.llm.attention": ("flashsink", "sdpa", "eager", "flash_attention_2"),
    "training.precision": ("fp32", "bf16", "auto"),
    "decode.normaliser": ("plain", "whisper"),
}
_AT_LEAST = {
    "model.encoder.batch": 1,
    "model.compression.rate": 1,
    "model.projector.hidden": 1,
    "model.lora.rank": 0,
    "data.min_seconds": 0,
    "data.max_text_tokens": 1,
    "data.limit": 0,
    "data.workers": 0,
    "loss.decorrelation": 0,
    "loss.margin": 0,
    "training.steps": 1,
    "training.warmup": 0,
    "training.weight_decay": 0,
    "training.accumulation": 1,
    "training.frames": 1,
    "training.utterances": 1,
    "training.validate_every": 1,
    "training.save_every": 0,
    "training.keep_last": 0,
    "training.gradient_norms_every": 0,
    "decode.beams": 1,
    "decode.nbest": 1,
    "decode.batch": 1,
    "decode.base_tokens": 1,
    "decode.tokens_per_second": 0,
}


def configs_folder() -> Path:
    """``configs/`` inside the package when installed from a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"the configs folder is missing beside and inside {package}; reinstall the package")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies ``key=value`` overrides and checks every key and value.

    Args:
        name: a YAML file, or the name of one below ``configs/`` or ``configs/recipe/`` without its ending.
        overrides: such as ``training.steps=50``.

    Raises:
        UserError: missing or broken file, unknown key (with the nearest valid one), bad value.
    """
    merged: Any = _compose(_find(name), ())
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UserError(f"expected key=value, got {text!r}")
        _refuse_unknown(_nested(key, value), text)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"{text!r}: {_first_line(error)}") from error
    return _typed(merged, name)


def read_run_config(run: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, with overrides."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run: {path} is missing (train one with 'avsr train CONFIG')")
    config = load_config(str(path), overrides)
    config.run = str(run)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """``key: ours != theirs`` for every leaf in which two dataclasses differ."""
    lines = []
    for item in dataclasses.fields(ours):
        mine, other = getattr(ours, item.name), getattr(theirs, item.name)
        key = prefix + item.name
        if dataclasses.is_dataclass(mine):
            lines += differences(mine, other, key + ".")
        elif mine != other:
            lines.append(f"{key}: {mine!r} != {other!r}")
    return lines


def _find(name: str) -> Path:
    root = configs_folder()
    candidates = [Path(name), root / f"{name}.yaml", root / "recipe" / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(path.stem for path in (root / "recipe").glob("*.yaml"))
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; recipes: {', '.join(known)}"
    raise UserError(f"there is no config {name!r} (a YAML file or a recipe's name){hint}")


def _compose(path: Path, above: tuple[Path, ...]) -> DictConfig:
    if path in above:
        raise UserError(f"{path}: its defaults lead back to itself")
    try:
        own = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise UserError(f"{path}: expected keys and values at the top")
    defaults = own.pop("defaults", None) or []
    if not isinstance(defaults, ListConfig) and defaults or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: defaults: expected a list of names below configs/, got {defaults!r}")
    _refuse_unknown(OmegaConf.to_container(own), str(path))
    parts: list[Any] = []
    for default in defaults:
        part = configs_folder() / f"{default}.yaml"
        if not part.is_file():
            raise UserError(f"{path}: there is no {part} (from its defaults list)")
        parts.append(_compose(part, (*above, path)))
    merged = OmegaConf.merge(*parts, own)
    assert isinstance(merged, DictConfig)
    return merged


def _typed(merged: Any, name: str) -> Config:
    try:
        full = OmegaConf.merge(OmegaConf.structured(Config), merged)
        missing = sorted(OmegaConf.missing_keys(full))
        if missing:
            raise UserError(f"{name}: no value for {', '.join(missing)}")
        config = OmegaConf.to_object(full)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{name}: {key + ': ' if key else ''}{_first_line(error)}") from error
    assert isinstance(config, Config)
    _check_values(config)
    return config


def _check_values(config: Config) -> None:
    values = dict(_leaves(config))
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            extra = ""
            if values[key] == "fp16":
                extra = ": massive activations of 26,000 and a large lambda leave no room below fp16's 65,504"
            raise UserError(f"{key}: expected one of {', '.join(choices)}, got {values[key]!r}{extra}")
    for key, least in _AT_LEAST.items():
        if not values[key] >= least:
            raise UserError(f"{key}: expected at least {least}, got {values[key]}")
    if not 0.0 <= config.loss.margin < 1.0:
        raise UserError(f"loss.margin: expected 0 <= margin < 1, got {config.loss.margin}")
    if not 0.0 <= config.model.lora.dropout < 1.0:
        raise UserError(f"model.lora.dropout: expected 0 <= dropout < 1, got {config.model.lora.dropout}")
    for key in ("training.learning_rate", "training.clip", "data.max_seconds"):
        if not values[key] > 0:
            raise UserError(f"{key}: expected more than 0, got {values[key]}")
    if len(config.training.betas) != 2 or not all(0 <= beta < 1 for beta in config.training.betas):
        raise UserError(f"training.betas: expected two numbers in [0, 1), got {config.training.betas}")
    if config.decode.nbest > config.decode.beams:
        raise UserError(
            f"decode.nbest: expected at most decode.beams = {config.decode.beams}, got {config.decode.nbest}"
        )
    if config.deepspeed.stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.stage: expected 0, 1, 2 or 3, got {config.deepspeed.stage}")
    if os.path.abspath(config.data.validation) in map(os.path.abspath, config.data.test.values()):
        raise UserError("data.validation: the best checkpoint must not be chosen on a test manifest")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _refuse_unknown(tree: Any, where: str, schema: Any = None, prefix: str = "") -> None:
    schema = schema or Config()
    known = {item.name: getattr(schema, item.name) for item in dataclasses.fields(schema)}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if key not in known:
            every = [name for name, _ in _leaves(Config())]
            inside = [f"{prefix}{key}.{name}" for name in value] if isinstance(value, Mapping) else []
            near = difflib.get_close_matches(inside[0] if len(inside) == 1 else f"{prefix}{key}", every, 1, 0.5)
            near = near or [prefix + k for k in difflib.get_close_matches(str(key), known, 1, 0.5)]
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix + str(key)!r}{hint}")
        if dataclasses.is_dataclass(known[key]):
            if value is not None and not isinstance(value, Mapping):
                raise UserError(f"{where}: {prefix}{key} is a group of keys, got {value!r}")
            _refuse_unknown(value, where, known[key], f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
