"""Which tokens of a batch are valid, as masks say it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashsink import checks, reference
from flashsink.checks import check_values
from flashsink.types import Layout

Doubts = list[tuple[Tensor, str]]  # (bool: this must not be, why)
_ELSEWHERE = "cu_seq_lens_q: expected the places where position_ids restart"
_HOLES = "attention_mask: expected the valid tokens of a row in one piece, got a mask with holes"


def of_mask(
    mask: Tensor | None,
    rows: int,
    tokens: int,
    device: torch.device,
    validate: bool = False,
    doubts: Doubts | None = None,
) -> Layout:
    """A 2-D padding mask (B, S), 1 = valid, as a layout.

    Raises:
        ValueError: another shape, or valid tokens with a gap between them; where values are not checked that is added
            to ``doubts``.
    """
    if mask is None:
        start = torch.zeros(rows, dtype=torch.long, device=device)
        return Layout(start, start + tokens, rows, tokens, False, True)
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < tokens:
        raise ValueError(f"attention_mask: expected a padding mask ({rows}, {tokens}), got {tuple(mask.shape)}")
    keep = mask[:, :tokens].to(device=device, dtype=torch.bool)
    length = keep.sum(dim=1)
    start = torch.where(length > 0, keep.int().argmax(dim=1), 0)
    layout = Layout(start, length, rows, tokens, False)
    _require(layout.valid() == keep, _HOLES, validate, doubts)
    return layout


def of_pattern(mask: Tensor, rows: int, tokens: int, validate: bool, doubts: Doubts) -> Layout:
    """The layout that a 4-D mask of a full forward describes, boolean or additive: causal attention with padding or,
    in a single row, over packed sequences.

    Raises:
        ValueError: it is another pattern; where values are not checked that is added to ``doubts``.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention_mask: expected a bool or floating 4-D mask, got {mask.dtype}")
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, :1, :tokens, :tokens]
    if seen.shape[-2:] != (tokens, tokens) or mask.shape[0] not in (1, rows):
        raise ValueError(f"attention_mask: expected ({rows}, 1, {tokens}, {tokens}), got {tuple(mask.shape)}")
    seen = seen.expand(rows, -1, -1, -1)
    checked = check_values(mask.device, validate)
    found = blocks(seen) if checked and rows == 1 else None
    if found is not None:
        return found if len(found.starts) > 1 else of_mask(None, 1, tokens, mask.device)
    layout = of_mask(seen[:, 0, tokens - 1], rows, tokens, mask.device, validate, doubts)
    valid = layout.valid()
    # what padded queries see does not matter, but padding sees no padding unless it sees all
    apart = ~(seen & ~valid[:, None, None, :]).any(dim=-1) | seen.all(dim=-1)
    equal = (reference.visible(layout, tokens, True) == seen) | ~valid[:, None, :, None]
    equal = equal & (apart | valid[:, None])[..., None]
    _require(equal, "attention_mask: expected causal attention with padding, got another 4-D pattern", validate, doubts)
    return layout


def _require(holds: Tensor, why: str, validate: bool, doubts: Doubts | None) -> None:
    if check_values(holds.device, validate):
        if not bool(holds.all()):
            raise ValueError(why)
    elif doubts is not None:
        doubts.append((~holds.all(), why))


def blocks(seen: Tensor) -> Layout | None:
    """The packed layout of a row in which (1, 1, S, S) is causal attention within sequences, or None."""
    alone = ~seen[0, 0].diagonal(-1)  # tokens that do not see the one before begin a sequence
    found = packed(torch.cat([alone.new_zeros(1), alone]).long().cumsum(0))
    return found if bool((reference.visible(found, seen.shape[-1], True) == seen).all()) else None


def of_bounds(bounds: Tensor, positions: Tensor, tokens: int, validate: bool, doubts: Doubts) -> Layout:
    """The packed layout with ``bounds`` (N + 1,), where ``positions`` (1, S) restart, without a look at their values.

    Raises:
        ValueError: no such bounds, or the positions restart elsewhere; where values are not checked that is added to
            ``doubts``.
    """
    try:
        layout = checks.resolve_layout(1, tokens, positions.device, cu_seqlens=bounds, validate=validate)
    except ValueError as error:
        raise ValueError(str(error).replace("cu_seqlens", "cu_seq_lens_q")) from None
    restarts = positions.diff(dim=-1) != 1
    _require(restarts == (layout.segments().diff(dim=-1) != 0), _ELSEWHERE, validate, doubts)
    return layout


def packed(sequence: Tensor) -> Layout:
    """The layout of a packed row, (S,) the number of every token's sequence."""
    tokens = sequence.shape[0]
    edges = sequence.diff().nonzero().squeeze(1) + 1
    bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), tokens)])
    return Layout(bounds[:-1], bounds.diff(), 1, tokens, True)
