"""Attention by the model's own code, observed in its probabilities.

So runs what flashsink's operators do not compute: terms of a model's own in the scores (relative positions, ALiBi,
indices of sparse attention), dropout, and attention that does not go through transformers' ``AttentionInterface``. It
takes the model's memory, (Sq, Sk) probabilities a head.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashsink import reference
from flashsink.hf import encoded, masks
from flashsink.hf.norms import patch

MARK = "_flashsink_place"  # the attribute of an attached model's attention modules


def _functions(kind: type) -> list[Any]:
    return [
        inspect.unwrap(function).__code__
        for parent in kind.__mro__
        if parent not in (nn.Module, object)
        for function in vars(parent).values()
        if inspect.isfunction(function)
    ]


def uses_interface(attentions: list[list[nn.Module]]) -> bool:
    """Whether any of the layers' attention modules calls what ``AttentionInterface`` has."""
    kinds = {type(module) for modules in attentions for module in modules}
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for kind in kinds for code in _functions(kind))


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's own code passes an argument of this name, and not its caller, and its eager attention takes
    it."""
    constants = [constant for code in _functions(type(module)) for constant in code.co_consts]
    if not any(isinstance(constant, tuple) and name in constant for constant in constants):
        return False
    return name in inspect.signature(_eager(module)).parameters


def _eager(module: nn.Module) -> Any:
    run = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if run is None:
        raise ValueError(f"model: {type(module).__name__} has no eager attention; attention=False observes the model")
    return run


def eager(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[Tensor, Any, Tensor | None]:
    """(out (B, Sq, H, Dv), the weights that it returns, probabilities (B, H, Sq, Sk) before dropout, or None where they
    were not seen) of the module's eager attention.

    Raises:
        ValueError: there is no such function.
    """
    queries, keys = q.shape[2], k.shape[2]
    if encoded.is_encoded(mask):
        layout, _ = encoded.decode(mask.to(q.device), q.shape[0], queries)
        mask = reference.visible(layout, queries, True, encoded.pattern_of(mask))
    elif mask is None and queries > 1 and masks.before(getattr(module, "config", None)) != "eager":
        causal = arguments.get("is_causal")
        if getattr(module, "is_causal", True) if causal is None else causal:  # left out, as for torch's attention
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()[None, None]
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool:
            mask = masks.additive(mask, q.dtype)
        if mask.shape[-1] < keys:  # the rest of a static cache
            mask = nn.functional.pad(mask, (0, keys - mask.shape[-1]), value=torch.finfo(q.dtype).min)
    with _Watch(queries, keys) as watch:
        out, weights = _eager(module)(module, q, k, v, mask, **arguments)
    a = watch.found if watch.found is not None else weights
    return out, weights, a if isinstance(a, Tensor) and a.shape[-2:] == (queries, keys) else None


def watch(modules: list[nn.Module]) -> list[Callable[[], None]]:
    """Lets the attention of a layer's modules be seen; returns the functions that undo it."""
    innermost = [own for own in modules if not any(other is not own and other in own.modules() for other in modules)]
    return [patch(own, functools.partial(_watched, own, own.forward)) for own in innermost]


def _watched(module: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    place = getattr(module, MARK)
    if place.observer.forwards.live is None or torch.compiler.is_compiling():
        return plain(*args, **kwargs)
    with _Watch(heads=getattr(module, "num_heads", None)) as found:
        out = plain(*args, **kwargs)
    if found.found is not None:
        place.observer.note(place.layer, found.found)
    return out


class _Watch(TorchFunctionMode):
    """Keeps the result of the first softmax over keys, (B, H, Sq, Sk): probabilities. Torch's attention is made by
    softmax too, so that it can be seen."""

    def __init__(self, queries: int | None = None, keys: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        self.shape, self.heads = (queries, keys), heads
        self.found: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (nn.functional.softmax, torch.softmax, Tensor.softmax) and self.found is None:
            if out.dim() == 3 and self.heads:  # heads and rows in one
                self.found = out.unflatten(0, (-1, self.heads))
            elif out.dim() == 4 and (self.shape[0] is None or out.shape[-2:] == self.shape):
                self.found = out
        return out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = reference.wide(query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        a = scores.softmax(dim=-1).nan_to_num(0.0)  # a row that sees nothing gives 0, as torch's does
        self.found = a if self.found is None else self.found
        return nn.functional.dropout(a, dropout_p).to(query.dtype) @ value
