"""What a plain forward says in float64 about its attention and its layers' outputs, module by module.

Hooks rather than ``output_attentions`` and ``output_hidden_states``: the same tensors, also from the models that do
not return them, and with the names of the modules, which tell an encoder's from a decoder's.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a batch of S tokens are: one (row, start, end) each."""

    pieces: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of_mask(mask: Tensor) -> Sequences:
        """Of (B, S), nonzero where valid; None of them may have a gap."""
        places = [(row, row_mask.nonzero().flatten().tolist()) for row, row_mask in enumerate(mask)]
        return Sequences(tuple((row, found[0], found[-1] + 1) for row, found in places if found))

    def valid(self, rows: int, tokens: int) -> Tensor:
        """(B, S) bool."""
        keep = torch.zeros(rows, tokens, dtype=torch.bool)
        for row, start, end in self.pieces:
            keep[row, start:end] = True
        return keep


@dataclass
class Stack:
    """The calls of one kind of layer, in order: ``layers.#.self_attn`` gives a stack of attention weights."""

    attention: list[Tensor] = field(default_factory=list)  # (B, H, Sq, Sk) each
    inputs: list[Tensor] = field(default_factory=list)  # (B, S, C) each
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Record:
    """What one forward of the whole model did."""

    attention: dict[str, Stack] = field(default_factory=lambda: defaultdict(Stack))  # by kind of attention module
    layers: dict[str, Stack] = field(default_factory=lambda: defaultdict(Stack))  # by list of layers


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Record]:
    """Records the forwards of ``model`` inside; the tensors keep their graph."""
    record, undo, seen = Record(), [], set()

    def after(name: str, is_layer: bool) -> Any:
        kind = re.sub(r"\.\d+(?=\.|$)", ".#", name)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            parts = output if isinstance(output, (tuple, list)) else (output,)
            for part in parts:
                if id(part) not in seen and _is_attention(part):
                    seen.add(id(part))  # modules around it hand it on
                    record.attention[kind].attention.append(part)
            if is_layer:
                given = args[0] if args else kwargs.get("hidden_states")
                made = parts[0] if parts else None
                if isinstance(made, Tensor) and made.dim() == 3 and isinstance(given, Tensor):
                    stack = record.layers[_list_of(name)]
                    stack.inputs.append(given)
                    stack.outputs.append(made)

        return hook

    for name, module in model.named_modules():
        if name:
            is_layer = re.fullmatch(r"(\D*\.)?\d+", name) is not None
            undo.append(module.register_forward_hook(after(name, is_layer), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in undo:
            handle.remove()


def _list_of(name: str) -> str:
    """The outermost list of layers that a module is in: model.layers.3.self_attn -> model.layers."""
    return re.split(r"\.\d+(?:\.|$)", name)[0]


def _is_attention(part: Any) -> bool:
    if not isinstance(part, Tensor) or part.dim() != 4 or not part.is_floating_point() or part.numel() == 0:
        return False
    sums = part.detach().sum(-1)
    # at most one: some models have a sink outside of the sequence
    return bool((part >= 0).all() and (sums <= 1.001).all() and sums.max() > 0.1)


def list_of_attention(kind: str) -> str:
    """The list of layers that a kind of attention module is in."""
    return kind.split(".#")[0]


def received(attention: Tensor, sequences: Sequences) -> Tensor:
    """(B, H, S) float64: column sums over the valid queries."""
    queries = sequences.valid(attention.shape[0], attention.shape[2])
    return (attention.double() * queries[:, None, :, None]).sum(2)


def decorrelation(states: list[Tensor], sequences: Sequences) -> Tensor:
    """float64 scalar over (B, S, C) states: the mean over them of the mean squared cosine to every sequence's first
    token, of all its later ones."""
    losses = []
    for state in states:
        cosines = []
        for row, start, end in sequences.pieces:
            piece = state[row, start:end].double()
            cosines.append(nn.functional.cosine_similarity(piece[:1], piece[1:], dim=-1) ** 2)
        losses.append(torch.cat(cosines).sum() / max(sum(len(c) for c in cosines), 1))
    return torch.stack(losses).mean()


class Softmaxes(TorchFunctionMode):
    """Counts softmaxes over keys, and calls of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        self.count += name == "scaled_dot_product_attention" or (name == "softmax" and _over_keys(result))
        return result


def _over_keys(result: Any) -> bool:
    """(B, H, Sq, Sk), or (B * H, S, S): not a router's over experts."""
    if not isinstance(result, Tensor) or result.shape[-1] < 2:
        return False
    return result.dim() >= 4 or (result.dim() == 3 and result.shape[1] == result.shape[2])
