"""Massive activations set to zero or to their mean at inference, after Sun et al. 2024 (arXiv 2402.17762)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from avsr.models.speech_llm import SpeechLLM
from avsr.tools.analysis.statistics import MASSIVE_RATIO, MASSIVE_SIZE

KINDS = ("zero", "zero others", "mean", "mean others")  # all tokens, or all but BOS


class MassiveMeans:
    """Mean value of the massive activations of every (layer, feature), separately for BOS and other tokens."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int, bool], tuple[float, int]] = {}

    def add(self, layer: int, features: Tensor, values: Tensor, bos: Tensor) -> None:
        for feature, value, first in zip(features.tolist(), values.tolist(), bos.tolist(), strict=True):
            total, count = self._sums.get((layer, feature, first), (0.0, 0))
            self._sums[layer, feature, first] = total + value, count + 1

    def get(self, layer: int, feature: int, bos: bool) -> float | None:
        """None where no activation of the unchanged model was massive."""
        total, count = self._sums.get((layer, feature, bos), (0.0, 0))
        return total / count if count else None


@contextmanager
def intervene(model: SpeechLLM, kind: str, means: MassiveMeans | None = None) -> Iterator[None]:
    """Inside, every full forward of ``model`` has its massive activations changed after each layer but the last.

    Args:
        model: an unchanged one.
        kind: "watch" only adds them to ``means``; "zero" and "mean" change those of all tokens, "zero others" and
            "mean others" those of all but BOS.
        means: filled by "watch", read by "mean" and "mean others".
    """
    masks: list[Tensor] = []
    plain = model.assemble

    def assemble(*args: Any, **options: Any) -> Any:
        rows = plain(*args, **options)
        masks[:] = [rows.mask.bool()]
        return rows

    model.assemble = assemble  # type: ignore[method-assign]
    layers = model.decoder.model.layers
    hooks = [
        layer.register_forward_hook(partial(_change, index, kind, means, masks))
        for index, layer in enumerate(layers[:-1])
    ]
    try:
        yield
    finally:
        del model.assemble
        for hook in hooks:
            hook.remove()


def _change(
    index: int, kind: str, means: MassiveMeans | None, masks: list[Tensor], module: Any, args: Any, out: Any
) -> Any:
    hidden = out[0] if isinstance(out, tuple) else out
    valid = masks[0]
    if hidden.shape[1] == 1 and valid.shape[1] > 1:  # a decoding step
        return None
    if hidden.shape[:2] != valid.shape:
        raise ValueError(f"beams: expected 1, got {len(hidden)} rows for {len(valid)} utterances")
    size = hidden.float().abs()
    median = torch.stack([row[mask].median() for row, mask in zip(size, valid, strict=True)])
    massive = (size >= MASSIVE_RATIO * median[:, None, None]) & (size > MASSIVE_SIZE) & valid[..., None]
    b, s, f = massive.nonzero(as_tuple=True)
    bos = s == valid.int().argmax(dim=1)[b]
    if kind == "watch":
        if means is not None:
            means.add(index, f, hidden[b, s, f].float(), bos)
        return None
    changed = hidden.clone()
    pick = ~bos if kind.endswith("others") else torch.ones_like(bos)
    if kind.startswith("zero"):
        values = torch.zeros(len(f))
    else:
        assert means is not None
        known = [means.get(index, feature, first) for feature, first in zip(f.tolist(), bos.tolist(), strict=True)]
        pick = pick & torch.tensor([value is not None for value in known], dtype=torch.bool)
        values = torch.tensor([value or 0.0 for value in known])
    changed[b[pick], s[pick], f[pick]] = values[pick].to(hidden)
    return (changed, *out[1:]) if isinstance(out, tuple) else changed
