"""Every key of a training: type, default, allowed values and help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from avsr.config.keys import MISSING, group, key

# Streams of each task, in prompt order. "fused" is one encoder that takes both sound and mouth.
TASKS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "video": ("video",),
    "audiovisual": ("audio", "video"),
    "fused": ("fused",),
}


def parts_of(task: str) -> list[str]:
    """The tasks that a model of ``task`` can perform: its own and those of its streams alone."""
    return [name for name in TASKS if set(TASKS[name]) <= set(TASKS[task])]


@dataclass
class LoraConfig:
    """Rank and alpha as in PEFT (scale = alpha / rank); rank 0 disables LoRA."""

    rank: int = key(16, "rank; 0 disables LoRA", at_least=0)
    alpha: float = key(32.0, "numerator of the scale alpha / rank", above=0, below=math.inf)
    dropout: float = key(0.0, "dropout of its input", at_least=0, below=1)
    targets: list[str] = key(["q_proj", "v_proj"], "linear layers that are adapted; all-linear means all")


def _no_lora() -> LoraConfig:
    return LoraConfig(rank=0)


@dataclass
class EncoderConfig:
    """A frozen encoder: ``name`` is a hub id, a file, a folder, ``package:NAME`` of an installed package, or
    ``run:PATH`` inside the run's folder, wherever that is (``avsr import`` writes it)."""

    kind: str = key("whisper", "architecture", choices=("whisper", "wavlm", "avhubert", "visual"))
    name: str | None = key(
        None, "hub id, file, folder, package:NAME or run:PATH; required for the streams of model.task", path=True
    )
    pad_to_30s: bool = key(
        False, "Whisper: pad to 30 s for exact parity with Hugging Face; false encodes the clip alone"
    )
    normalise: bool | None = key(None, "layer-normalise the waveform; null = as the encoder was trained")
    batch: int = key(16, "clips encoded at once for the cache", at_least=1)
    precision: str = key("fp32", "of a frozen encoder; bench/README.md has bf16 errors", choices=("fp32", "bf16"))
    lora: LoraConfig = group(_no_lora)


@dataclass
class CompressionConfig:
    kind: str = key("average", "how the frames of a token are joined", choices=("average", "stack"))
    rate: int = key(
        4, "encoder frames per token (Whisper and WavLM give 50 a second, AV-HuBERT and visual 25)", at_least=1
    )


@dataclass
class ProjectorConfig:
    hidden: int = key(2048, "hidden width of the projector's MLP", at_least=1)
    layernorm: bool = key(True, "layer-normalise the projector's output")


@dataclass
class DelimiterConfig:
    init: str = key(
        "normal:0.02",
        "normal:STD | table (std of the embedding table) | mean (its mean) | none (speech without delimiter tokens)",
    )
    train: bool = key(False, "train the delimiter tokens")


@dataclass
class LLMConfig:
    """``name`` is a hub id, a folder, a .gguf file, or ``package:NAME`` of an installed package."""

    name: str = key(MISSING, "hub id, folder, .gguf file or package:NAME", path=True)
    bos_token: str | None = key(None, "the anchor, when the tokenizer has no BOS")
    eos_token: str | None = key(None, "the end of a text, when the tokenizer has no EOS")
    attention: str = key(
        "flashsink",
        "attention in training; the others are those of transformers and do not measure sinks",
        choices=("flashsink", "sdpa", "eager", "flash_attention_2"),
    )


@dataclass
class StreamConfig:
    encoder: EncoderConfig = group(EncoderConfig)
    compression: CompressionConfig = group(CompressionConfig)


def _mouth_stream() -> StreamConfig:
    return StreamConfig(EncoderConfig(kind="avhubert"), CompressionConfig(rate=2))


@dataclass
class PromptConfig:
    """The text next to the speech, for each task; "fused" uses that of audiovisual."""

    audio: str = key("Transcribe speech to text.", "text of audio prompts")
    video: str = key("Transcribe video to text.", "text of video prompts")
    audiovisual: str = key("Transcribe speech and video to text.", "text of audiovisual and fused prompts")
    first: bool = key(False, "place the text before the speech, directly after BOS, instead of after the speech")


