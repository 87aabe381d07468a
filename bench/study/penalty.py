"""Losses that are compared with the product's, controls and variants, in plain PyTorch.

B rows, S tokens, C hidden size, L decoder layers. As in the product, the states are the outputs of layers 1..L-1 and
the tokens are those of the prompt after BOS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avsr.config import Config
from avsr.models.speech_llm import SpeechLLM

OUTLIER = 4.0  # multiple of the median norm above which the norm penalty applies
CLOSING = 1  # delimiter tokens on either side of the speech


@dataclass(frozen=True)
class Penalty:
    """What is penalized.

    Attributes:
        kind: "cosine", or "norm": squared log of a state's norm over OUTLIER x the median norm of its row, if larger.
        anchor: "bos", or "content": a speech token, redrawn for every row and forward.
        detach: no gradient flows into the anchor.
        layers: first and last layer, from 1; None = 1..L-1.
        tokens: "all", or "marks": delimiter and prompt tokens, no speech.
        margin: as in the product.
        warmup: training forwards over which the loss grows linearly to its full size.
    """

    kind: str = "cosine"
    anchor: str = "bos"
    detach: bool = False
    layers: tuple[int, int] | None = None
    tokens: str = "all"
    margin: float = 0.0
    warmup: int = 0


class PenaltyProbe:
    """Replaces the model's flashsink probe in training: same attention, another loss."""

    computes_decorrelation = True

    def __init__(self, model: SpeechLLM, penalty: Penalty, seed: int) -> None:
        self._penalty = penalty
        self._inner = model.attach(attention=True, decorrelation=False, activations=False)
        self._closing = CLOSING + len(model.prompts["audio"])
        self._model = model
        self._random = torch.Generator().manual_seed(seed)
        self._states: list[Tensor] = []
        self._spans = torch.zeros(0)
        self._steps = 0
        layers = model.decoder.model.layers
        first, last = penalty.layers or (1, len(layers) - 1)
        self._hooks = [
            layer.register_forward_hook(self._observe, with_kwargs=True) for layer in layers[first - 1 : last]
        ]

    @contextmanager
    def spans(self, spans: Tensor, **options: Any) -> Iterator[None]:
        """(B,) prompt tokens of every row, and other arguments, as in ``flashsink.Probe``."""
        self._states.clear()
        self._spans = spans
        self._steps += self._model.training
        with self._inner.spans(spans, **options):
            yield

    @property
    def decorrelation_loss(self) -> Tensor:
        """float32 scalar of the last forward."""
        states = torch.stack(self._states).float()
        loss = penalty_loss(states, self._spans, self._penalty, self._closing, self._random)
        if self._model.training and self._penalty.warmup:
            loss = loss * min(self._steps / self._penalty.warmup, 1.0)
        return loss

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._inner.detach()

    def _observe(self, module: Any, args: Any, options: dict[str, Any], out: Any) -> None:
        states = out[0] if isinstance(out, tuple) else out
        bounds = options.get("cu_seq_lens_q")
        if bounds is not None:  # packed rows
            rows = states[0].split(bounds.diff().tolist())
            states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        self._states.append(states)


def penalty_loss(states: Tensor, spans: Tensor, penalty: Penalty, closing: int, random: torch.Generator) -> Tensor:
    """The mean over layers and counted tokens.

    Args:
        states: (layers, B, S, C) float.
        spans: (B,) leading tokens: BOS, ``CLOSING`` opening delimiter, speech and ``closing`` others.
        penalty: what is computed.
        closing: tokens of a span after its speech.
        random: draws the content anchors.
    """
    position = torch.arange(states.shape[2], device=states.device)
    counts = (position > 0) & (position < spans[:, None])  # (B, S)
    speech = counts & (position > CLOSING) & (position < spans[:, None] - closing)
    if penalty.tokens == "marks":
        counts = counts & ~speech
    if penalty.kind == "norm":
        value = _outlying(states, counts)
    else:
        anchors = torch.zeros(len(spans), dtype=torch.long, device=states.device)
        if penalty.anchor == "content":
            anchors = torch.multinomial(speech.float().cpu(), 1, generator=random)[:, 0].to(states.device)
            counts = counts & (position != anchors[:, None])
        anchor = states[:, torch.arange(len(spans), device=states.device), anchors][:, :, None]
        anchor = anchor.detach() if penalty.detach else anchor
        squared = torch.nn.functional.cosine_similarity(anchor, states, dim=-1) ** 2
        value = (squared - penalty.margin).clamp(min=0)
    return (value * counts).sum() / (len(states) * counts.sum().clamp(min=1))


def _outlying(states: Tensor, counts: Tensor) -> Tensor:
    """(layers, B, S) squared log of the norm over OUTLIER x the median norm of the row's counted tokens."""
    norms = states.norm(dim=-1)
    middle = norms.detach().masked_fill(~counts, torch.nan).nanmedian(dim=-1, keepdim=True).values
    return (norms.clamp(min=1e-6) / (OUTLIER * middle).clamp(min=1e-6)).log().clamp(min=0) ** 2


def attach_penalty(model: SpeechLLM, config: Config, penalty: Penalty) -> None:
    """Gives ``model`` the penalty in place of its probe."""
    probe: Any = PenaltyProbe(model, penalty, config.training.seed)
    model.probe = probe
