"""Cross entropy of hidden states through the vocabulary's matrix, with or without all logits at once.

Dimensions: n labels, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

# parts of the "chunked" way; a fixed number, since under ZeRO-3 every part gathers the matrix from all ranks
PARTS = 8


def label_loss(head: nn.Module, hidden: Tensor, targets: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """The loss of (n, C) states against (n,) int64 targets.

    At its peak, in the backward, it holds the log-softmax and two gradients of it in float32: 12 bytes a label and
    entry of the vocabulary. "chunked" holds an eighth of that and computes the logits twice.

    Args:
        head: the vocabulary's linear layer.
        hidden: states at the positions that predict a label.
        targets: the labels.
        how: "plain"; "chunked"; or "liger", Liger's fused kernel, differentiable once (CUDA).

    Returns:
        (cross entropy, a float32 scalar summed over labels; predicted right, an int64 scalar).
    """
    if how == "liger":
        return _liger(head, hidden, targets)
    if how == "plain":
        return _plain(head, hidden, targets)
    losses, right = [], []
    for part, labels in zip(hidden.tensor_split(PARTS), targets.tensor_split(PARTS), strict=True):
        loss, count = checkpoint(_plain, head, part, labels, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss)
        right.append(count)
    return torch.stack(losses).sum(), torch.stack(right).sum()


def _plain(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    with record_function("avsr/logits"):
        logits = head(hidden)
    with record_function("avsr/loss"):
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, (logits.argmax(dim=-1) == targets).sum()


def _liger(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    with record_function("avsr/logits"):  # it holds no logits; avsr profile looks for the range
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", return_predicted_tokens=True)
    with record_function("avsr/loss"):
        out = fused(head.weight, hidden, targets, head.bias)
    return out.loss, (out.predicted_tokens == targets).sum()