@dataclass
class ModelConfig:
    """Encoders, projectors and the LLM. An encoder is frozen unless its LoRA has a rank (avhubert only)."""

    task: str = key("audio", "what the model reads", choices=tuple(TASKS))
    audio: StreamConfig = group(StreamConfig, {"encoder.kind": ("whisper", "wavlm", "avhubert")})
    video: StreamConfig = group(_mouth_stream, {"encoder.kind": ("avhubert", "visual")})
    fused: StreamConfig = group(_mouth_stream, {"encoder.kind": ("avhubert",)})  # one encoder, one projector
    prompts: PromptConfig = group(PromptConfig)
    projector: ProjectorConfig = group(ProjectorConfig)
    delimiters: DelimiterConfig = group(DelimiterConfig)
    llm: LLMConfig = group(LLMConfig)
    lora: LoraConfig = group(LoraConfig)

    @property
    def streams(self) -> dict[str, StreamConfig]:
        """The streams of ``task``, in prompt order."""
        return {name: getattr(self, name) for name in TASKS[self.task]}


@dataclass
class ColumnsConfig:
    """Names in datasets of others: columns of Hugging Face's, keys of the ``.json`` and suffixes of WebDataset."""

    id: str | None = key(None, "null = the number of the row, or WebDataset's key")
    text: str = key("text", "transcripts; of WebDataset else .txt")
    audio: str = key("audio", "sound; of WebDataset else the first member with a suffix of sound")
    video: str = key("video", "mouth videos, likewise; may be missing")
    duration: str = key("duration", "seconds; measured where it is missing")
    speaker: str = key("speaker", "may be missing")


@dataclass
class DataConfig:
    """Manifests or datasets of others, the limits of usable clips, and the feature cache."""

    train: str = key(
        MISSING,
        "training manifest; here and below also hf:NAME[,CONFIG][,SPLIT], a folder of save_to_disk, or wds:PATTERN",
        path=True,
    )
    validation: str = key(MISSING, "validation manifest, which chooses the best checkpoint", path=True)
    test: dict[str, str] = key({}, "test manifests by name (data.test.NAME=PATH)", path=True)
    columns: ColumnsConfig = group(ColumnsConfig)
    on_bad: str = key(
        "refuse",
        "what to do about an utterance that cannot be used, also when its clip disappears during training",
        choices=("refuse", "skip"),
    )
    max_bad: float = key(
        0.05, "with data.on_bad=skip: the largest share of a manifest that may be left out", at_least=0, at_most=1
    )
    allow_absolute: bool = key(False, "manifests may name files outside their folder by absolute paths")
    min_seconds: float = key(0.1, "shortest usable clip", at_least=0)
    max_seconds: float = key(30.0, "longest usable clip", above=0)
    max_text_tokens: int = key(256, "longest usable transcript", at_least=1)
    cache: str | None = key(None, "folder of encoder features; null encodes in every step", path=True)
    limit: int = key(0, "use the first n utterances of every manifest; 0 = all", at_least=0)
    workers: int = key(0, "loader processes", at_least=0)
    verify: bool = key(
        True,
        "without a cache: read every clip before training; false trusts the durations until a clip is used"
        " (avsr prepare checks them)",
    )
    max_mismatch: float = key(
        0.2,
        "seconds by which sound, video and declared duration of a clip may differ (the duration always by 5%)",
        at_least=0,
    )


@dataclass
class NoiseConfig:
    """Babble to mix in, from a sound file or from the other speakers of a manifest."""

    file: str | None = key(None, "sound file with noise", path=True)
    babble: str | None = key(None, "without noise.file: manifest whose speakers babble; null = data.train", path=True)
    talkers: int = key(8, "voices mixed from the manifest", at_least=1)
    pool: int = key(500, "utterances of the manifest that babble, the same for all clips; 0 = all", at_least=0)
    snr: list[float] = key([], "dB at which avsr evaluate scores; inf = clean; empty = clean only")


