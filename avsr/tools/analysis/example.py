"""One row looked at closely: attention maps of three layers and the largest activation of every token.

Attention is computed again from queries and keys, in blocks of queries, and summed up in at most ``CELLS`` x ``CELLS``
cells: memory grows with the row's length S, never with S x S. L layers, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avsr.models.speech_llm import Assembled
from avsr.tools.analysis.observe import forward_watched, pooled_attention, text_attention
from avsr.tools.analysis.subject import Subject

CELLS = 96  # rows and columns of a map, at most
ALONE = 4  # leading tokens with a cell of their own: sinks are there


def look_at(subject: Subject, row: Assembled) -> dict[str, Any]:
    """What one unpadded row shows, ready for JSON.

    Returns:
        tokens: name of every cell (of its first token). positions: the first token of every cell, from 0.
        maps: ``layer`` from 1, ``head`` from 1 or None = mean over heads, ``weights``: a row a cell of queries (their
        mean), a column a cell of keys (their sum). Per layer the mean, and the head in which a key other than BOS
        receives most from the text queries.
        activation: ``layer`` of the largest activation (among 1..L-1), ``max_abs`` and ``feature`` of every cell's
        largest token, ``median`` of |h| over the row.
    """
    lengths = row.mask.sum(dim=1)
    cells = cells_of(int(lengths[0])).to(lengths.device)
    first = [int((cells == cell).int().argmax()) for cell in range(int(cells[-1]) + 1)]
    chosen = map_layers(subject.layers)
    maps: list[dict[str, Any]] = []

    def see(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        if layer + 1 not in chosen:
            return
        received, own = text_attention(q, k, scale, row.spans, lengths)
        best = (received - own)[0, :, 1:].amax(dim=1)
        head = int(best.argmax())
        mean, one = pooled_attention(q, k, scale, cells, head)
        maps.append({"layer": layer + 1, "head": None, "weights": _rounded(mean)})
        maps.append({"layer": layer + 1, "head": head + 1, "weights": _rounded(one)})

    probe = forward_watched(subject, row, see, decorrelation=False, activations=True, median=True)
    assert probe.activations.median is not None
    inner = max(subject.layers - 1, 1)
    layer = int(probe.activations.max_abs[:inner, 0].amax(dim=1).argmax())
    sizes, features = probe.activations.max_abs[layer, 0].cpu(), probe.activations.feature[layer, 0].tolist()
    ends = [*first[1:], len(sizes)]
    largest = [begin + int(sizes[begin:end].argmax()) for begin, end in zip(first, ends, strict=True)]
    return {
        "tokens": [row.names[0][place] for place in first],
        "positions": first,
        "maps": maps,
        "activation": {
            "layer": layer + 1,
            "max_abs": [float(sizes[place]) for place in largest],
            "feature": [features[place] for place in largest],
            "median": float(probe.activations.median[layer, 0]),
        },
    }


def cells_of(tokens: int) -> Tensor:
    """(tokens,) int64: the cell of every position, one each in short rows; in longer ones the first ``ALONE`` alone,
    the others in ``CELLS - ALONE`` of nearly equal size."""
    position = torch.arange(tokens)
    if tokens <= CELLS:
        return position
    rest = (position - ALONE) * (CELLS - ALONE) // (tokens - ALONE) + ALONE
    return torch.where(position < ALONE, position, rest)


def map_layers(layers: int) -> list[int]:
    """An early, a middle and a late layer, from 1; all where there are three or fewer."""
    if layers <= 3:
        return list(range(1, layers + 1))
    return sorted({2, layers // 2 + 1, layers - 1})


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in line] for line in weights.tolist()]
