"""Argument checks: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashsink.types import Layout, Pattern, Segments, narrowed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
VALIDATE_VARIABLE = "FLASHSINK_VALIDATE"
MOST_SEGMENTS = 64  # the statistics have so many column sums


def check_values(device: torch.device, validate: bool = False) -> bool:
    """Whether the values of lengths, starts and spans are checked: always on CPU; on CUDA (where reading them
    synchronizes) only with ``validate`` or ``FLASHSINK_VALIDATE=1``, and never while a graph is compiled."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or validate or os.environ.get(VALIDATE_VARIABLE, "0") == "1"


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name}: expected a tensor (B, heads, tokens, D), got {_shape(tensor)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.shape[3] == 0:
            raise ValueError(f"{name}: expected a head dim of at least 1, got {_shape(tensor)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on {tensor.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected {tuple(k.shape[:3])} and a head dim as k, got {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected B={q.shape[0]} and D={q.shape[3]} as q, got {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides {q.shape[1]}, got {k.shape[1]}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: expected at most as many queries as keys ({k.shape[2]}), got {q.shape[2]}")


def check_scale(scale: float | None, q: Tensor) -> float:
    """The factor on the scores; None: D ** -0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return scale


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same products and a positive scale, exactly: kernels of torch and other vendors mask with
    -inf before they multiply, which a scale of 0 or below turns into NaN or into the largest score."""
    if scale > 0.0:
        return q, scale
    return (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)


def check_sink_logits(sink_logits: Tensor, q: Tensor) -> None:
    if (
        not isinstance(sink_logits, Tensor)
        or tuple(sink_logits.shape) != (q.shape[1],)
        or sink_logits.dtype not in FLOATS
        or sink_logits.device != q.device
    ):
        raise ValueError(f"sink_logits: expected ({q.shape[1]},) floating on {q.device}, got {_shape(sink_logits)}")


def check_softcap(softcap: float | None) -> None:
    number = isinstance(softcap, int | float) and not isinstance(softcap, bool)
    if softcap is not None and not (number and 0.0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a finite number above 0, got {softcap!r}")


def check_pattern(
    layout: Layout, window: int | None, chunk: int | None, prefix: Tensor | None, blocks: Tensor | None
) -> Pattern | None:
    """The one place where window, chunk, prefix and blocks become a :class:`Pattern`."""
    for name, size in (("window", window), ("chunk", chunk)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
    if prefix is not None:
        prefix = _counts("prefix", prefix, layout)
    if blocks is not None:
        shape, device = (layout.rows, layout.tokens), layout.starts.device
        if not isinstance(blocks, Tensor) or blocks.shape != shape or blocks.dtype not in INTEGERS:
            raise ValueError(f"blocks: expected integers {shape}, got {_shape(blocks)}")
        if blocks.device != device:
            raise ValueError(f"blocks: expected a tensor on {device}, got {blocks.device}")
        blocks = blocks.to(torch.long, copy=True)  # the caller may change it before the backward
    return narrowed(Pattern(window, chunk, prefix, blocks), layout.tokens)


def check_segments(segments: Tensor | None, count: int | None, layout: Layout) -> Segments | None:
    """Raises:
    ValueError: also where ``count`` is needed: it is not read from ids on a GPU, nor while a graph is compiled.
    """
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= MOST_SEGMENTS):
        raise ValueError(f"num_segments: expected 1 to {MOST_SEGMENTS}, got {count!r}")
    if segments is None:
        return None
    shape, device = (layout.rows, layout.tokens), layout.starts.device
    if not isinstance(segments, Tensor) or segments.shape != shape or segments.dtype not in INTEGERS:
        raise ValueError(f"segments: expected integers {shape}, got {_shape(segments)}")
    if segments.device != device:
        raise ValueError(f"segments: expected a tensor on {device}, got {segments.device}")
    ids = segments.long().clamp(min=-1).masked_fill(~layout.valid(), -1)
    readable = device.type == "cpu" and not torch.compiler.is_compiling()
    if count is None and not readable:
        raise ValueError(f"num_segments: expected beside segments on {device} or in a compiled graph, got None")
    if readable or check_values(device):
        largest = int(ids.max()) if ids.numel() else -1
        if largest >= (count or MOST_SEGMENTS):
            raise ValueError(f"segments: expected numbers below {count or MOST_SEGMENTS}, got {largest}")
        count = count or max(largest + 1, 1)
    assert count is not None
    return Segments(ids.masked_fill(ids >= count, -1), count)


def check_segment_masks(masks: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """Raises:
    ValueError: not names with (B, S) bool masks, 1 to 64 of them.
    """
    if masks is None:
        return None
    if not isinstance(masks, Mapping) or not 0 < len(masks) <= MOST_SEGMENTS:
        got = len(masks) if isinstance(masks, Mapping) else type(masks).__name__
        raise ValueError(f"segments: expected 1 to {MOST_SEGMENTS} names with (B, S) bool masks, got {got}")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"segments: {name}: expected a (B, S) bool mask, got {_shape(mask)}")
    return masks


def beyond_plain(
    q: Tensor, v: Tensor | None, pattern: Pattern | None, softcap: float | None, segments: bool = False
) -> str:
    """What kernels of plain attention do not take of these, by name, or ""."""
    tokens = 0 if v is None else v.shape[2]
    pattern = pattern if v is None else narrowed(pattern, tokens)
    names = [] if pattern is None else pattern.named()
    names += [] if softcap is None else ["softcap"]
    names += ["segments"] if segments else []
    if v is not None and q.shape[3] != v.shape[3]:
        names.append(f"v's head dim {v.shape[3]} unlike {q.shape[3]}")
    return f"its attention does not take {', '.join(names)}" if names else ""


def require(name: str, reason: str) -> None:
    """Raises:
    ValueError: the backend ``name``, called past the table of backends, does not take its arguments: ``reason``.
    """
    if reason:
        raise ValueError(f"backend: {name!r} cannot be used: {reason}")


def check_hidden_states(hidden_states: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The layers as a list of (B, S, C); views of a stacked tensor, never copies."""
    if isinstance(hidden_states, Tensor):
        if hidden_states.dim() != 4:
            raise ValueError(f"hidden_states: expected (L, B, S, C), got {_shape(hidden_states)}")
        layers = list(hidden_states.unbind(0))
    elif isinstance(hidden_states, Sequence):
        layers = list(hidden_states)
    else:
        raise ValueError(f"hidden_states: expected a tensor or a sequence of them, got {_shape(hidden_states)}")
    if not layers:
        raise ValueError("hidden_states: expected at least one layer, got none")
    for index, layer in enumerate(layers):
        if not isinstance(layer, Tensor) or layer.dim() != 3 or layer.dtype not in FLOATS:
            raise ValueError(f"hidden_states[{index}]: expected a floating (B, S, C), got {_shape(layer)}")
        if layer.shape[2] == 0:
            raise ValueError(f"hidden_states[{index}]: expected at least one feature, got {_shape(layer)}")
        if layer.shape != layers[0].shape or layer.device != layers[0].device:
            raise ValueError(
                f"hidden_states[{index}]: expected {tuple(layers[0].shape)} on {layers[0].device} as the "
                f"first layer, got {tuple(layer.shape)} on {layer.device}"
            )
    return layers


def index_vector(name: str, value: Tensor, size: int | None, device: torch.device) -> Tensor:
    """``value`` as an int64 vector of ``size`` entries on ``device``."""
    if not isinstance(value, Tensor) or value.dim() != 1:
        raise ValueError(f"{name}: expected an integer vector, got {_shape(value)}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")
    if size is not None and value.shape[0] != size:
        raise ValueError(f"{name}: expected {size} entries, got {value.shape[0]}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")
    return value.long()


def resolve_layout(
    rows: int,
    tokens: int,
    device: torch.device,
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    validate: bool = False,
) -> Layout:
    """The one place where lengths, starts and cu_seqlens become a :class:`Layout`."""
    if cu_seqlens is not None:
        if lengths is not None or starts is not None:
            raise ValueError("cu_seqlens: expected without lengths and starts, got both")
        if rows != 1:
            raise ValueError(f"cu_seqlens: expected one packed row, got {rows} rows")
        bounds = index_vector("cu_seqlens", cu_seqlens, None, device)
        if len(bounds) < 2:
            raise ValueError(f"cu_seqlens: expected at least 2 entries, got {len(bounds)}")
        if check_values(device, validate):
            steps = bounds.diff()
            if bounds[0] != 0 or bounds[-1] > tokens or bool((steps < 0).any()):
                raise ValueError(f"cu_seqlens: expected to rise from 0 to at most {tokens}, got {bounds.tolist()}")
        # unchecked values on a GPU are clamped, so no kernel reads outside its tensors
        bounds = torch.cat([bounds.new_zeros(1), bounds[1:].clamp(0, tokens).cummax(0).values])
        return Layout(bounds[:-1], bounds.diff(), 1, tokens, True)
    if starts is None and lengths is None:
        start = torch.zeros(rows, dtype=torch.long, device=device)
        return Layout(start, torch.full_like(start, tokens), rows, tokens, False, True)
    start = (
        torch.zeros(rows, dtype=torch.long, device=device)
        if starts is None
        else index_vector("starts", starts, rows, device)
    )
    length = tokens - start if lengths is None else index_vector("lengths", lengths, rows, device)
    if check_values(device, validate):
        if bool((start < 0).any()) or bool((start > tokens).any()):
            raise ValueError(f"starts: expected 0..{tokens}, got {start.tolist()}")
        if bool((length < 0).any()) or bool((start + length > tokens).any()):
            raise ValueError(f"lengths: expected 0..{tokens} with starts + lengths <= {tokens}, got {length.tolist()}")
    start = start.clamp(0, tokens)
    length = torch.minimum(length.clamp(min=0), tokens - start)
    return Layout(start, length, rows, tokens, False)


def check_spans(spans: Tensor, layout: Layout, validate: bool = False) -> Tensor:
    return _counts("spans", spans, layout, validate)


def check_counted(spans: Tensor, layout: Layout, validate: bool = False) -> Tensor:
    """Spans as :func:`check_spans`, or a mask (B, S) bool of the tokens that count."""
    if not isinstance(spans, Tensor) or spans.dtype != torch.bool:
        return check_spans(spans, layout, validate)
    if tuple(spans.shape) != (layout.rows, layout.tokens):
        raise ValueError(f"spans: expected a mask ({layout.rows}, {layout.tokens}), got {_shape(spans)}")
    if spans.device != layout.starts.device:
        raise ValueError(f"spans: expected a tensor on {layout.starts.device}, got {spans.device}")
    valid = layout.valid()
    if check_values(spans.device, validate) and bool((spans & ~valid).any()):
        raise ValueError("spans: expected a mask of valid tokens, got True at padding")
    return spans & valid


def check_anchors(anchors: Tensor | None, layout: Layout, layers: int, validate: bool = False) -> Tensor | None:
    """Anchors as :func:`flashsink.reference.pairs` takes them: None, (B, n) int64 or (L, n, C) floating."""
    if isinstance(anchors, Tensor) and anchors.dtype in FLOATS:
        return check_constants(anchors, layers)
    if anchors is None:
        return None
    if not isinstance(anchors, Tensor) or anchors.dtype not in INTEGERS or anchors.dim() != 2:
        raise ValueError(f"anchors: expected integers (B, n), or floating (L, C) or (L, n, C), got {_shape(anchors)}")
    if anchors.shape[0] != layout.rows or not anchors.shape[1]:
        raise ValueError(f"anchors: expected {layout.rows} rows of at least one position, got {_shape(anchors)}")
    if anchors.device != layout.starts.device:
        raise ValueError(f"anchors: expected a tensor on {layout.starts.device}, got {anchors.device}")
    places, tokens = anchors.long(), layout.tokens
    known = (places >= 0) & (places < tokens)
    if tokens:
        known = known & layout.valid().gather(1, places.clamp(0, tokens - 1))
    if check_values(anchors.device, validate) and bool((~known & (places != -1)).any()):
        raise ValueError(f"anchors: expected positions of valid tokens, or -1 for none, got {anchors.tolist()}")
    return torch.where(known, places, -1)


def check_constants(anchors: Tensor, layers: int) -> Tensor:
    """(L, C) or (L, n, C) as (L, n, C) without a graph."""
    if anchors.dim() not in (2, 3) or anchors.shape[0] != layers or not anchors.numel():
        raise ValueError(f"anchors: expected ({layers}, C) or ({layers}, n, C), got {_shape(anchors)}")
    return (anchors if anchors.dim() == 3 else anchors[:, None]).detach()


def _counts(name: str, value: Tensor, layout: Layout, validate: bool = False) -> Tensor:
    """Numbers of leading tokens, one for every row or packed sequence."""
    value = index_vector(name, value, layout.lengths.shape[0], layout.lengths.device)
    if check_values(layout.lengths.device, validate):
        given, most = value.tolist(), layout.lengths.tolist()  # on the CPU cheaper than a few small operations
        if any(not 0 <= count <= length for count, length in zip(given, most, strict=True)):
            raise ValueError(f"{name}: expected 0 to the row's number of tokens {most}, got {given}")
        return value.clone()  # the caller may change it before the backward
    return torch.minimum(value.clamp(min=0), layout.lengths)


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
