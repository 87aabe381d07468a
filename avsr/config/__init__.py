"""Typed configuration: what can be set, its defaults and the values that are allowed.

Small YAML files compose it, see :mod:`avsr.config.composing`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from avsr.config.composing import compose, leaves
from avsr.config.limits import check_values
from avsr.errors import UserError

# Streams of a task, in the order in which they stand in the prompt. "fused" is one encoder that reads sound and mouth.
TASKS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "video": ("video",),
    "audiovisual": ("audio", "video"),
    "fused": ("fused",),
}


def parts_of(task: str) -> list[str]:
    """The tasks that a model of ``task`` can do: its own and those of its streams alone."""
    return [name for name in TASKS if set(TASKS[name]) <= set(TASKS[task])]


@dataclass
class LoraConfig:
    """Rank and alpha are PEFT's (scale = alpha / rank); rank 0 switches LoRA off."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class EncoderConfig:
    """A frozen encoder: ``name`` is a hub id, a file, a folder, ``package:NAME`` of an installed package, or
    ``run:PATH`` inside the run's folder, wherever that lies (``avsr import`` writes it)."""

    kind: str = "whisper"  # whisper | wavlm | avhubert | visual
    name: str | None = None  # required for the streams of model.task
    pad_to_30s: bool = False  # Whisper: exact parity with Hugging Face; else only the clip itself is encoded
    normalise: bool | None = None  # layer-normalise the waveform; null = as the encoder was trained
    batch: int = 16  # clips encoded at once for the cache
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=0))  # of the encoder itself (avhubert alone)


@dataclass
class CompressionConfig:
    kind: str = "average"  # average | stack
    rate: int = 4  # encoder frames per token (Whisper and WavLM give 50 a second, AV-HuBERT and visual 25)


@dataclass
class ProjectorConfig:
    hidden: int = 2048
    layernorm: bool = True


@dataclass
class DelimiterConfig:
    # normal:STD | table (the embedding table's std) | mean (its mean) | none (the speech has no delimiters)
    init: str = "normal:0.02"
    train: bool = False


@dataclass
class LLMConfig:
    """``name`` is a hub id, a folder, a .gguf file, or ``package:NAME`` of an installed package."""

    name: str = MISSING
    bos_token: str | None = None  # the anchor, when the tokenizer has no BOS
    eos_token: str | None = None  # the end, when the tokenizer has no EOS
    attention: str = "flashsink"  # in training; the others are transformers' own and measure no sinks


@dataclass
class StreamConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)


def _mouth_stream() -> StreamConfig:
    return StreamConfig(EncoderConfig(kind="avhubert"), CompressionConfig(rate=2))


@dataclass
class PromptConfig:
    """The text beside the speech, for each task; "fused" takes that of audiovisual."""

    audio: str = "Transcribe speech to text."
    video: str = "Transcribe video to text."
    audiovisual: str = "Transcribe speech and video to text."
    first: bool = False  # in front of the speech, right behind BOS; else behind it


