"""Padding as a few numbers a row, through Hugging Face's mask interface.

Transformers asks a mask function once a forward and hands its result to every attention call. A 4-D tensor passes
through everything (generate, checkpointing) unchanged, so the layout travels as a 4-D int64 tensor with its numbers
in it: dense rows (B, 3, 1, 1) = start, length and the first position whose query counts in the statistics; with a
static cache (B, 4, 1, 1), followed by the end of the used keys; packed (1, N, 3, 1) with the same three.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink import reference
from flashsink.checks import check_values
from flashsink.types import Layout

_BIDIRECTIONAL, _PATTERN, _WINDOW, _CHUNK, _PACKED, _NOT_PACKED, _OTHER_SIZE = range(1, 8)
_REASONS = {
    _BIDIRECTIONAL: "is_causal: expected causal attention, the model asks for bidirectional attention",
    _PATTERN: "attention_mask: flashsink supports causal attention with padding, got another pattern (such as images, "
    "prefixes or blocks whose tokens see each other)",
    _WINDOW: "sliding_window: expected sequences of at most {} tokens, got {}; sliding windows are not supported",
    _CHUNK: "attention_chunk_size: expected sequences of at most {} tokens, got {}; chunks are not supported",
    _PACKED: "position_ids: the model takes the rows for packed sequences, which flashsink takes for one each",
    _NOT_PACKED: "position_ids: they restart, but the model takes the row for one sequence (as all do with a KV "
    "cache: pass use_cache=False)",
    _OTHER_SIZE: "attention_mask: expected one for the decoder's own tokens, got one for {} tokens instead of {}",
}


class Forward(NamedTuple):
    """A full forward of an attached decoder: whose config it is, its layout, and the mask that all its layers get."""

    config: Any
    layout: Layout
    mask: Tensor


class _Here(threading.local):
    """The forward that this thread is in."""

    def __init__(self) -> None:
        self.forward: Forward | None = None


here = _Here()


def layout_of_mask(mask: Tensor | None, rows: int, tokens: int, device: torch.device, validate: bool) -> Layout:
    """A 2-D padding mask (B, S), 1 = valid, as a layout.

    Raises:
        ValueError: another shape, or (where values are checked) valid tokens with a gap between them.
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
    if position_ids is None or tokens < 2:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("position_ids: a compiled model cannot look whether they restart; leave them out")
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return None
    restart = position_ids.diff(dim=1) != 1
    if not bool(restart.any()):
        return None
    if rows != 1 or position_ids.shape[0] != 1:
        raise ValueError(f"position_ids: expected packed sequences in a single row, got {rows} rows")
    edges = restart[0].nonzero().squeeze(1) + 1
    bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), tokens)])
    return Layout(bounds[:-1], bounds.diff(), 1, tokens, True)


def layout_of_pattern(mask: Tensor, rows: int, tokens: int, validate: bool) -> Layout:
    """The layout that another implementation's 4-D mask of a full forward describes, boolean or additive.

    Raises:
        ValueError: (where values are checked) the pattern is not causal attention with padding.
    """
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, :1, :tokens, :tokens]
    seen = seen.expand(rows, -1, -1, -1)
    layout = layout_of_mask(seen[:, 0, tokens - 1], rows, tokens, mask.device, validate)
    if check_values(mask.device, validate):
        valid = layout.valid()[:, None, :, None]  # what a padded query sees does not matter
        if not bool(((reference.visible(layout, tokens, True) == seen) | ~valid).all()):
            raise ValueError("attention_mask: expected causal attention with padding, got another pattern")
    return layout


def encode(layout: Layout, keys: int, query_starts: Tensor | None = None) -> Tensor:
    """``layout`` for attention over ``keys`` slots, of which a static cache leaves the last ones unused;
    ``query_starts`` (N,) = the first position of every sequence whose query counts, default all."""
    query_starts = layout.starts if query_starts is None else query_starts
    numbers = torch.stack([layout.starts, layout.lengths, query_starts], dim=1)
    if layout.packed:
        return numbers[None, :, :, None]
    if layout.tokens != keys:
        numbers = torch.cat([numbers, numbers.new_full((layout.rows, 1), layout.tokens)], dim=1)
    return numbers[:, :, None, None]


