"""``attach``: sink statistics, the decorrelation loss and ACT inside a Hugging Face decoder.

Attention runs through transformers' ``AttentionInterface``; hidden states are observed by forward hooks on the
decoder layers, so nothing needs ``output_attentions`` or ``output_hidden_states``.
"""

from __future__ import annotations

import contextvars
import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsink import _checks, functional, hf_masks, reference
from flashsink.backends import implementation
from flashsink.types import ActivationStats, Layout, SinkStats

# transformers takes every name with "flash" in it for a FlashAttention kernel to fetch
IMPLEMENTATION = "sink_capture"

# weak on both sides, or a dropped model would never be freed; its hooks keep the probe alive
_PROBES: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Probe]] = weakref.WeakKeyDictionary()
_ACTIVE: contextvars.ContextVar[Probe | None] = contextvars.ContextVar("flashsink_active", default=None)


@dataclass
class _Forward:
    """What one full forward has left behind."""

    layout: Layout
    spans: Tensor
    sinks: dict[int, SinkStats] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[int, ActivationStats] = field(default_factory=dict)


@dataclass(frozen=True)
class _Calibration:
    heads: dict[int, list[int]]
    beta: float
    threshold: float


class Probe:
    """The observer of one model; made by :func:`attach`.

    It describes the last full forward (no cached past); decode steps leave it untouched. L decoder layers,
    B rows, S tokens.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self._options = options
        self._base, self._layers = _find_decoder(model)
        self._signature = inspect.signature(self._base.forward)
        self._spans: Tensor | None = None
        self._current: _Forward | None = None
        self._states: dict[int, Tensor] = {}
        self._inside = False
        self._full = False
        self._count = -1
        self._calibration: _Calibration | None = None
        self._calm: dict[int, Tensor] = {}
        self._previous: str | None = None
        self._handles: list[Any] = []
        self._install()

    # ---- what a user reads

    @property
    def computes_decorrelation(self) -> bool:
        """Whether the probe was attached with ``decorrelation=True``."""
        return bool(self._options["decorrelation"])

    @contextmanager
    def spans(self, spans: Tensor) -> Iterator[None]:
        """Sets the number of leading prompt tokens of every row, (B,) or packed (N,) integers, for the forwards
        inside. Without it every valid token counts."""
        before, self._spans = self._spans, spans
        try:
            yield
        finally:
            self._spans = before

    @property
    def decorrelation_loss(self) -> Tensor:
        """float32 scalar of the last full forward, with its graph: add lambda x it to the loss.

        Layers 1..L-1 count; exactly 0 (with zero gradient) when no token does.
        """
        forward = self._last("decorrelation")
        if not forward.losses:
            raise RuntimeError("decorrelation_loss: a model with one layer has no layer that counts")
        total = torch.stack([forward.losses[i].to(torch.float32) for i in sorted(forward.losses)]).mean()
        return total / reference.decorrelation_count(forward.spans).clamp(min=1)

    @property
    def decorrelation_count(self) -> Tensor:
        """int64 scalar: tokens that count in :attr:`decorrelation_loss`, for averages over batches."""
        return reference.decorrelation_count(self._last("decorrelation").spans)

    @property
    def sinks(self) -> list[SinkStats]:
        """Attention received in every layer, L records. With ACT: before its correction."""
        forward = self._last("attention")
        if not forward.sinks:
            raise RuntimeError("sinks: the last forward was skipped by stats_every")
        return [forward.sinks[i] for i in range(len(self._layers))]

    @property
    def activations(self) -> ActivationStats:
        """Of the decoder layers' outputs: ``max_abs`` and ``feature`` (L, B, S); ``median`` (L, B) on request."""
        forward = self._last("activations")
        if not forward.activations:
            raise RuntimeError("activations: the last forward was skipped by stats_every")
        parts = [forward.activations[i] for i in range(len(self._layers))]
        medians = [part.median for part in parts if part.median is not None]
        return ActivationStats(
            torch.cat([part.max_abs for part in parts]),
            torch.cat([part.feature for part in parts]),
            torch.cat(medians) if medians else None,
        )

    def calibrate(self, heads: Iterable[tuple[int, int]] | None, beta: float = 0.4, threshold: float = 0.1) -> None:
        """ACT in the given (layer, head) pairs, both from 0, from the next forward on; None switches it off.

        The sinks of a head are the keys but BOS whose mean received attention in the prompt exceeds
        ``threshold``. They are found in every full forward and kept while decoding from its cache.

        Raises:
            ValueError: a pair or a number out of range, or attention is not attached.
        """
        self._calm.clear()
        if heads is None:
            self._calibration = None
            return
        if not self._options["attention"]:
            raise ValueError("heads: calibration needs attach(..., attention=True)")
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected 0..1, got {beta}")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold: expected 0 < threshold < 1, got {threshold}")
        chosen: dict[int, list[int]] = {}
        for layer, head in heads:
            number = self._base.config.num_attention_heads
            if not 0 <= layer < len(self._layers) or not 0 <= head < number:
                raise ValueError(
                    f"heads: expected layers below {len(self._layers)} and heads below {number}, got ({layer}, {head})"
                )
            chosen.setdefault(layer, []).append(head)
        self._calibration = _Calibration(chosen, beta, threshold)

    def detach(self) -> None:
        """Leaves the model as it was; the last forward stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            if _probe_of(layer.self_attn) is self:
                del _PROBES[layer.self_attn]
        if self._previous is not None:
            self._base.set_attn_implementation(self._previous)
            self._previous = None

    # ---- how it works

    def _install(self) -> None:
        for layer in self._layers:
            if _probe_of(layer.self_attn) is not None:
                raise ValueError("model: a probe is attached already; detach it first")
        for index, layer in enumerate(self._layers):
            _PROBES[layer.self_attn] = weakref.ref(self)
            self._handles.append(layer.register_forward_hook(self._layer_hook(index)))
        self._handles.append(self._base.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self._base.register_forward_hook(self._end, always_call=True))
        if self._options["attention"]:
            _register()
            self._previous = self._base.config._attn_implementation
            self._base.set_attn_implementation(IMPLEMENTATION)

    def _last(self, option: str) -> _Forward:
        if not self._options[option]:
            raise RuntimeError(f"this probe was attached with {option}=False")
        if self._current is None:
            raise RuntimeError("the attached model has had no full forward yet")
        return self._current

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = given.get("inputs_embeds")
        if inputs is None:
            inputs = given.get("input_ids")
        if inputs is None:
            return  # the model's own error is clearer
        rows, tokens = inputs.shape[:2]
        past = given.get("past_key_values")
        self._full = past is None or int(past.get_seq_length()) == 0
        self._inside = True
        _ACTIVE.set(self)
        if not self._full:
            return
        mask = given.get("attention_mask")
        layout = self._resolve(mask, given.get("position_ids"), rows, tokens, inputs.device)
        spans = layout.lengths if self._spans is None else self._spans.to(inputs.device)
        self._calm.clear()
        self._current = _Forward(layout, _checks.check_spans(spans, layout, self._options["validate"]))
        self._count += 1

    def _resolve(self, mask: Any, positions: Any, rows: int, tokens: int, device: torch.device) -> Layout:
        if isinstance(mask, dict):  # generate makes one mask for every kind of layer
            mask = next(iter(mask.values()))
        if hf_masks.is_encoded(mask):
            return hf_masks.decode(mask, rows, tokens, device)
        if isinstance(mask, Tensor) and mask.dim() == 4 and not self._options["attention"]:
            return hf_masks.layout_of_pattern(mask, rows, tokens, self._options["validate"])
        if mask is None:
            packed = hf_masks.layout_of_positions(positions, rows, tokens)
            if packed is not None:
                return packed
        elif not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask: expected a padding mask or None, got {type(mask).__name__}")
        return hf_masks.layout_of_mask(mask, rows, tokens, device, self._options["validate"])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # here and not in the hooks, which some releases of transformers run inside the checkpointed region
        if output is not None and self._current is not None:
            for index, hidden in self._states.items():
                self._current.losses[index] = implementation(None, hidden.device.type).decorrelation_sums(
                    [hidden], self._current.spans, self._current.layout, self._options["margin"]
                )[0]
        self._states.clear()
        self._inside = False
        _ACTIVE.set(None)

    def _layer_hook(self, index: int) -> Any:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if not self._inside or not self._full or self._current is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            forward, options = self._current, self._options
            if options["decorrelation"] and index < len(self._layers) - 1:
                self._states[index] = hidden
            if options["activations"] and self._due():
                chosen = implementation(None, hidden.device.type)
                forward.activations[index] = chosen.activation_stats([hidden], forward.layout, options["median"])

        return observe

    def _due(self) -> bool:
        return self._count % int(self._options["stats_every"]) == 0

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        """One attention call of layer ``index``: out (B, H, Sq, D) in q's dtype."""
        # a checkpointed layer runs again in the backward, outside the forward: it must not count twice
        record = self._inside and self._full and self._current is not None and self._due()
        calibrated = self._calibration is not None and index in self._calibration.heads
        choose = calibrated and self._inside and self._full
        chosen = implementation(None, q.device.type)
        counted = ([self._counted_queries(layout)] if record else []) + ([None] if choose else [])
        out, stats = chosen.attention(q, k, v, layout, causal=True, scale=scale, counted=counted)
        if record and self._current is not None:
            self._current.sinks[index] = stats[0]
        if choose:
            self._calm[index] = self._choose(index, stats[-1], layout)
        sinks = self._calm.get(index)
        if not calibrated or sinks is None:
            return out
        if sinks.shape[0] != q.shape[0]:
            raise ValueError(f"calibrate: the prompt had {sinks.shape[0]} rows, this step has {q.shape[0]}")
        sinks = nn.functional.pad(sinks, (0, k.shape[2] - sinks.shape[2]))
        assert self._calibration is not None
        return chosen.calibrated_attention(q, k, v, sinks, layout, beta=self._calibration.beta, scale=scale)

    def _counted_queries(self, layout: Layout) -> Tensor | None:
        """(N,) positions from which on queries count in the reported statistics."""
        if self._options["queries"] == "all" or self._current is None:
            return None
        return layout.starts + self._current.spans

    def _choose(self, index: int, stats: SinkStats, layout: Layout) -> Tensor:
        """(B, H, S) bool: the sinks of the calibrated heads, never BOS."""
        assert self._calibration is not None
        heads = torch.zeros(stats.received.shape[1], dtype=torch.bool, device=stats.received.device)
        heads[self._calibration.heads[index]] = True
        sinks = stats.mean_received > self._calibration.threshold
        return sinks & heads[:, None] & (layout.offsets() > 0)[:, None, :]


