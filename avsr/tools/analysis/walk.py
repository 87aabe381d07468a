"""One forward of a decoder under taps: functions that see what passes through its layers, and may replace it.

B rows padded on the right, S tokens, C hidden size, H query and Hk key heads, D head dim. Layers count from 0 here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import flashsink
from avsr.tools.analysis.subject import Subject
from flashsink.hf.encoded import is_encoded, pattern_of

if TYPE_CHECKING:
    from avsr.models.rows import Assembled

_TAP = "_avsr_tap"
_OUTPUTS = {"output": "", "attention": "self_attn", "mlp": "mlp", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
_INPUTS = {"input": "", "product": "mlp.down_proj"}


class QKV(NamedTuple):
    """What the attention of a layer is computed from, after rotary embedding."""

    q: Tensor  # (B, H, S, D)
    k: Tensor  # (B, Hk, S, D)
    v: Tensor  # (B, Hk, S, D)
    scale: float  # of the scores


class Tap(NamedTuple):
    """``see(layer, value)`` is called at a point of every layer, or of ``layers``.

    Points: the residual stream (B, S, C) at ``input`` and ``output`` of a layer; what its blocks add to it,
    ``attention`` and ``mlp``; ``qkv``, a :class:`QKV`; and inside a gated MLP of I units (B, S, I) ``gate`` (before the
    activation function), ``up`` and ``product``, which ``down_proj`` reads. A tensor that ``see`` returns at ``input``
    takes the place of the layer's input.
    """

    point: str
    see: Callable[[int, Any], Any]
    layers: Iterable[int] | None = None


def run(subject: Subject, rows: Assembled, *taps: Tap) -> None:
    """One forward without gradients, every module in eval mode; afterwards the model is as it was."""
    with _evaluating(subject.lm), ExitStack() as stack:
        for tap in taps:
            _install(subject.decoder, tap, stack)
        subject.forward(rows)


def measure(subject: Subject, rows: Assembled, *taps: Tap, **options: Any) -> flashsink.Probe:
    """:func:`run` with flashsink attached by ``options``; the probe it returns is detached and readable."""
    probe = flashsink.attach(subject.lm, **options)
    try:
        with probe.spans(rows.spans):
            run(subject, rows, *taps)
    finally:
        probe.detach()
    return probe


@contextmanager
def _evaluating(lm: Any) -> Iterator[None]:
    training = [module for module in lm.modules() if module.training]
    lm.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _install(decoder: Any, tap: Tap, stack: ExitStack) -> None:
    layers = dict(enumerate(decoder.layers))
    chosen = {number: layers[number] for number in (layers if tap.layers is None else tap.layers)}
    if tap.point == "qkv":
        stack.enter_context(_tapped_attention(decoder, chosen, tap.see))
        return
    for number, layer in chosen.items():
        see = functools.partial(tap.see, number)
        if tap.point in _INPUTS:
            module = layer.get_submodule(_INPUTS[tap.point])
            handle = module.register_forward_pre_hook(functools.partial(_at_input, see), with_kwargs=True)
        else:
            module = layer.get_submodule(_OUTPUTS[tap.point])
            handle = module.register_forward_hook(functools.partial(_at_output, see))
        stack.callback(handle.remove)


def _at_input(see: Callable[[Tensor], Any], module: Any, args: Any, kwargs: Any) -> Any:
    new = see(args[0] if args else kwargs["hidden_states"])
    if new is None:
        return None
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def _at_output(see: Callable[[Tensor], Any], module: Any, args: Any, output: Any) -> None:
    see(output[0] if isinstance(output, tuple) else output)


@contextmanager
def _tapped_attention(decoder: Any, layers: dict[int, Any], see: Callable[[int, QKV], Any]) -> Iterator[None]:
    """Puts ``see`` before the attention function that is in force, under its name: the model keeps its
    implementation."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = decoder.config._attn_implementation
    attention = ALL_ATTENTION_FUNCTIONS[name]
    for number, layer in layers.items():
        setattr(layer.self_attn, _TAP, functools.partial(see, number))
    AttentionInterface.register(name, functools.partial(_attend, attention))
    try:
        yield
    finally:
        AttentionInterface.register(name, attention)
        for layer in layers.values():
            delattr(layer.self_attn, _TAP)


def _attend(attention: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    see, scaling = getattr(module, _TAP, None), options.get("scaling")
    if see is not None:
        _check_plain(mask, options)
        see(QKV(q, k, v, q.shape[-1] ** -0.5 if scaling is None else float(scaling)))
    return attention(module, q, k, v, mask, **options)


def _check_plain(mask: Any, options: dict[str, Any]) -> None:
    """Refuses what :class:`QKV` does not say.

    Raises:
        ValueError: the scores have more terms, or a query sees other keys than all before it.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: the analysis computes attention from queries and keys alone")
    if mask is not None and (not is_encoded(mask) or pattern_of(mask) is not None):
        raise ValueError("attention_mask: the analysis expects causal attention, without windows, chunks or prefixes")
