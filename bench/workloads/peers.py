"""Peers of our kernels, reimplemented where they cannot simply be imported.

Dimensions: B rows, H query and Hk key heads, S tokens, D head dim, C features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from flashsink.triton.launch import Tile, launch

LOG2E = 1.4426950408889634

# FlagAttention has tiles for sm_80 and sm_86 only; every other device gets this one
AS_SHIPPED = Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=1)
# candidates of our own pass; on sm_90 none of them spills for head dims 64 and 128, and all use wgmma
TUNED = tuple(
    Tile({"BLOCK_M": m, "BLOCK_N": n}, warps=warps, stages=stages)
    for m, n, warps, stages in (
        *((64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 4, 3), (64, 128, 8, 3), (64, 128, 8, 4)),
        *((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3)),
    )
)


def reference_decorrelation(layers: Sequence[Tensor]) -> Tensor:
    """The loss as the reference training code computes it, in the dtype of the states, over all positions but BOS:
    mean squared cosine to BOS.

    Args:
        layers: tensors (B, S, C), BOS first in every row.

    Returns:
        scalar, mean over the layers.
    """
    losses = []
    for layer in layers:
        states = F.normalize(layer, dim=-1)
        cosine = torch.bmm(states, states[:, 0].unsqueeze(-1)).squeeze(-1)
        counted = torch.ones_like(cosine)
        counted[:, 0] = 0.0
        losses.append((cosine.square() * counted).sum() / counted.sum())
    return torch.stack(losses).mean()


def total_attention(q: Tensor, k: Tensor, lse: Tensor, tile: Tile, scale: float | None = None) -> Tensor:
    """FlagAttention's method for the column sums: a separate pass after the forward, one block of keys per program.

    Args:
        q: (B, H, S, D), k: (B, Hk, S, D), any strides with unit last stride; D a power of two.
        lse: (B, H, S) float32, natural log.
        tile: BLOCK_M queries, BLOCK_N keys.

    Returns:
        (B, H, S) float32, causal.
    """
    b, h, s, d = q.shape
    total = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    launch(
        _total_attention_kernel,
        (triton.cdiv(s, tile.blocks["BLOCK_N"]), h, b),
        tile,
        q=q,
        k=k,
        lse=lse.contiguous(),
        total=total,
        factor=float((d**-0.5 if scale is None else scale) * LOG2E),
        q_row=q.stride(0),
        q_head=q.stride(1),
        q_token=q.stride(2),
        k_row=k.stride(0),
        k_head=k.stride(1),
        k_token=k.stride(2),
        heads=h,
        group=h // k.shape[1],
        tokens=s,
        D=d,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )
    return total


@triton.jit
def _total_attention_kernel(
    q,
    k,
    lse,
    total,
    factor,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    heads,
    group,
    tokens,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    q += row * q_row + head.to(tl.int64) * q_head
    k += row * k_row + (head // group).to(tl.int64) * k_head
    out = (row * heads + head) * tokens
    columns = first + tl.arange(0, BLOCK_N)
    features = tl.arange(0, D)
    keys = tl.load(
        k + columns[None, :].to(tl.int64) * k_token + features[:, None], mask=columns[None, :] < tokens, other=0.0
    )
    received = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(first // BLOCK_M * BLOCK_M, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < tokens
        queries = tl.load(q + rows[:, None].to(tl.int64) * q_token + features[None, :], mask=inside[:, None], other=0.0)
        norm = tl.load(lse + out + rows, mask=inside, other=float("inf")) * 1.4426950408889634
        scores = tl.dot(queries, keys, input_precision=PRECISION) * factor
        # every block is masked, as in FlagAttention
        seen = (rows[:, None] >= columns[None, :]) & inside[:, None]
        received += tl.sum(tl.where(seen, tl.exp2(scores - norm[:, None]), 0.0), axis=0)
    tl.store(total + out + columns, received, mask=columns < tokens)


def total_attention_cpu(q: Tensor, k: Tensor, lse: Tensor, block: int = 128) -> Tensor:
    """The same method in plain PyTorch, for the CPU: (B, H, S) float32."""
    s, group = q.shape[2], q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    parts = []
    for first in range(0, s, block):
        keys = k[:, :, first : first + block]
        scores = q[:, :, first:] @ keys.mT * q.shape[-1] ** -0.5
        a = (scores.float() - lse[:, :, first:, None]).exp()
        # where, since beyond the causal edge the exponential may be infinite
        causal = torch.ones(a.shape[-2:], dtype=torch.bool, device=a.device).tril()
        parts.append(torch.where(causal, a, 0.0).sum(dim=2))
    return torch.cat(parts, dim=2)


def plain_rms_norm(hidden: int, eps: float, dtype: torch.dtype, device: torch.device) -> tuple[str, Any]:
    """(name, function of h) of the norm that ours is compared with: Liger's if it is installed, else torch's."""
    weight = torch.ones(hidden, dtype=dtype, device=device)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        return "Liger RMSNorm", LigerRMSNorm(hidden, eps=eps).to(device=device, dtype=dtype).requires_grad_(False)
    return "torch rms_norm", lambda h: F.rms_norm(h, (hidden,), weight, eps)
