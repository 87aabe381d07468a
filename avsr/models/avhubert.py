"""Frozen AV-HuBERT encoder: sound, mouth video or both in, 25 frames a second out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.errors import UserError
from avsr.models.avhubert_inputs import AUDIO, SIDE, VIDEO, audio_features, audio_frames, video_crop, video_features
from avsr.models.encoder import SpeechEncoder, fingerprint
from avsr.models.encoder_lora import add_encoder_lora
from avsr.models.formats.fairseq_file import load_avhubert

_NEEDS = {
    "audio": frozenset({"audio"}),
    "video": frozenset({"video"}),
    "fused": frozenset({"audio", "video"}),
}
UNUSED = {"audio": ("feature_extractor_video",), "video": ("feature_extractor_audio",)}  # parts never called, by stream


class AVHubertEncoder(SpeechEncoder):
    """AV-HuBERT over one modality or over both, with LoRA where ``config.lora`` asks for it.

    A fused clip has as many frames as its mouth video; its sound is cut or zero-padded to that length. A fused clip
    without one modality is encoded from the other, as in the modality dropout of the model's pre-training. (So is one
    whose audio features are all zero: digital silence.)

    Args:
        config: ``name`` is an official ``.pt`` file, or a folder or ``.safetensors`` file converted from it.
        stream: "audio", "video" or "fused".
        device: of the weights.
    """

    frames_per_second = 25

    def __init__(self, config: EncoderConfig, stream: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if stream not in _NEEDS:
            raise UserError(f"AV-HuBERT's stream: expected one of {', '.join(_NEEDS)}, got {stream!r}")
        model = load_avhubert(str(config.name))
        if model.config.audio != AUDIO:
            raise UserError(f"{config.name}: reads {model.config.audio} audio features, expected {AUDIO}")
        self.stream = stream
        self.needs = _NEEDS[stream]
        self.batch = config.batch
        self.width = model.config.width
        self.identity = f"avhubert {config.name} {fingerprint(model, str(config.name))} {stream}"
        self.model = model.to(device)
        if torch.device(device).type == "cuda" and not config.lora.rank:  # a trained one is laid out by DeepSpeed
            self.model.feature_extractor_video.resnet.use_channels_last()
        add_encoder_lora(self.model, config.lora, key=f"model.{stream}.encoder.lora", unused=UNUSED.get(stream, ()))
        self.eval()

    @property
    def layers(self) -> torch.nn.ModuleList:
        return self.model.encoder.layers

    def frames(self, samples: int, video_frames: int) -> int:
        if self.stream == "audio" or (self.stream == "fused" and not video_frames):
            return audio_frames(samples) if samples else 0
        return video_frames

    def prepare(self, clip: Clip) -> Tensor:
        """(T, 104) float32 of sound; (T, 88 * 88) uint8 gray values of the mouth; for a fused clip both features
        concatenated, (T, 104 + 88 * 88) float32."""
        wave = clip.wave if "audio" in self.needs and clip.wave is not None and len(clip.wave) else None
        mouth = clip.mouth if "video" in self.needs and clip.mouth is not None and len(clip.mouth) else None
        if wave is None and mouth is None:
            missing = {"audio": "sound", "video": "mouth video", "fused": "sound and no mouth video"}[self.stream]
            raise UserError(f"the clip has no {missing}, which the AV-HuBERT encoder needs")
        audio = None if wave is None else audio_features(wave)
        crop = None if mouth is None else video_crop(mouth).flatten(1)
        if self.stream != "fused":
            return audio if crop is None else crop  # type: ignore[return-value]
        video = None if crop is None else video_features(crop)
        if audio is None:
            assert video is not None
            audio = video.new_zeros(len(video), AUDIO)
        if video is None:
            video = audio.new_zeros(len(audio), VIDEO)
        audio = pad(audio[: len(video)], (0, 0, 0, max(0, len(video) - len(audio))))
        return torch.cat([audio, video], dim=1)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, K) zero-padded, (B,) int64 -> (B, T, D); frames after a row's end are meaningless."""
        if self.stream == "video":
            inputs = video_features(inputs)  # only here, since a batch of bytes is a quarter of the size
        inputs = inputs.to(self.dtype)
        audio = inputs[..., :AUDIO] if "audio" in self.needs else None
        video = inputs[..., -VIDEO:].unflatten(-1, (SIDE, SIDE)) if "video" in self.needs else None
        return self.model(audio, video, lengths)
