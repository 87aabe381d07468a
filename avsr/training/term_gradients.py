"""Separate gradients of both loss terms: how large each is, and whether they oppose each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM


class TermGradients:
    """Separate gradients of both loss terms, accumulated over the micro-batches of one step.

    A large lambda can drown the cross entropy: the norms, and the cosine between both gradients, show it.
    """

    def __init__(self, model: SpeechLLM) -> None:
        self._parameters = list(model.trainable().values())
        if any(hasattr(p, "ds_id") for p in self._parameters):
            raise UserError("training.gradient_norms_every: not available under ZeRO stage 3; set it to 0")
        self._sums: list[Tensor | None] = [None, None]

    def add(self, cross_entropy: Tensor, decorrelation: Tensor | None, parts: int) -> None:
        for place, term in enumerate((cross_entropy, decorrelation)):
            if term is None or not term.requires_grad:
                continue
            grads = torch.autograd.grad(term / parts, self._parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).float().flatten()
                    for g, p in zip(grads, self._parameters, strict=True)
                ]
            )
            before = self._sums[place]
            self._sums[place] = flat if before is None else before + flat

    def norms(self, weight: float) -> dict[str, float]:
        """Norms of the global gradients of the cross entropy and of lambda x decorrelation, and their cosine."""
        row = {}
        for total in self._sums:
            if total is not None and dist.get_world_size() > 1:
                dist.all_reduce(total)
        ce, decorrelation = self._sums
        if ce is not None:
            row["grad_norm_ce"] = float(ce.norm())
        if ce is not None and decorrelation is not None:
            row["grad_norm_decorrelation"] = weight * float(decorrelation.norm())
            row["grad_cosine"] = float(torch.nn.functional.cosine_similarity(ce, decorrelation, dim=0))
        return row