@dataclass
class ModelConfig:
    task: str = "audio"  # audio | video | audiovisual | fused
    audio: StreamConfig = field(default_factory=StreamConfig)
    video: StreamConfig = field(default_factory=_mouth_stream)
    fused: StreamConfig = field(default_factory=_mouth_stream)  # one AV-HuBERT for both: a single projector
    prompts: PromptConfig = field(default_factory=PromptConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    delimiters: DelimiterConfig = field(default_factory=DelimiterConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def streams(self) -> dict[str, StreamConfig]:
        """The streams of ``task``, in the prompt's order."""
        return {name: getattr(self, name) for name in TASKS[self.task]}


@dataclass
class DataConfig:
    train: str = MISSING
    validation: str = MISSING
    test: dict[str, str] = field(default_factory=dict)  # name -> manifest
    # refuse | skip: what to do about an utterance that cannot be used, also when its clip vanishes during a training
    on_bad: str = "refuse"
    min_seconds: float = 0.1
    max_seconds: float = 30.0
    max_text_tokens: int = 256
    cache: str | None = None  # folder of encoder features; null encodes in every step
    limit: int = 0  # first n utterances of every manifest, 0 = all
    workers: int = 0  # loader processes
    verify: bool = (
        True  # without a cache: read every clip before training; false trusts durations (avsr prepare checks)
    )
    max_mismatch: float = 0.2  # seconds by which sound and video of a clip may differ in length


@dataclass
class NoiseConfig:
    """Babble to mix in. Its source: a sound file, else the other speakers of a manifest (null = data.train)."""

    file: str | None = None
    babble: str | None = None
    talkers: int = 8  # voices mixed out of the manifest
    snr: list[float] = field(default_factory=list)  # dB at which avsr evaluate scores; inf = clean; empty = clean alone


@dataclass
class AugmentConfig:
    """What changes a training clip; never done to validation and test clips."""

    snr: list[float] = field(default_factory=list)  # one of these levels (dB, inf = clean) is drawn for every clip
    time_mask: bool = False  # up to 10 mouth frames a second and 0.4 s of sound a second, as Auto-AVSR
    random_crop: bool = False  # 88x88 of the mouth frames at a random place, not the centre
    views: int = 0  # versions of every clip, also in the cache; 0 = a new one each epoch (needs data.cache=null)

    @property
    def active(self) -> bool:
        return bool(self.snr) or self.time_mask or self.random_crop


@dataclass
class LossConfig:
    decorrelation: float = 0.0  # lambda; 0 = not computed
    margin: float = 0.0
    # plain | chunked (an eighth of the logits at a time, computed twice) | liger (a fused kernel, CUDA)
    cross_entropy: str = "plain"


@dataclass
class TrainingConfig:
    steps: int = 1000  # optimizer steps
    learning_rate: float = 1.0e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.1
    warmup: int = 0  # steps
    clip: float = 10.0  # norm of the whole gradient
    accumulation: int = 1  # micro-batches a step and rank
    frames: int = 1000  # encoder frames in a micro-batch, all streams and padding counted
    utterances: int = 64  # at most, in a micro-batch
    # safetensors file with weights to begin with, named as in a checkpoint; the others are drawn as ever
    initial_weights: str | None = None
    precision: str = "auto"  # fp32 | bf16 | auto: bf16 where the hardware multiplies it fast
    # false | true: layers run again in the backward | selective: all but their matrix products and attention do
    gradient_checkpointing: str = "false"
    kernels: str = "plain"  # plain | liger: its rotary embedding, SwiGLU and RMSNorm in the LLM, CUDA
    compile: bool = False  # torch.compile of the LLM's MLPs and of the norms that flashsink leaves alone
    packed: bool = False  # utterances one behind the other instead of padded; with model.llm.attention=flashsink
    seed: int = 42
    validate_every: int = 100  # steps
    save_every: int = 0  # steps; 0 = with every validation
    keep_last: int = 0  # newest saves kept as checkpoints/step-NNNNNN, for `avsr average`
    keep_best: int = 0  # saves with the lowest validation loss kept in the same way, beside checkpoints/best
    skip_nonfinite: int = 20  # steps of a run without finite loss and gradient that are skipped before it ends
    # seconds in one stage of a step after which a rank counts as hung, or of the start, at least 30; 0 = never
    timeout: float = 1800.0
    gradient_norms_every: int = 0  # steps between norms of both loss terms alone; 0 = never
    # Weights of the tasks drawn for every clip of an audiovisual model (modality dropout); empty = its own task
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass
class DeepSpeedConfig:
    stage: int = 1
    offload_optimizer: bool = False  # masters and optimizer state in the host's memory (stages 1 to 3)
    offload_parameters: bool = False  # weights too, each fetched for its layer (stage 3)
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
    # Tasks of an audiovisual model, scored one after the other (avsr transcribe: the first); empty = its own
    tasks: list[str] = field(default_factory=list)


@dataclass
class ActConfig:
    """Attention calibration (Yu et al. 2024) in avsr evaluate and transcribe, with heads that avsr act-search finds."""

    beta: float = 1.0  # what is left of a sink's attention; 1 = off, the paper has 0.4
    threshold: float = 0.1  # mean attention that a token gets in a head from which on it is a sink
    heads: str | None = None  # null: act_heads.json of the run | all | a file of that kind


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
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    act: ActConfig = field(default_factory=ActConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies ``key=value`` overrides and checks every key and value.

    Args:
        name: a YAML file, or the name of one below ``configs/`` or ``configs/recipe/`` without its ending; several
            joined by "+", of which later ones win ("asr_16+data/lrs2+llm/llama_3_2_1b").
        overrides: such as ``training.steps=50``.

    Raises:
        UserError: missing or broken file, unknown key (with the nearest valid one), bad value.
    """
    config = compose(name, overrides, Config)
    training = config.training
    training.gradient_checkpointing = training.gradient_checkpointing.lower()  # YAML's booleans come as True and False
    _check_values(config, name)
    return config


def read_run_config(run: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, with overrides."""
    path = Path(run) / "config.yaml"
    if not os.path.isfile(path):
        raise UserError(f"{run} is not a run: {path} is missing (train one with 'avsr train CONFIG')")
    config = load_config(str(path), overrides)
    config.run = str(run)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_values(config: Config, name: str) -> None:
    values = dict(leaves(config))
    check_values(values)
    _check_model(config, values, name)
    if not 0.0 <= config.loss.margin < 1.0:
        raise UserError(f"loss.margin: expected 0 <= margin < 1, got {config.loss.margin}")
    if not 0.0 <= config.act.beta <= 1.0:
        raise UserError(f"act.beta: expected 0 <= beta <= 1, got {config.act.beta}")
    if not 0.0 < config.act.threshold < 1.0:
        raise UserError(f"act.threshold: expected 0 < threshold < 1, got {config.act.threshold}")
    if len(config.training.betas) != 2 or not all(0 <= beta < 1 for beta in config.training.betas):
        raise UserError(f"training.betas: expected two numbers in [0, 1), got {config.training.betas}")
    if config.decode.nbest > config.decode.beams:
        raise UserError(
            f"decode.nbest: expected at most decode.beams = {config.decode.beams}, got {config.decode.nbest}"
        )
    if not math.isfinite(config.decode.length_penalty):
        raise UserError(f"decode.length_penalty: expected a number, got {config.decode.length_penalty}")
    for key, path in config.data.test.items():
        if not isinstance(path, str):
            raise UserError(f"data.test.{key}: expected the path of a manifest, got {path!r}")
    if config.deepspeed.stage == 3 and config.training.gradient_norms_every:
        raise UserError("training.gradient_norms_every: not available under ZeRO stage 3; set it to 0")
    _check_options(config)
    _check_offload(config.deepspeed)
    if config.training.packed and config.model.llm.attention != "flashsink":
        raise UserError("training.packed: needs model.llm.attention=flashsink, which keeps packed utterances apart")
    if config.deepspeed.stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.stage: expected 0, 1, 2 or 3, got {config.deepspeed.stage}")
    if os.path.abspath(config.data.validation) in map(os.path.abspath, config.data.test.values()):
        raise UserError("data.validation: the best checkpoint must not be chosen on a test manifest")


def _check_options(config: Config) -> None:
    """Gradients of both terms apart need a second backward of the same forward, and a compiled MLP shows no products
    that could be kept."""
    training = config.training
    if training.compile and training.gradient_checkpointing == "selective":
        raise UserError(
            "training.compile: not with training.gradient_checkpointing=selective; set that to true or false"
        )
    if training.compile and training.kernels == "liger":
        raise UserError("training.compile: training.kernels=liger takes the place of all that it compiles; choose one")
    if training.gradient_norms_every and training.gradient_checkpointing == "selective":
        raise UserError(
            "training.gradient_norms_every: not with training.gradient_checkpointing=selective; set it to 0"
        )
    if training.gradient_norms_every and config.loss.cross_entropy == "liger":
        raise UserError("training.gradient_norms_every: not with loss.cross_entropy=liger; set it to 0")


def _check_offload(deepspeed: DeepSpeedConfig) -> None:
    for key, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(deepspeed, key) and deepspeed.stage < least:
            raise UserError(f"deepspeed.{key}: needs deepspeed.stage of at least {least}, got {deepspeed.stage}")


def _check_model(config: Config, values: dict[str, Any], name: str) -> None:
    model = config.model
    missing = [f"model.{stream}.encoder.name" for stream, part in model.streams.items() if not part.encoder.name]
    if missing:
        raise UserError(f"{name}: no value for {', '.join(missing)}, which model.task = {model.task} needs")
    for key, value in values.items():
        if key.endswith("lora.dropout") and not 0.0 <= value < 1.0:
            raise UserError(f"{key}: expected 0 <= dropout < 1, got {value}")
        if key.endswith("lora.alpha") and not 0.0 < value < math.inf:
            raise UserError(f"{key}: expected more than 0, got {value}")
    if model.delimiters.init == "none" and model.delimiters.train:
        raise UserError("model.delimiters.train: there is nothing to train with model.delimiters.init = none")
    for stream, part in model.streams.items():
        if part.encoder.lora.rank and part.encoder.kind != "avhubert":
            raise UserError(f"model.{stream}.encoder.lora: not available for {part.encoder.kind}; set its rank to 0")
    parts = parts_of(model.task)
    for key, tasks in (("training.tasks", config.training.tasks), ("decode.tasks", config.decode.tasks)):
        for task in tasks:
            if task not in parts:
                raise UserError(f"{key}: model.task = {model.task} knows {', '.join(parts)}, got {task!r}")
    for key in ("noise.snr", "augment.snr"):
        for level in values[key]:
            if not level > -math.inf:  # NaN too
                raise UserError(f"{key}: expected levels in dB, or inf for clean, got {level}")
    weights = config.training.tasks.values()
    if weights and not (min(weights) >= 0 and sum(weights) > 0):
        raise UserError(f"training.tasks: expected weights of at least 0 and one above, got {config.training.tasks}")
    if config.augment.active and config.data.cache and not config.augment.views:
        raise UserError(
            "augment.views: a cache holds a number of versions of every clip: say how many, or set data.cache=null"
        )