def attach(
    model: nn.Module,
    *,
    attention: bool = True,
    decorrelation: bool = True,
    activations: bool = True,
    margin: float = 0.0,
    stats_every: int = 1,
    median: bool = False,
    queries: str = "all",
    validate: bool = False,
) -> Probe:
    """Observes a Hugging Face Llama-style causal LM (Llama, SmolLM2, Qwen2/3, Mistral), PEFT-wrapped or not.

    Args:
        model: its decoder has ``layers`` with ``self_attn`` and runs attention through ``AttentionInterface``.
        attention: run attention through flashsink and record :attr:`Probe.sinks`.
        decorrelation: compute :attr:`Probe.decorrelation_loss` in every full forward.
        activations: record :attr:`Probe.activations`.
        margin: of the decorrelation loss.
        stats_every: record sinks and activations in every n-th full forward only.
        median: also record the median of |h| of every row and layer.
        queries: "all", or "after_span": sinks count only the queries behind the span (the text tokens).
        validate: check masks and spans on CUDA too, at the cost of a synchronisation.

    Returns:
        The :class:`Probe`; ``probe.detach()`` undoes everything.

    Raises:
        ValueError: the model is not such a decoder, or an option is out of range.
    """
    functional.check_margin(margin)
    if stats_every < 1:
        raise ValueError(f"stats_every: expected at least 1, got {stats_every}")
    if queries not in ("all", "after_span"):
        raise ValueError(f"queries: expected 'all' or 'after_span', got {queries!r}")
    options = {
        "attention": attention,
        "decorrelation": decorrelation,
        "activations": activations,
        "margin": margin,
        "stats_every": stats_every,
        "median": median,
        "queries": queries,
        "validate": validate,
    }
    return Probe(model, options)


