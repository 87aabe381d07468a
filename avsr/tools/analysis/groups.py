"""What a token is called in the tables, and sums over the tokens of a name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BOS, SPEECH, IMAGE, TEXT, PROMPT = "BOS", "speech", "image", "text", "prompt "
STREAMS = {"a": SPEECH, "v": SPEECH, "f": SPEECH, "i": IMAGE}  # by the first letter of a token's name


def stream_of(name: str) -> str | None:
    """What a token before the text belongs to that is called as audio (a0), video (v0), fused (f0) and image (i0)
    tokens are."""
    return STREAMS.get(name[:1]) if name[1:].isdigit() else None


def group_of(name: str, position: int, span: int, words: bool) -> str:
    """The group of a token: BOS, a delimiter ``<audio>``, ``prompt NAME``, ``speech`` or ``image``; after the span
    ``text``, or with ``words`` the token itself in quotes."""
    if position >= span:
        return repr(name) if words else TEXT
    if name == BOS or name.startswith("<") or position == 0:
        return name
    return stream_of(name) or f"{PROMPT}{name.strip() or name!r}"


def label(name: str, position: int, span: int) -> str:
    """The name of a single token: BOS, delimiters, speech and image tokens as they are, else ``prompt NAME`` or ``text
    NAME``."""
    if position == 0:
        return BOS
    if position < span and (name.startswith("<") or stream_of(name)):
        return name
    return f"{PROMPT if position < span else 'text '}{name.strip() or repr(name)}"


class GroupSums:
    """Sums of per-token values by name, in float64."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def places(self, names: Sequence[str]) -> Tensor:
        """(n,) int64: the row of every name, new ones at the end."""
        return torch.tensor([self.names.setdefault(name, len(self.names)) for name in names])

    def add(self, key: str, places: Tensor, values: Tensor) -> None:
        """Adds ``values`` (n, ...), a row for each of the n tokens at ``places``."""
        values = values.double()
        held = self._sums.get(key, values.new_zeros(0, *values.shape[1:]))
        if len(held) < len(self.names):
            held = torch.cat([held, held.new_zeros(len(self.names) - len(held), *held.shape[1:])])
        self._sums[key] = held.index_add_(0, places, values)

    def total(self, key: str, names: Sequence[str]) -> Tensor:
        """The sum over all tokens of these names, shaped as a value."""
        return self._sums[key][[self.names[name] for name in names]].sum(dim=0)

    def means(self, key: str, names: Sequence[str], per: str = "tokens") -> list[float] | None:
        """The sum of ``key`` over that of ``per`` (of shape ()), None where there is nothing to divide by."""
        count = float(self.total(per, names))
        return (self.total(key, names) / count).tolist() if count else None


def mean_over_layers(by_layer: Sequence[float] | None) -> float | None:
    """The mean over layers 1..L-1 (over the only one where there is one); None where nothing was counted."""
    inner = (by_layer[:-1] or by_layer) if by_layer else []
    return sum(inner) / len(inner) if inner else None