@dataclass
class AugmentConfig:
    """Changes to training clips; validation and test clips are never changed."""

    snr: list[float] = key([], "noise levels (dB, inf = clean), one of which is drawn for every clip")
    time_mask: bool = key(False, "mask up to 10 mouth frames per second and 0.4 s of sound per second, as in Auto-AVSR")
    random_crop: bool = key(False, "crop 88x88 of the mouth frames at a random place instead of the center")
    views: int = key(
        0,
        "augmented versions of every clip, also in the cache; 0 = a new one in each epoch (needs data.cache=null)",
        at_least=0,
    )

    @property
    def active(self) -> bool:
        return bool(self.snr) or self.time_mask or self.random_crop


@dataclass
class LossConfig:
    """Cross-entropy plus ``decorrelation`` times the decorrelation loss."""

    decorrelation: float = key(0.0, "weight (lambda) of the decorrelation loss; 0 = not computed", at_least=0)
    margin: float = key(0.0, "squared cosine to BOS that a state may have at no cost", at_least=0, below=1)
    anchor: str = key(
        "bos",
        "bos: the state of BOS as trained | base: that of the language model without adapters, with which no other "
        "token can swap roles",
        choices=("bos", "base"),
    )
    cross_entropy: str = key(
        "plain",
        "plain | chunked: an eighth of the logits at a time, computed twice | liger: a fused kernel, CUDA",
        choices=("plain", "chunked", "liger"),
    )


@dataclass
class TrainingConfig:
    """The loop, the optimizer (AdamW) and what is saved when."""

    steps: int = key(1000, "optimizer steps", at_least=1)
    learning_rate: float = key(1.0e-3, "peak learning rate", above=0)
    betas: list[float] = key([0.9, 0.98], "AdamW's betas")
    weight_decay: float = key(0.1, "AdamW's weight decay", at_least=0)
    warmup: int = key(0, "steps of linear warm-up", at_least=0)
    decay: float = key(
        0.0,
        "share of the steps, the last ones, in which the learning rate falls to 0 in a line, after being constant; "
        "0 = a cosine over all",
        at_least=0,
        at_most=1,
    )
    clip: float = key(10.0, "largest norm of the whole gradient", above=0)
    accumulation: int = key(1, "micro-batches per step and rank", at_least=1)
    frames: int = key(1000, "encoder frames in a micro-batch, over all streams and including padding", at_least=1)
    utterances: int = key(64, "most utterances in a micro-batch", at_least=1)
    initial_weights: str | None = key(
        None,
        "safetensors file of weights to start from, named as in a checkpoint; all others are drawn as usual",
        path=True,
    )
    precision: str = key("auto", "auto = bf16 where the hardware multiplies it fast", choices=("fp32", "bf16", "auto"))
    gradient_checkpointing: str = key(
        "false",
        "true: recompute layers in the backward pass | selective: all but their matrix products and attention",
        choices=("false", "true", "selective"),
    )
    kernels: str = key(
        "plain", "liger: its rotary embedding, SwiGLU and RMSNorm in the LLM, CUDA", choices=("plain", "liger")
    )
    compile: bool = key(False, "torch.compile the LLM's MLPs and the norms that flashsink leaves alone")
    packed: bool = key(False, "concatenate utterances instead of padding them; needs model.llm.attention=flashsink")
    seed: int = key(42, "seed of weights, batch order and augmentation")
    validate_every: int = key(100, "steps between validations", at_least=1)
    save_every: int = key(0, "steps between checkpoints; 0 = with every validation", at_least=0)
    keep_last: int = key(0, "newest saves kept as checkpoints/step-NNNNNN, for avsr average", at_least=0)
    keep_best: int = key(
        0, "saves with the lowest validation loss kept in the same way, in addition to checkpoints/best", at_least=0
    )
    skip_nonfinite: int = key(
        20, "steps of a run without a finite loss and gradient that are skipped before it ends", at_least=0
    )
    timeout: float = key(
        1800.0,
        "seconds in one stage of a step (or at least 30 of the start) after which a rank counts as hung; 0 = never",
        at_least=0,
    )
    gradient_norms_every: int = key(0, "steps between gradient norms of each loss term; 0 = never", at_least=0)
    tasks: dict[str, float] = key(
        {}, "weights of the tasks drawn for every clip of an audiovisual model (modality dropout); empty = its own task"
    )


