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
from typing import Any

import torch
from torch import Tensor, nn

from flashsink import checks, functional, reference, versions
from flashsink.dispatch import implementation
from flashsink.hf import attention as hf_attention
from flashsink.hf import masks, models, records
from flashsink.types import ActivationStats, Layout, SinkStats


class Probe:
    """The observer of one model; made by :func:`attach`.

    It describes the last full forward (no cached past); decode steps leave it untouched. Several threads may take
    turns with the model: each reads what its own last forward left, and one that begins a forward while another is
    inside one is refused. L decoder layers, B rows, S tokens.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self._options = options
        self._base, self._layers = models.find_decoder(model)
        self._parameters = list(inspect.signature(self._base.forward).parameters)
        self._mine, self._shared = records.Mine(), records.Shared()
        self._count = -1
        self._calibration: records.Calibration | None = None
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
        of this thread inside. Without it every valid token counts."""
        before, self._mine.spans = self._mine.spans, spans
        try:
            yield
        finally:
            self._mine.spans = before

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
        if not forward.recorded:
            raise RuntimeError("sinks: the last forward was skipped by stats_every")
        without = [i for i in range(len(self._layers)) if i not in forward.sinks]
        if without:
            raise RuntimeError(f"sinks: layers {without} have no softmax attention that runs through flashsink")
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
        the span where :meth:`spans` sets one, so text after it is treated as in decoding; else it is all
        there is. ``beta`` = 1 finds the sinks (:attr:`calibrated_sinks`) and changes nothing.

        Raises:
            ValueError: a pair or a number out of range, or attention is not attached.
        """
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
        self._calibration = records.Calibration(chosen, beta, threshold)

    @property
    def calibrated_sinks(self) -> dict[int, Tensor]:
        """(B, H, S) bool of every layer with calibrated heads: the keys that ACT scaled in the last full forward."""
        forward = self._mine.current
        return dict(forward.calm) if forward is not None and forward.calibration is self._calibration else {}

    def detach(self) -> None:
        """Leaves the model as it was; the last forward stays readable."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for layer in self._layers:
            if getattr(layer.self_attn, hf_attention.MARK, None) is self:
                delattr(layer.self_attn, hf_attention.MARK)
        if self._previous is not None:
            self._base.set_attn_implementation(self._previous)
            self._previous = None

    # ---- how it works

    def _install(self) -> None:
        for layer in self._layers:
            if getattr(layer.self_attn, hf_attention.MARK, None) is not None:
                raise ValueError("model: a probe is attached already; detach it first")
        devices = {str(p.device) for layer in self._layers for p in layer.parameters()}
        if len(devices) > 1:
            raise ValueError(f"model: expected all layers on one device, got {', '.join(sorted(devices))}")
        if self._options["attention"]:
            hf_attention.check_config(self._base.config)
        for index, layer in enumerate(self._layers):
            setattr(layer.self_attn, hf_attention.MARK, self)
            self._undo.append(layer.register_forward_hook(functools.partial(self._observe_layer, index)).remove)
        if self._options["decorrelation"] or self._options["activations"]:
            self._take_norms()
        self._undo.append(self._base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(self._base.register_forward_hook(self._end, always_call=True).remove)
        if self._options["attention"]:
            hf_attention.register()
            self._previous = self._base.config._attn_implementation
            self._base.set_attn_implementation(hf_attention.IMPLEMENTATION)

    def _take_norms(self) -> None:
        for index, norm in enumerate(models.norms_of_outputs(self._base, self._layers)):
            eps = models.epsilon(norm)
            if eps is not None:
                self._norms.add(index)
                forward = functools.partial(self._normalise, index, norm, eps, norm.forward)
                self._undo.append(models.patch(norm, forward))

    def _last(self, option: str) -> records.Record:
        if not self._options[option]:
            raise RuntimeError(f"this probe was attached with {option}=False")
        if self._mine.current is None:
            where = " in this thread, and what other threads have is theirs" if self._shared.latest else " yet"
            raise RuntimeError(f"the attached model has had no full forward{where}")
        return self._mine.current

    def _enter(self) -> None:
        mine = self._mine
        if not mine.inside:  # else an interrupt has left the forward before
            # nothing of a compiled forward is seen by other threads before its end, and then only what is its own
            if not torch.compiler.is_compiling():
                if not self._shared.lock.acquire(blocking=False):
                    raise RuntimeError(
                        "model: another thread is inside a forward of this attached model; expected one at a time, "
                        "or a copy of the model for every thread"
                    )
                mine.locked = True
            mine.outer, mine.inside = masks.here.forward, True
        masks.here.forward = None
        mine.states = {}

    def _recalled(self) -> records.Record | None:
        """The forward whose layers are recomputed: the last one, whatever thread autograd does it in."""
        if not self._shared.mixed:
            return self._shared.latest
        if self._mine.current is None:
            raise RuntimeError(
                "model: a thread of autograd recomputes its layers and cannot tell for which forward, since several "
                "threads have trained it; expected one, or a copy of the model for every thread"
            )
        return self._mine.current

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        inputs = given.get("inputs_embeds")
        if inputs is None:
            inputs = given.get("input_ids")
        if inputs is None:
            return None  # the model's own error is clearer
        rows, tokens = inputs.shape[:2]
        past = given.get("past_key_values")
        mine = self._mine
        self._enter()
        mine.full = past is None or int(past.get_seq_length()) == 0
        if not mine.full:
            return None
        layout = self._resolve(given.get("attention_mask"), given.get("position_ids"), rows, tokens, inputs.device)
        origin = self._recalled() if _in_backward() else None  # computed again, and whoever runs it has no spans set
        given_spans = mine.spans if origin is None else origin.given
        spans = layout.lengths if given_spans is None else given_spans.to(inputs.device)
        spans = checks.check_spans(spans, layout, self._options["validate"])
        if origin is None:
            self._count = (self._count + 1) % int(self._options["stats_every"])
        first = layout.starts + spans if self._options["queries"] == "after_span" else None
        current = records.Record(
            layout,
            spans,
            masks.encode(layout, tokens, first),
            recorded=self._count == 0 if origin is None else origin.recorded,
            trained=torch.is_grad_enabled(),
            fused=not any(module.training and getattr(x, "gradient_checkpointing", False) for x in self._layers),
            given=given_spans,
            span_ends=None if given_spans is None else layout.starts + spans,
            calibration=self._calibration,
        )
        self._keep(current)
        if not self._options["attention"]:
            return None
        masks.here.forward = masks.Forward(self._base.config, layout, current.mask)
        mask = given.get("attention_mask")
        # what was made before this forward does not know its spans, which a recomputed layer must
        if isinstance(mask, dict):
            mask = {kind: current.mask if masks.is_encoded(own) else own for kind, own in mask.items()}
        elif masks.is_encoded(mask):
            mask = current.mask
        else:
            return None
        place = self._parameters.index("attention_mask")
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": mask}
        return (*args[:place], mask, *args[place + 1 :]), kwargs

    def _keep(self, record: records.Record) -> None:
        mine, shared, last = self._mine, self._shared, self._shared.latest
        if _in_backward():
            mine.before, mine.again = mine.current, True
        else:
            shared.mixed = shared.mixed or _of_another(last, mine.current, record)
            shared.latest = record
        mine.current = record

    def _resolve(self, mask: Any, positions: Any, rows: int, tokens: int, device: torch.device) -> Layout:
        if isinstance(mask, dict):  # generate and multimodal models make one mask for every kind of layer
            mask = next((own for own in mask.values() if masks.is_encoded(own)), next(iter(mask.values())))
        if isinstance(mask, Tensor) and mask.dim() == 4 and self._options["attention"]:
            masks.check(mask)
        if masks.is_encoded(mask):
            return masks.decode(mask, rows, tokens, device)[0]
        if isinstance(mask, Tensor) and mask.dim() == 4 and not self._options["attention"]:
            return masks.layout_of_pattern(mask, rows, tokens, self._options["validate"])
        if mask is None:
            packed = masks.layout_of_positions(positions, rows, tokens)
            if packed is not None:
                return packed
        elif not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask: expected a padding mask or None, got {type(mask).__name__}")
        return masks.layout_of_mask(mask, rows, tokens, device, self._options["validate"])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # here and not in the hooks, which some releases of transformers run inside the checkpointed region
        mine = self._mine
        if not mine.inside:  # it was refused
            return
        states, mine.states, mine.inside = mine.states, {}, False
        masks.here.forward, mine.outer = mine.outer, None
        if mine.locked:
            mine.locked = False
            self._shared.lock.release()
        forward = mine.current
        if mine.again:
            mine.current, mine.before, mine.again = mine.before, None, False
        if output is None or forward is None:
            return
        calibration = forward.calibration if mine.full else None
        if calibration is not None and not calibration.heads.keys() <= forward.calm.keys():
            without = sorted(calibration.heads.keys() - forward.calm.keys())
            raise ValueError(f"calibrate: layers {without} have no softmax attention that runs through flashsink")
        if states:
            layers = list(states.values())
            run = implementation(None, layers[0].device.type)
            sums = run.decorrelation_sums(layers, forward.spans, forward.layout, self._options["margin"])
            forward.losses.update(zip(states, sums.unbind(), strict=True))

    def _observe_layer(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """The output of a layer whose norm does not observe it."""
        mine, options = self._mine, self._options
        forward = mine.current
        if not mine.inside or not mine.full or forward is None or (forward.fused and index in self._norms):
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.dim() != 3:
            raise ValueError(f"model: expected decoder layers that give (B, S, C), got {tuple(hidden.shape)}")
        if options["decorrelation"] and index < len(self._layers) - 1:
            mine.states[index] = hidden
        if options["activations"] and forward.recorded:
            run = implementation(None, hidden.device.type)
            forward.activations[index] = run.activation_stats([hidden], forward.layout, options["median"])

    def _normalise(self, index: int, norm: Any, eps: float, plain: Any, hidden: Tensor) -> Tensor:
        """The norm that reads the output of layer ``index``, with the loss and the statistics in the same pass."""
        options = self._options
        # outside a forward it is the backward of a checkpoint around it, which must see what the forward did
        live = self._mine.inside and self._mine.full
        if not live and not torch.is_grad_enabled():
            return plain(hidden)
        forward = self._mine.current if live else self._recalled()
        if forward is None or not forward.fused or hidden.shape[:2] != (forward.layout.rows, forward.layout.tokens):
            return plain(hidden)
        if not live and not forward.trained:
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
        forward = self._mine.current
        masks.check(mask)
        if self._mine.inside and self._mine.full and forward is not None:
            layout, first = forward.layout, masks.decode(forward.mask, k.shape[0], k.shape[2], k.device)[1]
            live, again = True, False
        else:  # a step of decoding; or the backward of a checkpointed layer, whose mask knows of its own forward
            layout, first = masks.decode(mask, k.shape[0], k.shape[2], k.device)
            live, again = False, torch.is_grad_enabled() and q.shape[2] == layout.tokens
            forward = self._recalled() if again else forward
        hf_attention.check_window(window, layout.tokens)
        k, v = k[:, :, : layout.tokens], v[:, :, : layout.tokens]
        record = forward is not None and forward.recorded and (live or again)
        calibrated = self._calibration is not None and index in self._calibration.heads
        counted: list[Tensor | None] = []
        if record:
            counted.append(None if self._options["queries"] == "all" else first)
        if calibrated and live and forward is not None:
            counted += [None] if forward.span_ends is None else [None, forward.span_ends]
        chosen = implementation(None, q.device.type, q)
        out, stats = chosen.attention(q, k, v, layout, causal=True, scale=scale, counted=counted)
        if record and live and forward is not None:
            forward.sinks[index] = stats[0]
            if not forward.fused:
                stats[0].wait_for_backward()
        if calibrated and live and forward is not None:
            forward.calm[index] = self._choose(index, stats[record:], layout)
        if self._calibration is None or not calibrated or self._calibration.beta == 1.0:
            return out
        if forward is None and self._shared.latest is not None:
            raise RuntimeError("calibrate: the prompt ran in another thread, which knows its sinks")
        if forward is None or forward.calibration is not self._calibration or index not in forward.calm:
            return out  # switched on after the prompt
        sinks = forward.calm[index]
        if sinks.shape[0] != q.shape[0]:
            raise ValueError(f"calibrate: the prompt had {sinks.shape[0]} rows, this step has {q.shape[0]}")
        sinks = nn.functional.pad(sinks, (0, k.shape[2] - sinks.shape[2]))
        return chosen.calibrated_attention(q, k, v, sinks, layout, beta=self._calibration.beta, scale=scale)

    def _choose(self, index: int, stats: list[SinkStats], layout: Layout) -> Tensor:
        """(B, H, S) bool: the sinks of the calibrated heads, never BOS. ``stats`` counts all queries and, where the
        prompt is a span, those after it: the difference is what the prompt's own give."""
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

    The model gives the logits that it gives without, or a forward raises ``ValueError`` with the reason: attention that
    is not causal, windows and chunks shorter than the sequence, images or prefixes whose tokens see each other, learned
    sinks and other terms in the softmax. Packed sequences (``position_ids`` that restart in a single row) want
    ``use_cache=False``, without which transformers does not keep them apart. One thread at a time may be inside a
    forward; each reads what its own last one left.

    Args:
        model: its decoder has ``layers`` with ``self_attn`` and runs attention through ``AttentionInterface``.
        attention: run attention through flashsink and record :attr:`Probe.sinks`.
        decorrelation: compute :attr:`Probe.decorrelation_loss` in every full forward.
        activations: record :attr:`Probe.activations`.
        margin: of the decorrelation loss.
        stats_every: record sinks and activations in every n-th full forward only.
        median: also record the median of |h| of every row and layer.
        queries: "all", or "after_span": sinks count only the queries after the span (the text tokens).
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


def _of_another(last: records.Record | None, own: records.Record | None, record: records.Record) -> bool:
    """Whether a backward of ``last``, another thread's forward, may be to come beside that of ``record``."""
    return last is not None and last is not own and last.trained and record.trained


def _in_backward() -> bool:
    """Whether this is computed again for a checkpoint; a compiler computes nothing now."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
