"""Decoders whose attention does not go through transformers' ``AttentionInterface``: one entry each.

The model keeps its own implementation and its masks; only the products are taken over.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashsink.hf.attention import MARK, observed
from flashsink.hf.norms import patch

# classes whose ``_attn(q, k, v, mask)`` is attention, with the scale of their scores
_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "GPTJAttention": lambda module: 1.0 / float(module.scale_attn),
    "CodeGenAttention": lambda module: 1.0 / float(module.scale_attn),
    "GPTNeoSelfAttention": lambda module: 1.0,
    "GPTNeoXJapaneseAttention": lambda module: 1.0 / float(module.norm_factor),
}
_TORCHS = {"FalconAttention"}  # classes that call torch's attention themselves


def use_interface(attentions: list[list[nn.Module]]) -> bool:
    """Whether any of the layers' attention modules calls what ``AttentionInterface`` has."""
    kinds = {type(module) for modules in attentions for module in modules}
    return any(
        "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(function).__code__.co_names
        for kind in kinds
        for parent in kind.__mro__
        if parent is not nn.Module
        for function in vars(parent).values()
        if inspect.isfunction(function)
    )


def known(modules: list[nn.Module]) -> list[nn.Module]:
    """Those of ``modules`` that an entry describes."""
    return [module for module in modules if type(module).__name__ in _PRODUCTS or type(module).__name__ in _TORCHS]


def implementation(modules: list[nn.Module]) -> str:
    """The implementation that the model's config must name for :func:`take`; "" where it does not matter."""
    return "sdpa" if any(type(module).__name__ in _TORCHS for module in modules) else ""


def take(module: nn.Module) -> Callable[[], None]:
    """Makes the module's attention go through flashsink; returns the function that undoes it."""
    if type(module).__name__ in _TORCHS:
        return patch(module, functools.partial(_with_torchs, module, module.forward))
    module._attn = functools.partial(_products, module)  # type: ignore[assignment]
    return functools.partial(delattr, module, "_attn")


def _products(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """(out (B, H, Sq, D), no probabilities), as the classes' own method."""
    queries, keys = q.shape[2], k.shape[2]
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:  # GPT-Neo's causal and local patterns
        own = bias[:, :, keys - queries : keys, :keys]
        seen = own if attention_mask is None else (attention_mask[..., :keys] == 0) & own
        attention_mask = seen
    dropout = getattr(module, "attn_dropout", None) or getattr(module, "attention_dropout", None)
    arguments = {"scaling": _PRODUCTS[type(module).__name__](module)}
    arguments["dropout"] = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
    return observed(module, q, k, v, attention_mask, arguments, getattr(module, MARK)), None


class _Torchs(TorchFunctionMode):
    """Sends torch's attention to flashsink's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args  # anything else is an error of Python's, with the place
        arguments = {"dropout": kwargs.get("dropout_p"), "is_causal": bool(kwargs.get("is_causal", False))}
        arguments["scaling"] = kwargs.get("scale")
        with torch._C.DisableTorchFunction():
            return observed(self.module, q, k, v, kwargs.get("attn_mask"), arguments, getattr(self.module, MARK))


def _with_torchs(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Torchs(module):
        return plain(*args, **kwargs)
