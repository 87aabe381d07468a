"""Padding as a few numbers a row, through Hugging Face's mask interface.

Transformers asks a mask function once a forward and hands its result to every attention call. A 4-D tensor passes
through everything (generate, checkpointing) unchanged, so the layout travels as a 4-D int64 tensor with its numbers
in it: dense rows (B, 3, 1, 1) = start, length and the first position whose query counts in the statistics; with a
static cache (B, 4, 1, 1), the end of the used keys behind them; packed (1, N, 3, 1) with the same three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink._checks import check_values
from flashsink.types import Layout


def layout_of_mask(mask: Tensor | None, rows: int, tokens: int, device: torch.device, validate: bool) -> Layout:
    """A 2-D padding mask (B, S), 1 = valid, as a layout.

    Raises:
        ValueError: another shape, or (where values are checked) valid tokens with a hole between them.
    """
    if mask is None:
        start = torch.zeros(rows, dtype=torch.long, device=device)
        return Layout(start, start + tokens, rows, tokens, False, True)
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask: expected a padding mask ({rows}, {tokens}), got {tuple(mask.shape)}; "
            "masks with more than two dimensions are not supported"
        )
    keep = mask[:, :tokens].to(device=device, dtype=torch.bool)
    length = keep.sum(dim=1)
    start = torch.where(length > 0, keep.int().argmax(dim=1), 0)
    layout = Layout(start, length, rows, tokens, False)
    if check_values(device, validate) and not bool((layout.valid() == keep).all()):
        raise ValueError("attention_mask: expected the valid tokens of a row in one piece, got a mask with holes")
    return layout


def layout_of_positions(position_ids: Tensor | None, rows: int, tokens: int) -> Layout | None:
    """The packed layout that restarting ``position_ids`` describe, or None where nothing restarts."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != tokens or tokens < 2:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("position_ids: a compiled model cannot look whether they restart; leave them out")
    restart = position_ids.diff(dim=1) != 1
    if not bool(restart.any()):
        return None
    if rows != 1 or position_ids.shape[0] != 1:
        raise ValueError(f"position_ids: expected packed sequences in a single row, got {rows} rows")
    edges = restart[0].nonzero().squeeze(1) + 1
    bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), tokens)])
    return Layout(bounds[:-1], bounds.diff(), 1, tokens, True)


def layout_of_pattern(mask: Tensor, rows: int, tokens: int, validate: bool) -> Layout:
    """The layout behind another implementation's 4-D mask of a full forward, boolean or additive.

    Raises:
        ValueError: (where values are checked) the pattern is not causal attention with padding.
    """
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, :1, :tokens, :tokens]
    seen = seen.expand(rows, -1, -1, -1)
    layout = layout_of_mask(seen[:, 0, tokens - 1], rows, tokens, mask.device, validate)
    if check_values(mask.device, validate):
        valid = layout.valid()[:, None, :, None]  # what a padded query may see is of no account
        if not bool(((reference.visible(layout, tokens, True) == seen) | ~valid).all()):
            raise ValueError("attention_mask: expected causal attention with padding, got another pattern")
    return layout


def encode(layout: Layout, keys: int, first: Tensor | None = None) -> Tensor:
    """``layout`` for attention over ``keys`` slots, of which a static cache leaves the last ones unused; ``first``
    (N,) = the first position of every sequence whose query counts, default all."""
    numbers = torch.stack([layout.starts, layout.lengths, layout.starts if first is None else first], dim=1)
    if layout.packed:
        return numbers[None, :, :, None]
    if layout.tokens != keys:
        numbers = torch.cat([numbers, numbers.new_full((layout.rows, 1), layout.tokens)], dim=1)
    return numbers[:, :, None, None]


def is_encoded(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.int64:
        return False
    return mask.shape[1:] in ((3, 1, 1), (4, 1, 1)) or (mask.shape[0] == 1 and mask.shape[2:] == (3, 1))


def decode(mask: Any, rows: int, tokens: int, device: torch.device) -> tuple[Layout, Tensor]:
    """(layout, first positions) of an encoded mask over the first ``tokens`` keys, those in use.

    With a static cache ``tokens`` counts unused slots too; the returned layout leaves them out.
    """
    if mask is None:
        layout = layout_of_mask(None, rows, tokens, device, False)
        return layout, layout.starts
    if not is_encoded(mask):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected what flashsink's mask function made, got {shape}")
    if mask.shape[2] == 3:
        return Layout(mask[0, :, 0, 0], mask[0, :, 1, 0], 1, tokens, True), mask[0, :, 2, 0]
    if mask.shape[1] == 4:
        tokens = min(tokens, int(mask[0, 3, 0, 0]))
    return Layout(mask[:, 0, 0, 0], mask[:, 1, 0, 0], rows, tokens, False), mask[:, 2, 0, 0]


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    attention_mask: Tensor | None,
    **others: Any,
) -> Tensor:
    """Called by transformers where no forward of an attached model is under way (generate does that for
    compilable caches): the layout from the padding mask alone."""
    from transformers.masking_utils import causal_mask_function

    end = int(q_offset) + q_length
    window = getattr(others.get("config"), "sliding_window", None)
    if window is not None and end > window:
        raise ValueError(f"sliding_window: expected at most {window} tokens, got {end}; it is not supported")
    if others.get("mask_function") is not causal_mask_function and window is None:
        raise ValueError("attention_mask: flashsink supports causal attention with padding, got another pattern")
    return encode(layout_of_mask(attention_mask, batch_size, end, others["device"], False), kv_length)
