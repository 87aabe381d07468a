"""Frozen Whisper encoder: waveform in, 50 frames a second out, without encoding 30 s of silence."""

from __future__ import annotations

from pathlib import Path

import torch
import torchaudio
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError
from avsr.models.encoder import SpeechEncoder, fingerprint
from avsr.models.formats.ctranslate2 import load_whisper_encoder
from avsr.models.sources import loading, locate, read_config

HOP = 160  # samples between mel frames
WINDOW = 400  # samples
SAMPLES_PER_FRAME = 2 * HOP  # the second convolution halves the mel frames: 50 a second


class Whisper(SpeechEncoder):
    """A frozen Whisper encoder.

    A clip is followed by one window of silence and encoded over its own frames only. With ``pad_to_30s`` it is padded
    to 30 s and encoded as by Hugging Face, and its own frames are returned: attention to the silence then changes the
    features.
    """

    frames_per_second = 50
    needs = frozenset({"audio"})

    def __init__(self, config: EncoderConfig, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._encoder = _load(locate(str(config.name), "model.audio.encoder.name"))
        self._pad = config.pad_to_30s
        self._normalise = bool(config.normalise)
        self.batch = config.batch
        self.width = int(self._encoder.config.d_model)
        self._positions = int(self._encoder.config.max_source_positions)
        self.max_seconds = self._positions * SAMPLES_PER_FRAME / SAMPLE_RATE
        options = f"pad_to_30s={self._pad}" + (" normalised" if self._normalise else "")
        self.identity = f"whisper {config.name} {fingerprint(self._encoder, str(config.name))} {options}"
        self._mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE,
            n_fft=WINDOW,
            hop_length=HOP,
            n_mels=int(self._encoder.config.num_mel_bins),
            norm="slaney",
            mel_scale="slaney",
        )
        self.to(device).eval().requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        return self._encoder

    @property
    def layers(self) -> nn.ModuleList:
        return self._encoder.layers

    def frames(self, samples: int, video_frames: int) -> int:
        """One for every 20 ms begun."""
        return frame_count(samples)

    def prepare(self, clip: Clip) -> Tensor:
        """(frames, 320): the waveform, zero-padded to whole frames.

        Raises:
            UserError: a clip longer than the encoder's positions (30 s).
        """
        assert clip.wave is not None
        wave, frames = clip.wave, frame_count(clip.samples)
        if frames > self._positions:
            raise UserError(f"a clip of {clip.seconds:.1f} s is longer than the encoder's {self.max_seconds:.0f} s")
        if self._normalise:
            wave = nn.functional.layer_norm(wave, wave.shape, eps=1e-8)
        return nn.functional.pad(wave, (0, frames * SAMPLES_PER_FRAME - len(wave))).reshape(frames, SAMPLES_PER_FRAME)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, 320) waveforms, (B,) lengths -> (B, T, D)."""
        frames = self._positions if self._pad else inputs.shape[1]
        waves = inputs.flatten(1)
        silence = frames * SAMPLES_PER_FRAME - waves.shape[1] + (0 if self._pad else WINDOW)
        mel = self._log_mel(nn.functional.pad(waves, (0, silence)))[..., : 2 * frames]
        seen = torch.full_like(lengths, frames) if self._pad else lengths
        return self._run(mel.to(self._encoder.conv1.weight.dtype), seen)[:, : inputs.shape[1]]

    def _log_mel(self, waves: Tensor) -> Tensor:
        """(B, samples) -> (B, mels, samples / 160): Whisper's log10 power, at most 8 below the clip's peak."""
        power = self._mel(waves)[..., :-1]
        log = power.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log + 4.0) / 4.0

    def _run(self, mel: Tensor, length: Tensor) -> Tensor:
        """WhisperEncoder.forward over any number of frames; frames after ``length`` act like the zero padding of a
        convolution and are masked in attention."""
        encoder = self._encoder
        frames = mel.shape[-1] // 2
        ragged = bool((length < frames).any())
        length = length.to(mel.device, non_blocking=True)
        keep = torch.arange(2 * frames, device=mel.device) < 2 * length[:, None]
        hidden = nn.functional.gelu(encoder.conv1(mel * keep[:, None])) * keep[:, None]
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[:frames]
        mask = None
        if ragged:
            mask = torch.zeros(len(length), 1, 1, frames, device=mel.device, dtype=hidden.dtype)
            mask.masked_fill_(~keep[:, None, None, ::2], torch.finfo(hidden.dtype).min)
            mask = mask.expand(-1, 1, frames, -1)
        for layer in encoder.layers:
            hidden = layer(hidden, mask)
        return encoder.layer_norm(hidden)


def frame_count(samples: int) -> int:
    """Encoder frames of a clip: one for every 20 ms begun."""
    return -(-samples // SAMPLES_PER_FRAME)


def _load(source: Path | str) -> WhisperEncoder:
    if isinstance(source, Path):
        binary = source / "model.bin" if source.is_dir() else source
        if binary.name == "model.bin" and binary.is_file():
            return load_whisper_encoder(binary)
    with loading(f"model.audio.encoder.name: cannot load the Whisper model {str(source)!r}"):
        read_config(source)
        model, report = WhisperModel.from_pretrained(str(source), dtype=torch.float32, output_loading_info=True)
        if missing := sorted(name for name in report["missing_keys"] if name.startswith("encoder.")):
            raise ValueError(f"its files lack {len(missing)} weights ({missing[0]} ...)")
        return model.encoder
