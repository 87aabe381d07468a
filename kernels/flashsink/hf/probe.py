"""``attach``: sink statistics, the decorrelation loss and ACT inside a Hugging Face model.

Attention runs through transformers' ``AttentionInterface``, with the mask that the model itself wants. Nothing needs
``output_attentions`` or ``output_hidden_states``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashsink.hf import attention as hf_attention
from flashsink.hf import masks, models, own, report
from flashsink.hf.act import Calibrator
from flashsink.hf.nonfinite import Finiteness, FinitenessObserver
from flashsink.hf.observers import AttentionObserver, OutputObserver, Place
from flashsink.hf.records import Forwards, Options, Record, in_backward
from flashsink.hf.spans import Anchors, Selector
from flashsink.types import ActivationStats, SinkStats


class Probe:
    """The observer of one model; made by :func:`attach`.

    It describes the last full forward (no cached past); decode steps leave it untouched. Several threads may take
    turns with the model: each reads what its own last forward left, and one that begins a forward while another is
    inside one is refused. L layers, B rows, S tokens.
    """

    def __init__(
        self, model: nn.Module, options: Options, module: str | None = None, anchors: Anchors | None = None
    ) -> None:
        self._options = options
        self._found = models.find(model, module)
        self._parameters = list(inspect.signature(self._found.decoder.forward).parameters)
        self._forwards = Forwards()
        self._selector = Selector(self._forwards, model, self._found, anchors, options.backend)
        self._act = Calibrator(self._forwards, len(self._found.layers))
        settle = functools.partial(masks.settle, validate=options.validate)
        self._attention = AttentionObserver(self._forwards, options, self._act, settle)
        self._outputs = OutputObserver(self._forwards, options, self._found.readers, settle)
        self._finiteness = FinitenessObserver(self._forwards, settle)
        inner: list[Any] = [own for own in model.modules() if hasattr(own, "can_generate")]
        generates = any(own.can_generate() for own in inner) and "input_ids" in self._parameters
        self._generates = generates and module is None  # else it may be an encoder, without BOS
        # whether the model makes its masks from position ids
        self._packs = hasattr(sys.modules.get(type(self._found.decoder).__module__), "create_causal_mask")
        self._count = -1
        self._previous: list[str] = []  # the implementations that the configs named before
        self._configs: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A saved model may be loaded by a process that has attached nothing yet."""
        hf_attention.register()
        self.__dict__.update(state)
        for config, previous in zip(self._configs, self._previous, strict=True):
            masks.hold(config, previous)

    # ---- what a user reads

    @property
    def computes_decorrelation(self) -> bool:
        """Whether the probe was attached with ``decorrelation=True``."""
        return self._options.decorrelation

    @property
    def fused(self) -> list[int]:
        """The layers whose output the last full forward observed in the norm that reads it; the others are read once
        more, and for a loss over a token mask or anchors all are."""
        return sorted(self._last(None).read_by.values())

    def spans(
        self,
        spans: Tensor | None = None,
        anchors: Anchors | None = None,
        segments: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Inside, the forwards of this thread count these tokens in the loss, against these anchors.

        Args:
            spans: (B,) or packed (N,) integers, the number of leading prompt tokens of every row; or a mask (B, S) bool
                of the tokens that count, none of them padding. Default: what :meth:`segments` says, else every valid
                token. What comes after the last of them is after the span, for ACT and ``queries="after_span"``.
            anchors: (B, n) integers, positions 0..S-1 in the row (packed (1, n), each for its own sequence), -1 for
                none; (L, C) or (L, n, C) floating, constants of the L layers; or token ids and names of segments, one
                or a list. Default: those of :meth:`segments`, else of :func:`attach`, else BOS.
                :func:`flashsink.decorrelation_loss` says what is then counted.
            segments: (B, S) bool of every segment by its name, for :attr:`segment_masks` and ``segment_mass``; a token
                of several is of the first. Default: those of :meth:`segments`.
        """
        return self._selector.spans(spans, anchors, segments)

    def segments(self, ids: Mapping[str, int | Sequence[int]] | None, anchors: Anchors | None = None) -> None:
        """Counts tokens by their ids, from the next forward on and in all threads; None switches it off.

        It stays, as the ids of a model do; :meth:`spans` inside says otherwise. The ids are those that the decoder, or
        the model around it, gets as ``input_ids``: a forward without raises ValueError. A row that has none of them
        counts nothing, nor does one without an anchor; a batch without is logged once. Padding never counts.

        Args:
            ids: the token id, or list of ids, of every segment, such as ``{"audio": 151646, "prompt": [5, 7]}``.
            anchors: as in :meth:`spans`, but no positions. A segment that is named here is anchor alone: its own tokens
                do not count.

        Raises:
            ValueError: no ids, an unknown name, or no segment but anchors.
        """
        self._selector.segments(ids, anchors)

    @property
    def segment_masks(self) -> dict[str, Tensor]:
        """(B, S) bool of every segment in the last full forward, in the order in which :attr:`sinks` number them; empty
        where none were asked for."""
        return self._last(None).segment_masks

    @property
    def decorrelation_loss(self) -> Tensor:
        """float32 scalar of the last full forward, with its graph: add lambda x it to the loss.

        Layers 1..L-1 count; exactly 0 (with zero gradient) when no token does.
        """
        return self._last("decorrelation").loss(self._generates)

    @property
    def decorrelation_count(self) -> Tensor:
        """int64 scalar: what :attr:`decorrelation_loss` is a mean over, for averages over batches: its tokens, or with
        several anchors the pairs of a token and an anchor."""
        return self._last("decorrelation").count

    @property
    def cosines(self) -> Tensor:
        """(L-1, B, S) float32 without a graph, with ``attach(..., cosines=True)``: cos^2 of every valid token with its
        anchors in the outputs of layers 1..L-1, the mean over its anchors; exactly 0 at padding. An anchor has 1 with
        itself."""
        return self._last("cosines").stacked_cosines(self._generates)

    @property
    def sinks(self) -> list[SinkStats]:
        """Attention received in every layer, L records. With ACT: before its correction.

        Read it after the backward: on the triton backend ``received`` then costs nothing, before it a pass runs, and
        under activation checkpointing it is known only then. A compiled model runs the pass within its graph.
        """
        record = self._last("attention")
        record.check()
        if not record.recorded:
            raise RuntimeError("sinks: the last forward was skipped by stats_every")
        without = [i for i in range(len(self._found.layers)) if i not in record.sinks]
        if without:
            raise RuntimeError(
                f"sinks: layers {without} have no softmax attention that runs through flashsink; sinks_by_layer has "
                "those of the others"
            )
        return [record.sinks[i] for i in range(len(self._found.layers))]

    @property
    def sinks_by_layer(self) -> dict[int, SinkStats]:
        """:attr:`sinks` of the layers that have softmax attention, where others (state-space, linear) have none."""
        record = self._last("attention")
        record.check()
        return dict(sorted(record.sinks.items()))

    @property
    def activations(self) -> ActivationStats:
        """Of the decoder layers' outputs: ``max_abs`` and ``feature`` (L, B, S); ``median`` (L, B) on request."""
        record = self._last("activations")
        record.check()
        if not record.recorded:
            raise RuntimeError("activations: the last forward was skipped by stats_every")
        without = [i for i in range(len(self._found.layers)) if i not in record.activations]
        if without:
            raise RuntimeError(f"activations: layers {without} did not run in the last forward")
        parts = [record.activations[i] for i in range(len(self._found.layers))]
        device = parts[0].max_abs.device  # layers on several devices come together here
        medians = [part.median.to(device) for part in parts if part.median is not None]
        return ActivationStats(
            torch.cat([part.max_abs.to(device) for part in parts]),
            torch.cat([part.feature.to(device) for part in parts]),
            torch.cat(medians) if medians else None,
        )

    def report(self, eps: float = report.EPS, min_queries: int = report.MIN_QUERIES) -> list[dict[str, Any]]:
        """The tokens that stand out in the last full forward, ready for JSON, sorted by layer, row and token: in every
        layer BOS, every sink (in any head, by :meth:`SinkStats.sink_rate`), and of every row or packed sequence the
        largest activation and the largest other than BOS's.

        Returns:
            One dict for each: ``layer``, ``row``, ``token`` (from 0, padding counted), ``kind`` ("BOS" or "token"),
            ``sink_rate``, ``mean_received`` (over heads), ``max_abs`` and ``feature`` of the largest activation,
            ``ratio`` of it to the median, ``cos2`` to the anchors. None: not recorded, or not a finite number.
        """
        return report.tokens(report.seen(self, self._options, self._last(None)), eps, min_queries)

    def plot(self, path: str | Path | None = None, *, row: int = 0) -> Any:
        """A ``matplotlib.figure.Figure`` of one row: received attention and largest activation by layer (down) and
        token (across), the strongest tokens named above. Saved as ``path``, .png or .svg.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another kind of file, or no such row.
        """
        return report.picture(report.seen(self, self._options, self._last(None)), len(self._found.layers), row, path)

    @property
    def first_nonfinite(self) -> tuple[int, str, tuple[int, int], int, float] | None:
        """(layer, block, (row, token), feature, value) where inf or NaN first appears in the last full forward, in the
        order in which it runs; None where all is finite. ``block`` is a submodule of the layer ("mlp.down_proj", or
        "self_attn" where its own code makes it), "input" or "residual": its own sums. Padding does not count."""
        record = self._last("nonfinite")
        record.check()
        return record.finiteness.first(record.places[0])

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
            self._act.calibration = None
            return
        if not self._options.attention:
            raise ValueError("heads: calibration needs attach(..., attention=True)")
        self._act.choose_heads(heads, self._found.decoder.config.num_attention_heads, beta, threshold)

    @property
    def calibrated_sinks(self) -> dict[int, Tensor]:
        """(B, H, S) bool of every layer with calibrated heads: the keys that ACT scaled in the last full forward."""
        record = self._forwards.mine.current
        return dict(record.calm) if record is not None and record.calibration is self._act.calibration else {}

    def detach(self) -> None:
        """Leaves the model as it was; the last forward stays readable."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._selector.detach()
        if getattr(self._found.decoder, models.PROBE, None) is self:
            delattr(self._found.decoder, models.PROBE)
            for modules in self._found.attentions:
                for module in modules:
                    delattr(module, hf_attention.MARK)
        for config in self._configs:
            previous = masks.let_go(config)
            if previous and config._attn_implementation == hf_attention.IMPLEMENTATION:  # else it was changed since
                config._attn_implementation_internal = previous
        self._configs, self._previous = [], []

    # ---- how it works

    def _install(self) -> None:
        found, options = self._found, self._options
        if getattr(found.decoder, models.PROBE, None) is not None:
            raise ValueError("model: a probe is attached already; detach it first")
        setattr(found.decoder, models.PROBE, self)
        for index, modules in enumerate(found.attentions):
            for module in modules:
                setattr(module, hf_attention.MARK, Place(self._attention, index))
        if options.decorrelation or options.activations or options.cosines:
            self._undo += self._outputs.install(found.layers)
        self._undo += self._finiteness.install(found.layers) if options.nonfinite else []
        self._undo.append(found.decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._undo.append(found.decoder.register_forward_hook(self._end, always_call=True).remove)
        if options.attention and not own.uses_interface(found.attentions):
            self._undo += [undo for modules in found.attentions for undo in own.watch(modules)]
        elif options.attention:
            hf_attention.register()
            self._configs = found.configs
            for config in self._configs:  # not set_attn_implementation, which reaches towers with configs of their own
                masks.hold(config)
                self._previous.append(masks.before(config) or "")
                config._attn_implementation_internal = hf_attention.IMPLEMENTATION

    def _last(self, option: str | None) -> Record:
        if option and not getattr(self._options, option):
            raise RuntimeError(f"this probe was attached with {option}=False")
        record = self._forwards.mine.current
        if record is None:
            where = " in this thread, and what other threads have is theirs" if self._forwards.any_yet else " yet"
            raise RuntimeError(f"model: it has had no full forward{where} while attached")
        if not record.ended:
            raise RuntimeError("model: its last forward did not end")
        return record

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        past, mine = given.get("past_key_values"), self._forwards.mine
        if isinstance(past, tuple):
            past = None if not past else past[0]
        self._check_implementation()
        self._forwards.enter()
        decoder: Any = self._found.decoder
        inputs = given.get("inputs_embeds") if given.get("inputs_embeds") is not None else given.get("input_ids")
        mine.outer, mine.full = masks.here.asking, past is None or _is_empty(past, inputs)
        masks.here.asking = asking = masks.Asking(
            self._configs,
            self._options.attention and masks.floating(decoder, self._configs),
            None,
            self._options.queries,
            self._options.validate,
        )
        if not mine.full:
            return None
        origin = self._forwards.recalled() if in_backward() else None  # computed again, with no spans set
        if origin is None:
            self._count = (self._count + 1) % self._options.stats_every
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        # whether layers run again in the backward
        again = module.training and any(getattr(own, "gradient_checkpointing", False) for own in self._found.layers)
        record = Record(
            recorded=self._count == 0 if origin is None else origin.recorded,
            trained=torch.is_grad_enabled(),
            fused=not again,
            given=self._selector.given(given.get("input_ids")) if origin is None else origin.given,
            calibration=self._act.calibration,
            layers=len(self._found.layers),
            finiteness=Finiteness(),
            padding=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
            positions=positions if isinstance(positions, Tensor) else None,
            packs=self._packs,
            cached=past is not None or (not again and self._caches(given.get("use_cache"))),
        )
        self._forwards.keep(record)
        asking.record = record
        if not isinstance(inputs, Tensor):
            return None
        new = masks.of_call(mask, inputs.shape[0], inputs.shape[1], record, masks.here.asking)
        bounds = given.get("cu_seq_lens_q")
        if mask is None and bounds is not None and masks.packs_by_bounds(asking) and record.pack(bounds, inputs):
            # with a mask transformers does not look at the positions, which would wait for the device
            new = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        masks.here.made.clear()
        if new is mask:
            return None
        place = self._parameters.index("attention_mask")
        if "attention_mask" in kwargs or len(args) <= place:
            return args, {**kwargs, "attention_mask": new}
        return (*args[:place], new, *args[place + 1 :]), kwargs

    def _caches(self, asked: Any) -> bool:
        """Whether the decoder makes itself a cache, with which transformers packs no rows."""
        usual = getattr(self._found.decoder.config, "use_cache", False)
        return "past_key_values" in self._parameters and bool(usual if asked is None else asked)

    def _check_implementation(self) -> None:
        for config in self._configs:
            if config._attn_implementation != hf_attention.IMPLEMENTATION:
                raise ValueError(
                    f"model: its attention implementation became {config._attn_implementation!r} while attached; "
                    "detach the probe first, or attach with attention=False"
                )

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        # here and not in the hooks, which some releases of transformers run inside the checkpointed region
        mine = self._forwards.mine
        if not mine.inside:  # it was refused
            return
        masks.here.asking, mine.outer = mine.outer, None
        record = self._forwards.live
        try:
            if record is not None and output is not None:
                self._outputs.finish(record)
                record.ended = True
                calibration = record.calibration
                if calibration is not None and not calibration.heads.keys() <= record.calm.keys():
                    without = sorted(calibration.heads.keys() - record.calm.keys())
                    raise ValueError(
                        f"calibrate: layers {without} have no softmax attention that runs through flashsink"
                    )
        finally:
            self._forwards.leave()


def _is_empty(past: Any, inputs: Any) -> bool:
    """Whether a cache holds nothing yet. Static ones count on the device, so a single token there is a step of
    decoding: to ask would be to wait, in every step."""
    length = past.get_seq_length()
    if isinstance(length, Tensor) and isinstance(inputs, Tensor) and inputs.shape[1] == 1:
        return False
    return int(length) == 0
