"""``attach``: sink statistics, the decorrelation loss and ACT inside a Hugging Face decoder.

Attention runs through transformers' ``AttentionInterface``. The loss and the largest activations ride along in the
norms that read the layers' outputs anyway. Nothing needs ``output_attentions`` or ``output_hidden_states``.

Where a layer is checkpointed its norms run again in the backward, so there the outputs are observed at the layers'
boundary, by forward hooks, and read once more, all layers together; likewise where a norm is not Llama's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashsink import _checks, functional, hf_masks, hf_models, reference, versions
from flashsink.backends import implementation
from flashsink.types import ActivationStats, Layout, SinkStats

# transformers takes every name with "flash" in it for a FlashAttention kernel to fetch
IMPLEMENTATION = "sink_capture"
_MARK = "_flashsink_probe"  # the attribute of an attached model's attention modules


@dataclass
class _Forward:
    """What one full forward has left behind."""

    layout: Layout
    spans: Tensor
    mask: Tensor  # the layout as every attention call gets it
    recorded: bool  # whether sinks and activations are
    trained: bool  # whether a backward may follow
    fused: bool  # whether the norms are to do their part
    behind: Tensor | None  # the first positions behind the spans that were set, one a row or packed sequence
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
        self._base, self._layers = hf_models.find_decoder(model)
        self._parameters = list(inspect.signature(self._base.forward).parameters)
        self._spans: Tensor | None = None
        self._current: _Forward | None = None
        self._states: dict[int, Tensor] = {}
        self._inside = False
        self._full = False
        self._count = -1
        self._calibration: _Calibration | None = None
        self._calm: dict[int, Tensor] = {}
        self._previous: str | None = None
        self._norms: set[int] = set()  # layers whose output is observed by the norm that reads it
        self._undo: list[Any] = []
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
        if len(forward.losses) < len(self._layers) - 1 or not forward.losses:
            raise RuntimeError("decorrelation_loss: the last forward did not end, or the model has one layer only")
        total = torch.stack([forward.losses[i].to(torch.float32) for i in sorted(forward.losses)]).mean()
        return total / reference.decorrelation_count(forward.spans).clamp(min=1)

    @property
    def decorrelation_count(self) -> Tensor:
        """int64 scalar: tokens that count in :attr:`decorrelation_loss`, for averages over batches."""
        return reference.decorrelation_count(self._last("decorrelation").spans)

    @property
    def sinks(self) -> list[SinkStats]:
        """Attention received in every layer, L records. With ACT: before its correction.

        Read it after the backward: on the triton backend ``received`` then costs nothing, before it a pass runs, and
        under activation checkpointing it is known only then. A compiled model runs the pass within its graph.
        """
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
        ``threshold``. They are found in every full forward and kept while decoding from its cache. The prompt is
        the span where :meth:`spans` sets one, so a text behind it is treated as while decoding; else it is all
        there is. ``beta`` = 1 finds the sinks (:attr:`calibrated_sinks`) and changes nothing.

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

    @property
    def calibrated_sinks(self) -> dict[int, Tensor]:
        """(B, H, S) bool of every layer with calibrated heads: the keys that ACT scaled in the last full forward."""
        return dict(self._calm)

    def detach(self) -> None:
        """Leaves the model as it was; the last forward stays readable."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for layer in self._layers:
            if getattr(layer.self_attn, _MARK, None) is self:
                delattr(layer.self_attn, _MARK)
        if self._previous is not None:
            self._base.set_attn_implementation(self._previous)
            self._previous = None

    # ---- how it works

    def _install(self) -> None:
        for layer in self._layers:
            if getattr(layer.self_attn, _MARK, None) is not None:
                raise ValueError("model: a probe is attached already; detach it first")
        devices = {str(p.device) for layer in self._layers for p in layer.parameters()}
        if len(devices) > 1:
            raise ValueError(f"model: expected all layers on one device, got {', '.join(sorted(devices))}")
        for index, layer in enumerate(self._layers):
            setattr(layer.self_attn, _MARK, self)
            self._undo.append(layer.register_forward_hook(functools.partial(self._observe_layer, index)).remove)
        if self._options["decorrelation"] or self._options["activations"]:
            self._take_norms()
        self._undo.append(self._base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(self._base.register_forward_hook(self._end, always_call=True).remove)
        if self._options["attention"]:
            _register()
            self._previous = self._base.config._attn_implementation
            self._base.set_attn_implementation(IMPLEMENTATION)

    def _take_norms(self) -> None:
        for index, norm in enumerate(hf_models.norms_of_outputs(self._base, self._layers)):
            eps = hf_models.epsilon(norm)
            if eps is not None:
                self._norms.add(index)
                forward = functools.partial(self._normalise, index, norm, eps, norm.forward)
                self._undo.append(hf_models.patch(norm, forward))

    def _last(self, option: str) -> _Forward:
        if not self._options[option]:
            raise RuntimeError(f"this probe was attached with {option}=False")
        if self._current is None:
            raise RuntimeError("the attached model has had no full forward yet")
        return self._current

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        inputs = given.get("inputs_embeds")
        if inputs is None:
            inputs = given.get("input_ids")
        if inputs is None:
            return None  # the model's own error is clearer
        rows, tokens = inputs.shape[:2]
        past = given.get("past_key_values")
        self._full = past is None or int(past.get_seq_length()) == 0
        self._inside = True
        self._states.clear()
        if not self._full:
            return None
        layout = self._resolve(given.get("attention_mask"), given.get("position_ids"), rows, tokens, inputs.device)
        spans = layout.lengths if self._spans is None else self._spans.to(inputs.device)
        spans = _checks.check_spans(spans, layout, self._options["validate"])
        self._calm.clear()
        every = int(self._options["stats_every"])
        self._count = (self._count + 1) % every
        first = layout.starts + spans if self._options["queries"] == "after_span" else None
        self._current = _Forward(
            layout,
            spans,
            hf_masks.encode(layout, tokens, first),
            recorded=self._count == 0,
            trained=torch.is_grad_enabled(),
            fused=not any(module.training and getattr(x, "gradient_checkpointing", False) for x in self._layers),
            behind=None if self._spans is None else layout.starts + spans,
        )
        if not self._options["attention"]:
            return None
        _check_window(getattr(self._base.config, "sliding_window", None), tokens)
        if "attention_mask" in kwargs or len(args) <= self._parameters.index("attention_mask"):
            return args, {**kwargs, "attention_mask": self._current.mask}
        place = self._parameters.index("attention_mask")
        return (*args[:place], self._current.mask, *args[place + 1 :]), kwargs

    def _resolve(self, mask: Any, positions: Any, rows: int, tokens: int, device: torch.device) -> Layout:
        if isinstance(mask, dict):  # generate makes one mask for every kind of layer
            mask = next(iter(mask.values()))
        if hf_masks.is_encoded(mask):
            return hf_masks.decode(mask, rows, tokens, device)[0]
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
        if output is not None and self._current is not None and self._states:
            layers = list(self._states.values())
            run = implementation(None, layers[0].device.type)
            sums = run.decorrelation_sums(layers, self._current.spans, self._current.layout, self._options["margin"])
            self._current.losses.update(zip(self._states, sums.unbind(), strict=True))
        self._states.clear()
        self._inside = False

    def _observe_layer(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """The output of a layer whose norm does not observe it."""
        forward, options = self._current, self._options
        if not self._inside or not self._full or forward is None or (forward.fused and index in self._norms):
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if options["decorrelation"] and index < len(self._layers) - 1:
            self._states[index] = hidden
        if options["activations"] and forward.recorded:
            run = implementation(None, hidden.device.type)
            forward.activations[index] = run.activation_stats([hidden], forward.layout, options["median"])

    def _normalise(self, index: int, norm: Any, eps: float, plain: Any, hidden: Tensor) -> Tensor:
        """The norm that reads the output of layer ``index``, with the loss and the statistics in the same pass."""
        forward, options = self._current, self._options
        if forward is None or not forward.fused or hidden.shape[:2] != (forward.layout.rows, forward.layout.tokens):
            return plain(hidden)
        # outside a forward it is the backward of a checkpoint around it, which must see what the forward did
        live = self._inside and self._full
        if not live and not (forward.trained and torch.is_grad_enabled()):
            return plain(hidden)
        counts = options["decorrelation"] and index < len(self._layers) - 1
        if not counts and not (options["activations"] and forward.recorded):
            return plain(hidden)
        run = implementation(None, hidden.device.type)
        spans = forward.spans if counts else None
        normed = run.rms_norm(hidden, norm.weight, eps, forward.layout, spans, options["margin"])
        if live and normed.total is not None:
            forward.losses[index] = normed.total
        if live and options["activations"] and forward.recorded:
            median = reference.row_medians(hidden, forward.layout)[None] if options["median"] else None
            forward.activations[index] = ActivationStats(normed.max_abs[None], normed.feature[None], median)
        return normed.out

    def attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None
    ) -> Tensor:
        """One attention call of layer ``index``: out (B, H, Sq, D) in q's dtype."""
        forward = self._current
        if self._inside and self._full and forward is not None:
            layout, first = forward.layout, hf_masks.decode(forward.mask, k.shape[0], k.shape[2], k.device)[1]
            live = True
        else:  # a step of decoding; or the backward of a checkpointed layer, whose mask knows of its own forward
            layout, first = hf_masks.decode(mask, k.shape[0], k.shape[2], k.device)
            live = False
        _check_window(window, layout.tokens)
        k, v = k[:, :, : layout.tokens], v[:, :, : layout.tokens]
        again = not live and torch.is_grad_enabled() and q.shape[2] == layout.tokens
        record = forward is not None and forward.recorded and (live or again)
        calibrated = self._calibration is not None and index in self._calibration.heads
        counted: list[Tensor | None] = []
        if record:
            counted.append(None if self._options["queries"] == "all" else first)
        if calibrated and live and forward is not None:
            counted += [None] if forward.behind is None else [None, forward.behind]
        chosen = implementation(None, q.device.type, q)
        out, stats = chosen.attention(q, k, v, layout, causal=True, scale=scale, counted=counted)
        if record and live and forward is not None:
            forward.sinks[index] = stats[0]
            if not forward.fused:
                stats[0].wait_for_backward()
        if calibrated and live:
            self._calm[index] = self._choose(index, stats[record:], layout)
        sinks = self._calm.get(index)
        if self._calibration is None or not calibrated or sinks is None or self._calibration.beta == 1.0:
            return out
        if sinks.shape[0] != q.shape[0]:
            raise ValueError(f"calibrate: the prompt had {sinks.shape[0]} rows, this step has {q.shape[0]}")
        sinks = nn.functional.pad(sinks, (0, k.shape[2] - sinks.shape[2]))
        return chosen.calibrated_attention(q, k, v, sinks, layout, beta=self._calibration.beta, scale=scale)

    def _choose(self, index: int, stats: list[SinkStats], layout: Layout) -> Tensor:
        """(B, H, S) bool: the sinks of the calibrated heads, never BOS. ``stats`` counts all queries and, where the
        prompt is a span, those behind it: the difference is what the prompt's own give."""
        assert self._calibration is not None
        mean = stats[0].mean_received
        if len(stats) > 1:
            queries = (stats[0].queries - stats[1].queries).clamp(min=1)
            mean = (stats[0].received - stats[1].received) / queries.unsqueeze(1)
        heads = torch.zeros(mean.shape[1], dtype=torch.bool, device=mean.device)
        heads[self._calibration.heads[index]] = True
        sinks = mean > self._calibration.threshold
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
    versions.warn("transformers")
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


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    # without a mask function of the same name transformers passes no mask at all
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, hf_masks.make_mask)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if kwargs.get("dropout"):
        raise ValueError(f"attention_dropout: expected 0, got {kwargs['dropout']}")
    if kwargs.get("softcap") is not None:
        raise ValueError(f"softcap: expected None, got {kwargs['softcap']}")
    if kwargs.get("s_aux") is not None:
        raise ValueError("s_aux: models with learned sink logits (GPT-OSS) are not supported; use attention=False")
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotary embeddings leave them in float32
    scaling = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    probe = getattr(module, _MARK, None)
    if probe is not None:
        window = kwargs.get("sliding_window")
        out = probe.attend(int(module.layer_idx), q, k, v, attention_mask, scale, window)  # type: ignore[arg-type]
    else:
        layout, _ = hf_masks.decode(attention_mask, k.shape[0], k.shape[2], k.device)
        _check_window(kwargs.get("sliding_window"), layout.tokens)
        k, v = k[:, :, : layout.tokens], v[:, :, : layout.tokens]
        out = implementation(None, q.device.type, q).attention(q, k, v, layout, causal=True, scale=scale)[0]
    return out.transpose(1, 2).contiguous(), None


def _check_window(window: int | None, tokens: int) -> None:
    if window and tokens > window:  # 0 is off as well as None
        raise ValueError(
            f"sliding_window: expected sequences of at most {window} tokens, got {tokens}; sliding-window "
            "attention is not supported"
        )
