"""One row in detail: attention maps of three layers and the largest activation of every token.

Attention is summed up in at most ``CELLS`` x ``CELLS`` cells: memory grows with the row's length S, never with S x S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avsr.tools.analysis.attention import pooled_attention, text_attention
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import QKV, Tap, measure

if TYPE_CHECKING:
    from avsr.models.rows import Assembled

CELLS = 96  # rows and columns of a map, at most
ALONE = 4  # leading tokens with a cell of their own: sinks are there


def examine_row(subject: Subject, row: Assembled) -> dict[str, Any]:
    """What one unpadded row shows, ready for JSON.

    Returns:
        tokens: name of every cell (of its first token). positions: the first token of every cell, from 0.
        maps: ``layer`` from 1, ``head`` from 1 or None = mean over heads, ``weights``: a row for each cell of queries
            (their mean), a column for each cell of keys (their sum). Per layer the mean, and the head in which a key
            other than BOS receives most from the text queries.
        activation: ``layer`` of the largest activation (among 1..L-1), ``max_abs`` and ``feature`` of every cell's
            largest token, ``median`` of |h| over the row.
    """
    lengths = row.mask.sum(dim=1)
    cells = cells_of(int(lengths[0])).to(lengths.device)
    first = [int((cells == cell).int().argmax()) for cell in range(int(cells[-1]) + 1)]
    maps: list[dict[str, Any]] = []

    def see(layer: int, qkv: QKV) -> None:
        received, own = text_attention(qkv, row.spans, lengths)
        head = int((received - own)[0, :, 1:].amax(dim=1).argmax())
        for number, weights in zip((None, head + 1), pooled_attention(qkv, cells, head), strict=True):
            rounded = [[round(value, 4) for value in line] for line in weights.tolist()]
            maps.append({"layer": layer + 1, "head": number, "weights": rounded})

    tap = Tap("qkv", see, [layer - 1 for layer in map_layers(subject.layers)])
    activations = measure(subject, row, tap, decorrelation=False, activations=True, median=True).activations
    assert activations.median is not None
    inner = max(subject.layers - 1, 1)
    layer = int(activations.max_abs[:inner, 0].amax(dim=1).argmax())
    sizes, features = activations.max_abs[layer, 0].cpu(), activations.feature[layer, 0].tolist()
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
            "median": float(activations.median[layer, 0]),
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
