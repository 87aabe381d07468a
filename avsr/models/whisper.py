"""Frozen Whisper encoder: waveform in, 50 frames a second out, without encoding 30 s of silence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torchaudio
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel
from transformers.utils.logging import disable_progress_bar

from avsr.config import EncoderConfig
from avsr.errors import UserError
from avsr.models.ctranslate2 import load_whisper_encoder
from avsr.models.sources import resolve

SAMPLE_RATE = 16_000
HOP = 160  # samples between mel frames
WINDOW = 400  # samples
SAMPLES_PER_FRAME = 2 * HOP  # the second convolution halves the mel frames: 50 a second


class AudioEncoder:
    """A frozen Whisper encoder. Always in eval mode and without gradients.

    A clip is followed by a window of silence and encoded over its own frames only; results do not depend on
    the other clips of a batch. With ``pad_to_30s`` it is encoded as Hugging Face does, over 30 s, and its own
    frames are returned: attention to the silence then changes the features.

    Attributes:
        width: feature size D.
        identity: names weights and options, for caches.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | str = "cpu") -> None:
        source = resolve(config.name)
        self._encoder = _load(source).to(device).eval().requires_grad_(False)
        self._pad = config.pad_to_30s
        self._batch = config.batch
        self._device = torch.device(device)
        self.width = int(self._encoder.config.d_model)
        self.max_frames = int(self._encoder.config.max_source_positions)
        self.identity = f"whisper {config.name} {_fingerprint(self._encoder)} pad_to_30s={config.pad_to_30s}"
        self._mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE,
            n_fft=WINDOW,
            hop_length=HOP,
            n_mels=int(self._encoder.config.num_mel_bins),
            norm="slaney",
            mel_scale="slaney",
        ).to(device)

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """(samples,) float32 waveforms at 16 kHz -> (frames, D) float32, frames = ceil(samples / 320).

        Raises:
            UserError: a clip longer than the encoder's positions (30 s).
        """
        longest = max(len(wave) for wave in waveforms)
        if frame_count(longest) > self.max_frames:
            limit = self.max_frames * SAMPLES_PER_FRAME / SAMPLE_RATE
            raise UserError(f"a clip of {longest / SAMPLE_RATE:.1f} s is longer than the encoder's {limit:.0f} s")
        order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
        out: dict[int, Tensor] = {}
        for first in range(0, len(order), self._batch):
            part = order[first : first + self._batch]
            for index, features in zip(part, self._encode([waveforms[i] for i in part]), strict=True):
                out[index] = features
        return [out[i] for i in range(len(waveforms))]

    def _encode(self, waveforms: list[Tensor]) -> list[Tensor]:
        counts = [frame_count(len(wave)) for wave in waveforms]
        frames = self.max_frames if self._pad else max(counts)
        padded = torch.zeros(len(waveforms), frames * SAMPLES_PER_FRAME + (0 if self._pad else WINDOW))
        for row, wave in zip(padded, waveforms, strict=True):
            row[: len(wave)] = wave
        mel = self._log_mel(padded.to(self._device))[..., : 2 * frames]
        length = torch.tensor(counts, device=self._device)
        if self._pad:
            length = torch.full_like(length, frames)
        hidden = self._run(mel, length)
        return [row[:count] for row, count in zip(hidden, counts, strict=True)]

    def _log_mel(self, waves: Tensor) -> Tensor:
        """(B, samples) -> (B, mels, samples / 160): Whisper's log10 power, at most 8 below the clip's peak."""
        power = self._mel(waves)[..., :-1]
        log = power.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log + 4.0) / 4.0

    def _run(self, mel: Tensor, length: Tensor) -> Tensor:
        """WhisperEncoder.forward over any number of frames; frames behind ``length`` act as the zeros that a
        convolution pads with, and attention does not see them."""
        encoder = self._encoder
        frames = mel.shape[-1] // 2
        keep = torch.arange(2 * frames, device=mel.device) < 2 * length[:, None]
        hidden = nn.functional.gelu(encoder.conv1(mel * keep[:, None])) * keep[:, None]
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[:frames]
        mask = None
        if not bool(keep.all()):
            mask = torch.zeros(len(length), 1, 1, frames, device=mel.device, dtype=hidden.dtype)
            mask.masked_fill_(~keep[:, None, None, ::2], torch.finfo(hidden.dtype).min)
            mask = mask.expand(-1, 1, frames, -1)
        for layer in encoder.layers:
            hidden = layer(hidden, mask)
        return encoder.layer_norm(hidden)


def frame_count(samples: int) -> int:
    """Encoder frames of a clip: one per started 20 ms."""
    return -(-samples // SAMPLES_PER_FRAME)


def _load(source: Path | str) -> WhisperEncoder:
    disable_progress_bar()
    if isinstance(source, Path):
        binary = source / "model.bin" if source.is_dir() else source
        if binary.name == "model.bin" and binary.is_file():
            return load_whisper_encoder(binary)
    try:
        return WhisperModel.from_pretrained(str(source), dtype=torch.float32).encoder
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.encoder.name: cannot load the Whisper model {str(source)!r}: {reason}") from error


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
