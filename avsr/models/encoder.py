"""The interface of every speech encoder, and its batched use without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avsr.errors import UserError
from avsr.models.encoder_lora import set_lora_mode
from avsr.runtime.tensors import NOT_FINITE

if TYPE_CHECKING:
    from avsr.data.clip import Clip


class SpeechEncoder(nn.Module):
    """A pretrained encoder of one stream, always in eval mode; frozen unless it carries LoRA adapters.

    Subclasses implement :meth:`frames`, :meth:`prepare` and :meth:`forward`. Results do not depend on padding, so a
    clip gives the same features alone and in any batch.

    Attributes:
        width: feature size D.
        frames_per_second: of the features.
        max_seconds: longest clip; infinite when there is no limit.
        needs: the inputs it reads: "audio", "video" or both.
        batch: clips encoded at once by :meth:`encode`.
        identity: identifies weights and options, for caches.
    """

    width: int
    frames_per_second: int
    max_seconds: float = float("inf")
    needs: frozenset[str]
    batch: int = 16
    identity: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def network(self) -> nn.Module:
        """What computes in the precision of the weights: all but the transforms of the sound before it."""
        network = self.model
        assert isinstance(network, nn.Module)
        return network

    @property
    def layers(self) -> nn.ModuleList:
        """Its transformer layers, each with a ``self_attn`` or ``attention`` and (B, T, D) states as output."""
        raise NotImplementedError

    def frames(self, samples: int, video_frames: int) -> int:
        """Number of features of a clip with this many samples and mouth frames."""
        raise NotImplementedError

    def prepare(self, clip: Clip) -> Tensor:
        """(T, K) float32 or uint8, the input for one clip with T = number of features."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, K) prepared inputs, zero-padded after ``lengths`` (B,) -> (B, T, D) in the weights' dtype.

        Lengths are best left on the host: whether there is padding then needs no wait for the device.
        """
        raise NotImplementedError

    def feature_count(self, rows: int) -> int:
        """Number of features of an input with this many rows; the same number unless a subclass overrides it."""
        return rows

    def train(self, mode: bool = True) -> SpeechEncoder:
        """Switches the adapters' dropout alone: layer drop and batch statistics stay in eval mode."""
        super().train(False)
        set_lora_mode(self, mode)
        return self

    def encode(self, clips: Sequence[Clip]) -> list[Tensor]:
        """(T, D) float32 features of every clip, as if it had been encoded alone."""
        return self.run([self.prepare(clip) for clip in clips])

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Prepared (T, K) inputs -> (T, D) float32 each, in batches of similar length."""
        device = next(self.parameters()).device
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        out: dict[int, Tensor] = {}
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            lengths = torch.tensor([len(inputs[i]) for i in part])
            padded = nn.utils.rnn.pad_sequence([inputs[i] for i in part], batch_first=True).to(device)
            for index, row, length in zip(part, self(padded, lengths), lengths.tolist(), strict=True):
                out[index] = row[: self.feature_count(length)].float()
        return [out[i] for i in range(len(inputs))]


def fingerprint(module: nn.Module, where: str) -> str:
    """A short hash of the parameter names and values, for caches.

    Raises:
        UserError: a value is not finite; the message begins with ``where`` and names the tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total = tensor.detach().double().sum().cpu()
        if not bool(total.isfinite()):
            raise UserError(f"{where}: {name} {NOT_FINITE}")
        digest.update(name.encode())
        digest.update(total.numpy().tobytes())
    return digest.hexdigest()[:12]
