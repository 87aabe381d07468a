"""What frozen speech encoders have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from avsr.models.encoder_lora import set_lora_mode

if TYPE_CHECKING:
    from avsr.data.clip import Clip


class FrozenEncoder(nn.Module):
    """Base of an encoder that is always in eval mode; only LoRA, where there is any, is trained.

    Attributes:
        width: feature size D.
        frames_per_second: of the features.
        max_seconds: of a clip.
        needs: of "audio" and "video".
        identity: names weights and options, for caches. LoRA is not in it: features of an encoder in training
            are not for a cache.
    """

    width: int
    frames_per_second: int
    max_seconds: float = float("inf")
    needs: frozenset[str]
    identity: str
    batch: int

    def frames(self, samples: int, video_frames: int) -> int:
        """Encoder frames of a clip of so many samples and mouth frames (0 for a stream that is missing)."""
        raise NotImplementedError

    def prepare(self, clip: Clip) -> Tensor:
        """(T, K) float32, the input of one clip.

        Raises:
            UserError: the clip lacks what the encoder needs.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> FrozenEncoder:
        super().train(False)
        set_lora_mode(self, mode)
        return self

    @torch.no_grad()
    def encode(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Features (frames, D) float32 of every clip, as if it had been encoded alone."""
        counts = [
            self.frames(
                0 if clip.wave is None else len(clip.wave),
                0 if clip.mouth is None else len(clip.mouth),
            )
            for clip in clips
        ]
        device = next(self.parameters()).device
        order = sorted(range(len(clips)), key=lambda i: counts[i])
        out: dict[int, Tensor] = {}
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            inputs = [self.prepare(clips[i]) for i in part]
            lengths = torch.tensor([len(row) for row in inputs])
            hidden = self(pad_sequence(inputs, batch_first=True).to(device), lengths.to(device))
            for index, row in zip(part, hidden, strict=True):
                out[index] = row[: counts[index]].float()
        return [out[i] for i in range(len(clips))]


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