def _find_decoder(model: nn.Module) -> tuple[Any, Any]:
    modules: list[Any] = list(model.modules())
    found = [
        module
        for module in modules
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and len(module.layers) > 0
        and all(hasattr(layer, "self_attn") for layer in module.layers)
        and hasattr(module, "set_attn_implementation")
    ]
    if len(found) != 1:
        raise ValueError(
            f"model: expected one Llama-style decoder (layers with self_attn), found {len(found)} in "
            f"{type(model).__name__}"
        )
    return found[0], found[0].layers


def _probe_of(module: nn.Module) -> Probe | None:
    held = _PROBES.get(module)
    return None if held is None else held()


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    # without a mask function of the same name transformers passes no mask at all
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(**kwargs: Any) -> Tensor:
    probe = _ACTIVE.get()
    if probe is not None and probe._full and probe._current is not None:
        window = getattr(kwargs.get("config"), "sliding_window", None)
        _check_window(window, probe._current.layout.tokens)
        return hf_masks.encode(probe._current.layout, kwargs["kv_length"])
    return hf_masks.make_mask(**kwargs)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if kwargs.get("dropout"):
        raise ValueError(f"attention_dropout: expected 0, got {kwargs['dropout']}")
    if kwargs.get("softcap") is not None:
        raise ValueError(f"softcap: expected None, got {kwargs['softcap']}")
    layout = hf_masks.decode(attention_mask, k.shape[0], k.shape[2], k.device)
    k, v = k[:, :, : layout.tokens], v[:, :, : layout.tokens]
    _check_window(kwargs.get("sliding_window"), layout.tokens)
    scaling = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    probe = _probe_of(module)
    if probe is None:
        out = implementation(None, q.device.type).attention(q, k, v, layout, causal=True, scale=scale)[0]
    else:
        out = probe.attend(int(module.layer_idx), q, k, v, layout, scale)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def _check_window(window: int | None, tokens: int) -> None:
    if window is not None and tokens > window:
        raise ValueError(
            f"sliding_window: expected sequences of at most {window} tokens, got {tokens}; sliding-window "
            "attention is not supported"
        )
