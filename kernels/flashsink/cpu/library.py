"""The C++ kernels of ``csrc`` for CPU tensors: the library, the decorrelation loss and the largest activations.

The library is plain C behind ctypes, so one build serves every release of torch. It is loaded on first use; the
``torch.library`` operators are always there, and raise where it is missing. Other kernels have their own modules:
:mod:`flashsink.cpu.norm` and :mod:`flashsink.cpu.attention`.

float32 and bfloat16 run in C++. float16 and float64 go to the reference, which is what the ``cpu`` backend means
for them. Threads are those of ``torch.get_num_threads()``; results do not depend on their number.
Dimensions: B rows, S tokens, C features, N sequences (N = B in dense layout).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsink import reference
from flashsink.operators import adjacent
from flashsink.types import ActivationStats, Layout

ABI_VERSION = 4  # flashsink_abi_version() in csrc/library.cpp
DTYPES = (torch.float32, torch.bfloat16)
USABLE = "usable"
_PATH = Path(__file__).parents[1] / "_native.so"

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Attention(ctypes.Structure):
    """``Problem`` of csrc/blocks.h, which says what the fields are."""

    _fields_ = [
        *((name, _POINTER) for name in ("data", "strides")),
        *((name, _SIZE) for name in ("sequences", "rows", "heads", "group", "queries", "keys", "dim", "dim_v")),
        *((name, _POINTER) for name in ("starts", "ends")),
        *((name, _SIZE) for name in ("packed", "causal", "window", "chunk")),
        *((name, _POINTER) for name in ("prefix", "blocks", "mask")),
        ("mask_row", _SIZE),
        *((name, _POINTER) for name in ("sink_logits", "targets")),
        ("lists", _SIZE),
        *((name, _POINTER) for name in ("received", "entropy")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, _SIZE) for name in ("threads", "apart")),
    ]


_VIEW = [_POINTER, _INT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _INT]
_LAYERS = [_POINTER, _POINTER, _POINTER, _SIZE, _INT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _INT]
_SIGNATURES = {
    "flashsink_decorrelation_forward": [*_LAYERS, ctypes.c_double, _POINTER, _POINTER, _POINTER, _INT],
    "flashsink_decorrelation_backward": [*_LAYERS, _POINTER, _POINTER, _POINTER, _POINTER, _INT],
    "flashsink_activation_max": [*_VIEW, _POINTER, _POINTER, _INT],
    "flashsink_rms_norm_forward": [*_VIEW, *[_POINTER] * 2, *[ctypes.c_double] * 2, *[_POINTER] * 7, _INT],
    "flashsink_rms_norm_backward": [*_VIEW, *[_POINTER] * 8, _INT],
    "flashsink_attention_forward": [ctypes.POINTER(Attention)],
    "flashsink_attention_backward": [ctypes.POINTER(Attention)],
    "flashsink_limit_isa": [_INT],
}


def available() -> str:
    """``"usable"``, or the reason why the compiled library cannot be used."""
    return _load(_PATH)[1]


def library() -> Any:
    """The loaded library.

    Raises:
        RuntimeError: it cannot be used, with the reason.
    """
    loaded, state = _load(_PATH)
    if loaded is None:
        raise RuntimeError(f"flashsink's compiled library cannot be used: {state}")
    return loaded


@functools.cache
def _load(path: Path) -> tuple[Any, str]:
    if not path.is_file():
        return None, "its library was not built: install a C++ compiler and flashsink again"
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.flashsink_abi_version()
        if version != ABI_VERSION:
            return None, f"its library has interface {version} and {ABI_VERSION} is needed: install flashsink again"
        for name, arguments in _SIGNATURES.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"its library does not load: {error}"
    return loaded, USABLE


# ---- what the cpu backend calls, with the signatures of the reference


def decorrelation_sums(layers: Sequence[Tensor], spans: Tensor, layout: Layout, margin: float) -> Tensor:
    """:func:`flashsink.reference.decorrelation_sums`, differentiable once w.r.t. ``layers``.

    One read of every layer forward and one backward. Dot products and norms are summed in float64, which the
    gradient of states nearly parallel to BOS needs.

    Args:
        layers: L CPU tensors (B, S, C) of any strides; copied where the features are not adjacent in memory.
            float16 and float64 are computed by the reference.
        spans: (N,) int64, within the layout's lengths.
        layout: dense rows, or one packed row.
        margin: 0 <= margin < 1.

    Returns:
        (L,) float32 (float64 for float64), with its graph.
    """
    if any(layer.dtype not in DTYPES for layer in layers):
        return reference.decorrelation_sums(layers, spans, layout, margin)
    # one call for all layers: it costs as much as reading a small layer
    run, own = torch.ops.flashsink.decorrelation_sums, [adjacent(layer) for layer in layers]
    if len({layer.dtype for layer in own}) == 1:
        return run(own, layout.starts, spans, layout.packed, margin)[0]
    return torch.cat([run([layer], layout.starts, spans, layout.packed, margin)[0] for layer in own])


def activation_stats(layers: Sequence[Tensor], layout: Layout, median: bool) -> ActivationStats:
    """:func:`flashsink.reference.activation_stats`; the median is the reference's.

    Layers of float16 and float64 are computed by the reference.
    """
    if any(layer.dtype not in DTYPES for layer in layers):
        return reference.activation_stats(layers, layout, median)
    pairs = [
        torch.ops.flashsink.activation_max(adjacent(layer.detach()), layout.starts, layout.lengths, layout.packed)
        for layer in layers
    ]
    medians = torch.stack([reference.row_medians(layer, layout) for layer in layers]) if median else None
    return ActivationStats(torch.stack([top for top, _ in pairs]), torch.stack([index for _, index in pairs]), medians)


# ---- launchers


def _check(layer: Tensor, starts: Tensor, ends: Tensor, packed: bool) -> None:
    """The C++ side trusts its arguments, so they are checked here."""
    if layer.dim() != 3 or layer.dtype not in DTYPES or adjacent(layer) is not layer:
        raise ValueError(f"layer: expected float32 or bfloat16 (B, S, C) with unit last stride, got {layer.dtype}")
    for vector in (starts, ends):
        if vector.dtype != torch.int64 or vector.dim() != 1 or len(vector) != len(starts):
            raise ValueError(f"starts, spans: expected int64 vectors, got {tuple(vector.shape)} {vector.dtype}")
    if layer.shape[0] != (1 if packed else len(starts)):
        raise ValueError(f"starts: expected one entry a row, or one packed row, got {len(starts)}")


def _run(name: str, *arguments: Any) -> None:
    if getattr(library(), f"flashsink_{name}")(*arguments, torch.get_num_threads()):
        raise MemoryError(f"flashsink.{name}: no memory for its partial sums")


def call(name: str, layer: Tensor, starts: Tensor, ends: Tensor, packed: bool, *more: Any) -> None:
    """Calls a C++ function of one layer, with the leading arguments that all of them share."""
    _check(layer, starts, ends, packed)
    starts, ends = starts.contiguous(), ends.contiguous()
    strides = (layer.stride(0), layer.stride(1), *layer.shape)
    vectors = (starts.data_ptr(), ends.data_ptr(), len(starts), int(packed))
    _run(name, layer.data_ptr(), int(layer.dtype == torch.bfloat16), *strides, *vectors, *more)


def _call_layers(name: str, layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, *more: Any) -> None:
    """Calls a C++ function of all layers at once, of one shape and dtype."""
    for layer in layers:
        _check(layer, starts, spans, packed)
        if layer.shape != layers[0].shape or layer.dtype != layers[0].dtype:
            raise ValueError("layers: expected one shape and dtype")
    starts, spans = starts.contiguous(), spans.contiguous()
    strides = [(_SIZE * len(layers))(*(layer.stride(d) for layer in layers)) for d in (0, 1)]
    kind = int(layers[0].dtype == torch.bfloat16)
    vectors = (starts.data_ptr(), spans.data_ptr(), len(starts), int(packed))
    _run(name, _pointers(layers), *strides, len(layers), kind, *layers[0].shape, *vectors, *more)


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*(x.data_ptr() for x in tensors))


def sums_like(layers: Sequence[Tensor], starts: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    h, count = layers[0], len(layers)
    totals = h.new_empty((count,), dtype=torch.float32)
    scalars = h.new_zeros((count, *h.shape[:2], 2), dtype=torch.float64)
    return totals, scalars, h.new_empty((count, starts.shape[0], h.shape[-1]), dtype=torch.float32)


def sums(
    layers: Sequence[Tensor], starts: Tensor, spans: Tensor, packed: bool, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums (L,), w and p of every token (L, B, S, 2) float64, gradient of BOS (L, N, C) float32)."""
    totals, scalars, dbos = sums_like(layers, starts)
    out = (totals.data_ptr(), scalars.data_ptr(), dbos.data_ptr())
    _call_layers("decorrelation_forward", layers, starts, spans, packed, margin, *out)
    return totals, scalars, dbos


