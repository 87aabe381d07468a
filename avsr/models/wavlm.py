"""Frozen WavLM encoder (transformers): waveform in, 50 frames a second out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import WavLMModel

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError
from avsr.models.encoder import SpeechEncoder, fingerprint
from avsr.models.sources import loading, locate, read_config


class WavLMEncoder(SpeechEncoder):
    """WavLM's last layer. The input of a clip is its waveform, (samples, 1), and lengths count samples.

    Clips may be of any length, but full attention takes memory quadratic in it (30 s and 16 heads: 150 MB per clip and
    layer), and relative positions are learned up to 16 s.

    Args:
        config: ``name`` is a hub id or a folder. ``normalise`` (null: true) gives each waveform mean 0 and
            variance 1, as WavLM-LARGE was trained.
        device: of the weights.
    """

    needs = frozenset({"audio"})

    def __init__(self, config: EncoderConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        model = _load(str(config.name))
        self._normalise = config.normalise is not False
        # BASE normalizes over time, which padding would change, so its clips are encoded one by one
        self._alone = model.config.feat_extract_norm == "group"
        self._convolutions = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.batch = config.batch
        self.width = int(model.config.hidden_size)
        self.frames_per_second = SAMPLE_RATE // math.prod(stride for _, stride in self._convolutions)
        self.identity = f"wavlm {config.name} {fingerprint(model, str(config.name))} normalise={self._normalise}"
        self.model = model.to(device)
        self.eval()

    @property
    def layers(self) -> torch.nn.ModuleList:
        layers: torch.nn.ModuleList = self.model.encoder.layers
        return layers

    def frames(self, samples: int, video_frames: int) -> int:
        return self.feature_count(samples)

    def feature_count(self, rows: int) -> int:
        """Frames of the convolutions over this many samples."""
        samples = rows
        for kernel, stride in self._convolutions:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def prepare(self, clip: Clip) -> Tensor:
        if clip.wave is None:
            raise UserError("the clip has no sound, which the WavLM encoder needs")
        if not self.frames(len(clip.wave), 0):
            raise UserError(f"a clip of {len(clip.wave)} samples is too short for WavLM")
        wave = clip.wave.float()
        if self._normalise:
            wave = torch.nn.functional.layer_norm(wave, wave.shape, eps=1e-8)
        return wave[:, None]

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, samples, 1) zero-padded, (B,) int64 samples -> (B, frames, D); frames after a row's end are
        meaningless."""
        waves = inputs[..., 0].to(self.dtype)
        counts = lengths.tolist()
        if self._alone:
            rows = [
                self.model(wave[None, :count]).last_hidden_state[0] for wave, count in zip(waves, counts, strict=True)
            ]
            return pad_sequence(rows, batch_first=True)
        if min(counts) == waves.shape[1]:
            return self.model(waves).last_hidden_state
        mask = torch.arange(waves.shape[1], device=waves.device) < lengths.to(waves.device)[:, None]
        with warnings.catch_warnings():  # transformers passes torch a bool and a float mask
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            return self.model(waves * mask, attention_mask=mask.long()).last_hidden_state


def _load(name: str) -> Any:
    source = locate(name, "model.audio.encoder.name")
    with loading(f"{name}: cannot load the WavLM model"):
        config = read_config(source)
        if config.model_type != "wavlm":
            raise UserError(f"{name}: expected a WavLM model, got {config.model_type!r}")
        model, report = WavLMModel.from_pretrained(str(source), dtype=torch.float32, output_loading_info=True)
    # masked_spec_embed is used only in pre-training
    missing = sorted(key for key in report["missing_keys"] if key != "masked_spec_embed")
    if missing:
        raise UserError(f"{name}: the WavLM weights lack {missing[0]}")
    if config.add_adapter:
        raise UserError(f"{name}: a WavLM with an adapter on top (add_adapter) is not supported")
    return model.eval().requires_grad_(False)