def is_encoded(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.int64:
        return False
    return mask.shape[1:] in ((3, 1, 1), (4, 1, 1)) or (mask.shape[0] == 1 and mask.shape[2:] == (3, 1))


def is_packed(mask: Any) -> bool:
    return is_encoded(mask) and mask.shape[2] == 3


def decode(mask: Any, rows: int, tokens: int, device: torch.device) -> tuple[Layout, Tensor]:
    """(layout, query_starts) of an encoded mask over the first ``tokens`` keys, those in use.

    With a static cache ``tokens`` counts unused slots too; the returned layout leaves them out.
    """
    check(mask)
    if is_packed(mask):
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
    mask_function: Any,
    device: torch.device,
    config: Any = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor:
    """Called by transformers, or a model's code through it, for every kind of mask a forward needs; also for kinds that
    no layer uses, so one that flashsink does not support is refused only where attention gets it.

    In a full forward of an attached decoder the result is that forward's own. Elsewhere (steps of decoding; generate
    and multimodal models, which make masks before they call the decoder) it is the layout of the padding mask.
    """
    own = here.forward if here.forward is not None and here.forward.config is config else None
    end = int(q_offset) + q_length if own is None else own.layout.tokens
    reason = _foreign(mask_function, others)
    if reason == _PATTERN and q_length == end and check_values(device, False):
        layout = layout_of_mask(attention_mask, batch_size, end, device, False) if own is None else own.layout
        sizes = {"batch_size": batch_size, "q_length": end, "kv_length": kv_length, "q_offset": 0}
        if _changes_nothing(layout, mask_function, attention_mask, sizes, others):
            return encode(layout, kv_length) if own is None else own.mask
    if reason:
        return _refusal(reason)
    if local_size is not None and end > local_size:
        chunked = getattr(config, "attention_chunk_size", None) == local_size
        return _refusal(_CHUNK if chunked else _WINDOW, local_size, end)
    packed = _packs(mask_function)
    if own is None:
        if packed:
            return _refusal(_PACKED)
        return encode(layout_of_mask(attention_mask, batch_size, end, device, False), kv_length)
    if packed is not None and packed != own.layout.packed:
        return _refusal(_PACKED if packed else _NOT_PACKED)
    if (batch_size, q_length) != (own.layout.rows, own.layout.tokens):
        return _refusal(_OTHER_SIZE, q_length, own.layout.tokens)
    return own.mask


def _foreign(mask_function: Any, others: dict[str, Any]) -> int:
    """The reason why ``mask_function`` is not causal attention, within a window at most; 0 where it is.

    Transformers puts functions together by ``and_masks`` and ``or_masks``: those are recognized here by their code,
    which a compiler can follow, others by the arguments that come with them.
    """
    from transformers.masking_utils import and_masks, causal_mask_function

    if "allow_is_bidirectional_skip" in others:
        return _BIDIRECTIONAL
    if mask_function is causal_mask_function:
        return 0
    combined = getattr(mask_function, "__code__", None) is and_masks(causal_mask_function).__code__
    return 0 if combined and not others.get("use_vmap") else _PATTERN


def _changes_nothing(
    layout: Layout, mask_function: Any, attention_mask: Tensor | None, sizes: dict[str, int], others: dict[str, Any]
) -> bool:
    """Whether a pattern of the model's own amounts to causal attention in this batch, as one for images does where
    there are none."""
    from transformers.masking_utils import sdpa_mask

    seen = sdpa_mask(
        **sizes,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=bool(others.get("use_vmap")),
        device=layout.starts.device,
    )[..., : layout.tokens]
    padding = ~layout.valid()[:, None, :, None]  # what a padded query sees does not matter
    return bool(((reference.visible(layout, layout.tokens, True) == seen) | padding).all())


def _packs(mask_function: Any) -> bool | None:
    """Whether ``mask_function`` keeps packed sequences apart; None where a compiler cannot look, which takes every
    row for packed as long as its positions are not known."""
    from transformers.masking_utils import packed_sequence_mask_function

    if torch.compiler.is_compiling():
        return None
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    code = packed_sequence_mask_function(torch.empty(0)).__code__
    return any(getattr(part, "__code__", None) is code for part in parts)


def _refusal(reason: int, got: int = 0, expected: int = 0) -> Tensor:
    """A mask that :func:`check` refuses, (1, 5, 1, 1) on the CPU."""
    return torch.tensor([reason, got, expected, 0, 0])[None, :, None, None]


def check(mask: Any) -> None:
    """Refuses what :func:`make_mask` did not make, or made for a pattern that is not supported.

    Raises:
        ValueError: with the reason.
    """
    if is_encoded(mask):
        return
    if isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.shape == (1, 5, 1, 1):
        reason, first, second = (int(number) for number in mask[0, :3, 0, 0])
        raise ValueError(_REASONS[reason].format(first, second) + "; attention=False observes the model all the same")
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"attention_mask: expected what flashsink's mask function made, got {shape}")