@dataclass
class DeepSpeedConfig:
    """ZeRO and offloading."""

    stage: int = key(1, "ZeRO stage", choices=(0, 1, 2, 3))
    offload_optimizer: bool = key(False, "keep master weights and optimizer state in host memory (stages 1 to 3)")
    offload_parameters: bool = key(False, "keep weights there too, each fetched for its layer (stage 3)")
    config: str | None = key(None, "a DeepSpeed JSON file to use instead", path=True)


@dataclass
class DecodeConfig:
    """Decoding and scoring in avsr evaluate and transcribe."""

    beams: int = key(1, "beams; 1 = greedy", at_least=1, at_most=256)
    nbest: int = key(1, "hypotheses per utterance in hypotheses.jsonl; at most decode.beams", at_least=1)
    batch: int = key(16, "utterances decoded at once", at_least=1)
    length_penalty: float = key(
        1.0,
        "the score of a hypothesis is its log-probability / tokens ** length_penalty",
        at_least=-10,
        at_most=10,
    )
    repetition_penalty: float = key(
        1.0,
        "lowers the scores of tokens that the text has already, as in transformers (little with beams > 1); 1 = off",
        at_least=1,
        below=math.inf,
    )
    no_repeat_ngram: int = key(0, "no text has the same sequence of this many tokens twice; 0 = off", at_least=0)
    base_tokens: int = key(8, "token budget = base_tokens + tokens_per_second * duration", at_least=1)
    tokens_per_second: float = key(12.0, "see decode.base_tokens", at_least=0)
    normaliser: str = key("plain", "text normalization before scoring", choices=("plain", "whisper"))
    tasks: list[str] = key(
        [], "tasks of an audiovisual model, scored one after the other (avsr transcribe: the first); empty = its own"
    )


@dataclass
class ActConfig:
    """Attention calibration (Yu et al. 2024) in avsr evaluate and transcribe, for heads found by avsr act-search."""

    beta: float = key(
        1.0, "fraction of a sink's attention that is kept; 1 = off; 0.4 in the paper", at_least=0, at_most=1
    )
    threshold: float = key(0.1, "mean attention in a head from which a token is a sink", above=0, below=1)
    heads: str | None = key(None, "null: act_heads.json of the run | all | such a file", path=True)


@dataclass
class LogConfig:
    """Metrics are always written to metrics.jsonl."""

    tensorboard: bool = key(True, "write TensorBoard events too")
    wandb: str | None = key(None, "name of a Weights & Biases project")
    attention: bool = key(
        False,
        "at each validation, the share of the attention of prompt and text tokens that goes to BOS, delimiters, "
        "speech, prompt and text, and its entropy; needs model.llm.attention=flashsink",
    )


@dataclass
class Config:
    """All keys of ``avsr train`` and the commands that read a run."""

    # Keys and groups of earlier versions, whose runs stay readable: what they are called now
    moved: ClassVar[dict[str, str]] = {
        "model.encoder": "model.audio.encoder",
        "model.compression": "model.audio.compression",
        "model.prompt": "model.prompts.audio",
    }

    run: str = key(MISSING, "folder of this run", path=True)
    resume: bool = key(False, "continue the run from its last checkpoint")
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    noise: NoiseConfig = group(NoiseConfig)
    augment: AugmentConfig = group(AugmentConfig)
    loss: LossConfig = group(LossConfig)
    training: TrainingConfig = group(TrainingConfig)
    deepspeed: DeepSpeedConfig = group(DeepSpeedConfig)
    decode: DecodeConfig = group(DecodeConfig)
    act: ActConfig = group(ActConfig)
    log: LogConfig = group(LogConfig)