def gradients_like(dsums: Tensor, layers: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [layer.new_empty(layer.shape) for layer in layers]


def gradients(
    dsums: Tensor,
    layers: Sequence[Tensor],
    starts: Tensor,
    spans: Tensor,
    packed: bool,
    scalars: Tensor,
    dbos: Tensor,
) -> list[Tensor]:
    """Of every layer (B, S, C) in its dtype, contiguous, 0 at tokens that do not count. dsums: (L,)."""
    dlayers = gradients_like(dsums, layers)
    dsums, scalars, dbos = dsums.float().contiguous(), scalars.contiguous(), dbos.contiguous()
    inner = (dsums.data_ptr(), scalars.data_ptr(), dbos.data_ptr(), _pointers(dlayers))
    _call_layers("decorrelation_backward", layers, starts, spans, packed, *inner)
    return dlayers


def maxima_like(layer: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = layer.shape[:2]
    return layer.new_zeros(shape, dtype=torch.float32), layer.new_full(shape, -1, dtype=torch.int32)


def maxima(layer: Tensor, starts: Tensor, lengths: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """(max |h| (B, S) float32, its lowest feature (B, S) int32), 0 and -1 at padding."""
    max_abs, feature = maxima_like(layer)
    call("activation_max", layer, starts, lengths, packed, max_abs.data_ptr(), feature.data_ptr())
    return max_abs, feature
