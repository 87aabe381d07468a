"""The AV-HuBERT network (Shi et al. 2022, "Learning Audio-Visual Speech Representation by Masked Multimodal
Cluster Prediction") as a feature extractor. Module names are those of the official state dicts.

Parts that only pre-training needs (masking, modality dropout, cluster prediction) are left out, and so is all dropout:
the encoder is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, scaled_dot_product_attention

from avsr.models.resnet import VisualFrontEnd

HEAD = 64  # width of an attention head in BASE and LARGE


@dataclass(frozen=True)
class AVHubertConfig:
    """Sizes of a model; the defaults are BASE."""

    width: int = 768
    ffn: int = 3072
    layers: int = 12
    audio: int = 104  # features of an audio frame
    channels: int = 64  # of the visual front end
    kernel: int = 128  # of the positional convolution
    groups: int = 16


BASE = AVHubertConfig()
LARGE = AVHubertConfig(width=1024, ffn=4096, layers=24)


class PositionalConv(nn.Module):
    """A convolution over time that keeps the length; its weight is normalized over all axes but the kernel's."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.randn(width, width // groups, kernel) / width**0.5)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T) -> (B, D, T)."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        kernel = self.weight_v.shape[-1]
        x = conv1d(x, self.weight_v * (self.weight_g / norm), self.bias, padding=kernel // 2, groups=self.groups)
        return x[..., :-1] if kernel % 2 == 0 else x


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) and (B, 1, 1, T) bool, True where attention may look -> (B, T, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config.width)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.final_layer_norm(x))))


class TransformerEncoder(nn.Module):
    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionalConv(config.width, config.kernel, config.groups), nn.GELU())
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D), (B,) -> (B, T, D). Frames after a row's end are zeros for the convolution and masked in
        attention; the output there is meaningless."""
        ragged = bool((lengths < x.shape[1]).any())
        keep = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device, non_blocking=True)[:, None]
        mask = keep[:, None, None] if ragged else None
        x = x.masked_fill(~keep[..., None], 0)
        x = x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(x)


class AudioBranch(nn.Module):
    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.audio, config.width)


class VideoBranch(nn.Module):
    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.resnet = VisualFrontEnd(config.channels)
        self.proj = nn.Linear(self.resnet.width, config.width)


class AVHubert(nn.Module):
    """Audio features and mouth frames, both at 25 per second, to features of the last layer."""

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_emb = nn.Parameter(torch.zeros(config.audio))  # for pre-training only, but part of the official files
        self.feature_extractor_audio = AudioBranch(config)
        self.feature_extractor_video = VideoBranch(config)
        self.layer_norm = nn.LayerNorm(2 * config.width)
        self.post_extract_proj = nn.Linear(2 * config.width, config.width)
        self.encoder = TransformerEncoder(config)

    def forward(self, audio: Tensor | None, video: Tensor | None, lengths: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            audio: (B, T, 104), or None.
            video: (B, T, 88, 88) normalised, or None.
            lengths: (B,) valid frames of each row, at least 1; on the host or the device.

        Returns:
            (B, T, D). A modality that is None, or that is zero in all of a row while the batch has both, is
            missing: its half of the fused features is zero, as in the official model.
        """
        both = audio is not None and video is not None
        halves = []
        if audio is not None:
            half = self.feature_extractor_audio.proj(audio)
            halves.append(half * audio.any(dim=2).any(dim=1)[:, None, None] if both else half)
        if video is not None:
            seen = video.flatten(1).any(dim=1) if both else None
            valid = lengths if seen is None else lengths.to(video.device, non_blocking=True) * seen
            half = self.feature_extractor_video.proj(self.feature_extractor_video.resnet(video, valid))
            halves.append(half if seen is None else half * seen[:, None, None])
        if not both:
            halves.insert(0 if audio is None else 1, torch.zeros_like(halves[0]))
        fused = self.post_extract_proj(self.layer_norm(torch.cat(halves, dim=-1)))
        return self.encoder(fused, lengths)
