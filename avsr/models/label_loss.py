"""Cross entropy of hidden states through the LM head, with or without all logits in memory.

Dimensions: n labels, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

# number of chunks, fixed since under ZeRO-3 every chunk gathers the matrix from all ranks
CHUNKS = 8


def label_loss(head: nn.Module, hidden: Tensor, targets: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Cross entropy of (n, C) states against (n,) int64 targets.

    Peak memory, in the backward, is the log-softmax and two gradients of it in float32: 12 bytes per label and
    vocabulary entry. "chunked" takes an eighth of that and computes the logits twice.

    Args:
        head: the LM head, a linear layer.
        hidden: states at the positions that predict a label.
        targets: the labels.
        how: "plain"; "chunked"; or "liger", Liger's fused kernel, differentiable once (CUDA).

    Returns:
        (cross entropy summed over labels, a float32 scalar; number of correct predictions, an int64 scalar).
    """
    if how == "liger":
        return _liger(head, hidden, targets)
    if how == "plain":
        return _plain(head, hidden, targets)
    losses, right = [], []
    for part, labels in zip(hidden.tensor_split(CHUNKS), targets.tensor_split(CHUNKS), strict=True):
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

    with record_function("avsr/logits"):  # no logits are kept, but avsr profile expects the range
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", return_predicted_tokens=True)
    with record_function("avsr/loss"):
        out = fused(head.weight, hidden, targets, head.bias)
    return out.loss, (out.predicted_tokens == targets).sum()
