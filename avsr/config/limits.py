"""Values that a key of the configuration may have, where it can be said of the key alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avsr.errors import UserError

_STREAMS = ("audio", "video", "fused")
_CHOICES: dict[str, tuple[str, ...]] = {
    "model.task": ("audio", "video", "audiovisual", "fused"),
    **{f"model.{stream}.compression.kind": ("average", "stack") for stream in _STREAMS},
    "model.audio.encoder.kind": ("whisper", "wavlm", "avhubert"),
    "model.video.encoder.kind": ("avhubert", "visual"),
    "model.fused.encoder.kind": ("avhubert",),
    "data.on_bad": ("refuse", "skip"),
    "model.llm.attention": ("flashsink", "sdpa", "eager", "flash_attention_2"),
    "loss.cross_entropy": ("plain", "chunked", "liger"),
    "training.gradient_checkpointing": ("false", "true", "selective"),
    "training.kernels": ("plain", "liger"),
    "training.precision": ("fp32", "bf16", "auto"),
    "decode.normaliser": ("plain", "whisper"),
}
_AT_LEAST: dict[str, float] = {
    **{f"model.{stream}.encoder.batch": 1 for stream in _STREAMS},
    **{f"model.{stream}.encoder.lora.rank": 0 for stream in _STREAMS},
    **{f"model.{stream}.compression.rate": 1 for stream in _STREAMS},
    "model.projector.hidden": 1,
    "model.lora.rank": 0,
    "data.min_seconds": 0,
    "data.max_text_tokens": 1,
    "data.limit": 0,
    "data.workers": 0,
    "data.max_mismatch": 0,
    "noise.talkers": 1,
    "augment.views": 0,
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
    "training.gradient_norms_every": 0,
    "training.keep_last": 0,
    "training.keep_best": 0,
    "training.skip_nonfinite": 0,
    "training.timeout": 0,
    "decode.beams": 1,
    "decode.nbest": 1,
    "decode.batch": 1,
    "decode.base_tokens": 1,
    "decode.tokens_per_second": 0,
}
_ABOVE_0 = ("training.learning_rate", "training.clip", "data.max_seconds")


def check_values(values: Mapping[str, Any]) -> None:
    """Raises:
    UserError: a value by its dotted key is none of those allowed.
    """
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            extra = ""
            if values[key] == "fp16":
                extra = ": massive activations of 26,000 and a large lambda leave no room below fp16's 65,504"
            raise UserError(f"{key}: expected one of {', '.join(choices)}, got {values[key]!r}{extra}")
    for key, least in _AT_LEAST.items():
        if not values[key] >= least:
            raise UserError(f"{key}: expected at least {least}, got {values[key]}")
    for key in _ABOVE_0:
        if not values[key] > 0:
            raise UserError(f"{key}: expected more than 0, got {values[key]}")
