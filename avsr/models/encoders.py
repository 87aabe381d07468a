"""Builds the encoder that the config names for a stream."""

from __future__ import annotations

import torch

from avsr.config import EncoderConfig
from avsr.models.encoder import SpeechEncoder
from avsr.models.whisper import Whisper


def build_encoder(config: EncoderConfig, stream: str, device: torch.device | str = "cpu") -> SpeechEncoder:
    """The encoder of ``stream`` (audio, video or fused), on ``device``, in ``config.precision``.

    Raises:
        UserError: its weights are missing or do not fit.
    """
    encoder = _build(config, stream, device)
    if config.precision == "bf16":
        encoder.network.bfloat16()
        encoder.identity += " bf16"
    return encoder


def _build(config: EncoderConfig, stream: str, device: torch.device | str) -> SpeechEncoder:
    if config.kind == "whisper":
        return Whisper(config, device)
    if config.kind == "wavlm":
        from avsr.models.wavlm import WavLMEncoder

        return WavLMEncoder(config, device)
    if config.kind == "visual":
        from avsr.models.visual import VisualEncoder

        return VisualEncoder(config, stream, device)
    from avsr.models.avhubert import AVHubertEncoder

    return AVHubertEncoder(config, stream, device)
