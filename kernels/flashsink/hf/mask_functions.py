"""What transformers' mask functions say. It puts them together by ``and_masks`` and others; their code tells which is
which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink.types import Pattern, narrowed


class Said(NamedTuple):
    """What a mask function says.

    Attributes:
        plain: no more than causal attention in ``pattern``, over padded or packed rows.
        sequence: (B, S) the sequence numbers of packed rows, or None.
        pattern: a window or chunk that leaves something out, or None.
        chunks_from: (B,) where every row's chunks are counted from, or None.
    """

    plain: bool
    sequence: Tensor | None = None
    pattern: Pattern | None = None
    chunks_from: Tensor | None = None


class _Part(NamedTuple):
    """A mask function that is not put together from others.

    Attributes:
        every: it holds for every pair that the whole lets through.
        inside: its positions are those inside a packed sequence.
    """

    function: Any
    every: bool
    inside: bool

    @property
    def code(self) -> Any:
        return getattr(self.function, "__code__", None)

    def closure(self) -> list[Any]:
        return _closure(self.function)


def read(given: dict[str, Any]) -> Said:
    """What the function of a mask that transformers asks for says; ``given`` are the arguments of its mask function.

    A compiler cannot look into functions: there it is plain if it is causal, or a window or chunk of the config's size
    that leaves nothing out.
    """
    from transformers.masking_utils import and_masks, causal_mask_function

    function, queries, local = given["mask_function"], given["q_length"], given.get("local_size")
    if function is causal_mask_function:
        return Said(True)
    if torch.compiler.is_compiling():  # nothing else is put together so
        leaves_out = given.get("use_vmap") or (local is not None and local < queries)
        code = getattr(function, "__code__", None)
        return Said(not leaves_out and code is and_masks(causal_mask_function).__code__)
    parts = list(_parts(function, every=True, inside=False))
    window_code, chunk_code = _locals()
    packs = next((part.closure()[0] for part in parts if part.code is _packing()), None)
    sizes: dict[str, Any] = {}
    start, plain = None, any(part.function is causal_mask_function for part in parts)
    for part in parts:
        plain = plain and part.every
        if part.code is window_code and "window" not in sizes:
            sizes["window"] = part.closure()[0]
        elif part.code is chunk_code and "chunk" not in sizes and (packs is None or part.inside):
            sizes["chunk"], start = part.closure()
        elif part.code is not _packing() and part.function is not causal_mask_function:
            plain = False
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return Said(False, packs)
    return Said(plain, packs, narrowed(Pattern(**sizes), queries), None if packs is not None else start)


def sees_all(function: Any) -> bool:
    """Whether a mask function is that of an encoder, within a window or not."""
    from transformers.masking_utils import and_masks, bidirectional_mask_function

    if function is bidirectional_mask_function or torch.compiler.is_compiling():
        return function is bidirectional_mask_function
    if getattr(function, "__code__", None) is not and_masks(bidirectional_mask_function).__code__:
        return False
    return any(sees_all(part) for part in _closure(function)[0])


def _parts(function: Any, every: bool, inside: bool) -> Iterator[_Part]:
    from transformers import masking_utils as transformers

    both = transformers.and_masks(transformers.causal_mask_function).__code__
    either = transformers.or_masks(transformers.causal_mask_function).__code__
    # later releases have one over the positions inside packed sequences
    remap = getattr(transformers, "remap_positions_for_packed_sequence", None)
    code = getattr(function, "__code__", None)
    if code in (both, either):
        for part in _closure(function)[0]:
            yield from _parts(part, every and code is both, inside)
    elif remap is not None and code is remap(None, None).__code__:
        for part in filter(callable, _closure(function)):
            yield from _parts(part, every, True)
    else:
        yield _Part(function, every, inside)


def _packing() -> Any:
    from transformers.masking_utils import packed_sequence_mask_function

    return packed_sequence_mask_function(torch.empty(0)).__code__


def _locals() -> tuple[Any, Any]:
    """The code of windows and of chunks."""
    from transformers.masking_utils import chunked_overlay, sliding_window_overlay

    return sliding_window_overlay(1).__code__, chunked_overlay(1, torch.empty(0)).__code__


def _closure(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
