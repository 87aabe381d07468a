"""The optimizer's state by parameter name, independent of ZeRO stage and number of ranks.

DeepSpeed flattens the trained parameters into float32 partitions, one or more per rank, for which the optimizer keeps
its state. Here the state is assembled by parameter name, so it can be loaded on another stage, another number of ranks
or in plain PyTorch; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avsr.errors import UserError


@dataclass(frozen=True)
class _Piece:
    """The part of a trained parameter whose float32 value and state this rank keeps: elements ``start`` to
    ``start + count`` of the flattened parameter are at ``offset`` in ``holder``. ``shared``: all ranks have it."""

    holder: Tensor
    offset: int
    start: int
    count: int
    shared: bool = False

    def of(self, flat: Tensor) -> Tensor:
        return flat.flatten().narrow(0, self.offset, self.count)


@dataclass(frozen=True)
class OptimizerState:
    """Attributes:
    tensors: by "KEY/PARAMETER", float32 on CPU, of the parameter's size, flat.
    scalars: by key, such as AdamW's ``step``.
    """

    tensors: dict[str, Tensor]
    scalars: dict[str, float]


def gather(engine: Any) -> OptimizerState:
    """The whole state. Collective; rank 0 gets the result, the others an empty one."""
    base = base_optimizer(engine)
    found: dict[str, float | None] = {}  # None: a tensor of the parameter's size
    for _, _, piece in _pieces(engine):
        if piece is None:
            continue
        for key, value in base.state.get(piece.holder, {}).items():
            sized = isinstance(value, Tensor) and value.shape == piece.holder.shape and value.numel() > 1
            found.setdefault(key, None if sized else float(value))
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    merged = {key: value for part in reversed(parts) for key, value in part.items()}
    tensors = {}
    for key in sorted(key for key, value in merged.items() if value is None):
        for name, whole in _assemble(engine, partial(_kept, base, key)):
            if dist.get_rank() == 0:
                tensors[f"{key}/{name}"] = whole.cpu()
    scalars = {key: value for key, value in merged.items() if value is not None}
    return OptimizerState(tensors, scalars) if dist.get_rank() == 0 else OptimizerState({}, {})


def masters(engine: Any) -> dict[str, Tensor]:
    """The float32 values of all trained parameters, flat, on CPU. Collective."""
    return {name: whole.cpu() for name, whole in _assemble(engine, lambda piece: piece.holder)}


@torch.no_grad()
def _assemble(engine: Any, part: Callable[[_Piece], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every trained parameter, float32 and flat, assembled from ``part`` of each piece."""
    for name, parameter, piece in _pieces(engine):
        whole = torch.zeros(_size(parameter), dtype=torch.float32, device=engine.device)
        kept = None if piece is None else part(piece)
        if piece is not None and kept is not None:
            whole.narrow(0, piece.start, piece.count).copy_(piece.of(kept))
        if piece is None or not piece.shared:
            dist.all_reduce(whole)
        yield name, whole


@torch.no_grad()
def scatter(engine: Any, state: OptimizerState, weights: dict[str, Tensor]) -> None:
    """Copies this rank's pieces of ``state``, and of the float32 ``weights`` by parameter, of any shape.

    Raises:
        UserError: a parameter has no state, or one of another size.
    """
    base = base_optimizer(engine)
    keys = sorted({name.partition("/")[0] for name in state.tensors})
    for name, parameter, piece in _pieces(engine):
        for key in keys:
            value = state.tensors.get(f"{key}/{name}")
            if value is None or value.shape != (_size(parameter),) or not value.is_floating_point():
                raise UserError(f"resume: the saved optimizer state has no {key} of {name}, or of another size")
        if piece is None:
            continue
        own = slice(piece.start, piece.start + piece.count)
        piece.of(piece.holder).copy_(weights[name].flatten()[own])
        kept = base.state[piece.holder]
        for key in keys:
            if key not in kept:
                kept[key] = torch.zeros_like(piece.holder, dtype=torch.float32)
            piece.of(kept[key]).copy_(state.tensors[f"{key}/{name}"][own])
        for key, number in state.scalars.items():
            # torch's optimizers count steps in tensors, DeepSpeed's in integers
            kept[key] = torch.tensor(number) if type(base).__module__.startswith("torch.") else int(number)


def _kept(base: Any, key: str, piece: _Piece) -> Tensor | None:
    value: Tensor | None = base.state.get(piece.holder, {}).get(key)
    return value


def base_optimizer(engine: Any) -> Any:
    """The optimizer that holds the state, unwrapped from DeepSpeed's."""
    wrapper = engine.optimizer
    return getattr(wrapper, "optimizer", wrapper)


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _pieces(engine: Any) -> Iterator[tuple[str, Any, _Piece | None]]:
    """(name, parameter, this rank's piece) of every trained parameter; None if other ranks have all of it."""
    wrapper = engine.optimizer
    for name, parameter in engine.module.trainable().items():
        if hasattr(parameter, "ds_id"):
            yield name, parameter, _piece_of_stage_3(wrapper, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:
                yield name, parameter, None
                continue
            flat = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield name, parameter, _Piece(flat[mapping.param_group_index], here.start, there.start, there.numel)
        else:
            holder = _master(wrapper, parameter)
            yield name, parameter, _Piece(holder, 0, 0, parameter.numel(), shared=True)


def _piece_of_stage_3(wrapper: Any, parameter: Any) -> _Piece | None:
    group, offset, count = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = dist.get_rank() * count
    count = min(count, parameter.ds_numel - start)  # the last piece is padded
    return _Piece(wrapper.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None


def _master(wrapper: Any, parameter: Any) -> Any:
    """Without ZeRO: the parameter itself in float32, or the copy that DeepSpeed steps."""
    for low, high in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=True):
        for own, master in zip(low, high, strict=True):
            if own is parameter:
                return master
    return parameter
