"""Tokens by group: what a position is called, and sums over the tokens of a name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BOS, SPEECH, TEXT, PROMPT = "BOS", "speech", "text", "prompt "


def group_of(name: str, position: int, span: int, words: bool) -> str:
    """BOS, a delimiter ``<audio>``, ``prompt NAME``, ``speech``; behind the span ``text``, or with ``words`` the token
    itself in quotes."""
    if position >= span:
        return repr(name) if words else TEXT
    if name == BOS or name.startswith("<") or position == 0:
        return name
    if name[:1] in ("a", "v", "f") and name[1:].isdigit():
        return SPEECH
    return f"{PROMPT}{name.strip() or name!r}"


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
