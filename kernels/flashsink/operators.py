"""How an operator of ``torch.ops.flashsink`` is registered: one entry in its backend's table.

``cpu/operators.py`` and ``triton/operators.py`` hold the tables. An entry has a schema, the launcher that computes it,
a fake kernel that gives a compiler the shapes and, where it is differentiable, the operator that is its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Gradient:
    """The backward of an operator, in names of the forward's schema, separated by spaces.

    Attributes:
        operator: the name of the operator that computes it, which is not differentiable itself.
        takes: its arguments in order: an input or output of the forward, ``grad:out`` for the gradient of output
            ``out``, ``needs:q`` for whether the gradient of input ``q`` is needed. Outputs without ``grad:`` are not
            differentiable. A gradient is None where nothing depends on the output, if there are several.
        gives: the inputs whose gradients are its results, in order.
    """

    operator: str
    takes: str
    gives: str


@dataclass(frozen=True)
class Operator:
    """An entry of a table.

    Attributes:
        name: of ``torch.ops.flashsink``.
        schema: its arguments and results; with a gradient the results have names.
        run: the launcher, called with the arguments of the schema in order.
        like: the fake kernel: results of the right shape, strides and dtype, called in the same way.
        gradient: the backward, or None.
    """

    name: str
    schema: str
    run: Callable[..., Any]
    like: Callable[..., Any]
    gradient: Gradient | None = None


def register(operators: Sequence[Operator], *devices: str) -> None:
    """Makes ``operators`` known to torch; ``devices`` are dispatch keys such as "CPU" and "CUDA"."""
    for operator in operators:
        name = f"flashsink::{operator.name}"
        torch.library.define(name, operator.schema)
        torch.library.impl(name, devices)(operator.run)
        torch.library.register_fake(name)(operator.like)
    for operator in operators:
        if operator.gradient is not None:
            _differentiate(operator.name, operator.schema, operator.gradient)
            torch.library.register_autograd(f"flashsink::{operator.gradient.operator}", _refuse)


def _differentiate(name: str, arguments_and_results: str, gradient: Gradient) -> None:
    schema = torch._C.parse_schema(f"flashsink::{name}{arguments_and_results}")
    arguments, outputs = [x.name for x in schema.arguments], [x.name for x in schema.returns]
    takes, gives = gradient.takes.split(), gradient.gives.split()
    kept = [x for x in takes if ":" not in x]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # or every unused output costs a fill in every backward
        values = dict(zip(arguments, inputs, strict=True)) | dict(zip(outputs, output, strict=True))
        ctx.mark_non_differentiable(*(values[x] for x in outputs if f"grad:{x}" not in takes))
        leaves, ctx.tree = pytree.tree_flatten([values[x] for x in kept])
        ctx.plain = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in leaves))

    def derive(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(arguments)
        leaves = [x if saved is None else saved for x, saved in zip(ctx.plain, ctx.saved_tensors, strict=True)]
        values = dict(zip(kept, pytree.tree_unflatten(leaves, ctx.tree), strict=True))
        values |= {f"grad:{x}": grad for x, grad in zip(outputs, grads, strict=True)}
        needed = dict(zip(arguments, ctx.needs_input_grad, strict=True))
        values |= {f"needs:{x}": need for x, need in needed.items()}
        results = getattr(torch.ops.flashsink, gradient.operator)(*(values[x] for x in takes))
        found = dict(zip(gives, results if isinstance(results, tuple) else (results,), strict=True))
        return tuple(found.get(x) if needed[x] else None for x in arguments)

    torch.library.register_autograd(f"flashsink::{name}", derive, setup_context=save)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("this backend is differentiated once; backend='reference' as often as you like")


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """``x`` with unit stride in the last dimension, as all launchers and kernels read rows; copied if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
