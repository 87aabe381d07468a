"""What watches a forward: attention calls, and the layers' outputs.

The loss and the largest activations ride along in the norms that read the layers' outputs anyway. Where a layer is
checkpointed its norms run again in the backward, so there the outputs are read once more at the layers' boundary, all
layers together; likewise where no norm reads an output or it is not RMSNorm, and for a loss over other tokens and
anchors than lengths and BOS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashsink import reference
from flashsink.dispatch import implementation
from flashsink.hf import norms
from flashsink.hf.act import Calibrator
from flashsink.hf.attention import Call
from flashsink.hf.records import Forwards, Options, Record
from flashsink.types import ActivationStats, Layout, Pairs, Segments, SinkStats

# makes the layout known from what a layer gets or gives, (B, S, ...), and what attention sees
Settle = Callable[[Record, Tensor, Tensor | None], None]


class Place(NamedTuple):
    """What an attention module of an attached model carries."""

    observer: AttentionObserver
    layer: int


class AttentionObserver:
    """Runs the attention calls of an attached model's layers and records their sinks."""

    def __init__(self, forwards: Forwards, options: Options, act: Calibrator, settle: Settle) -> None:
        self.forwards, self._options, self._act, self._settle = forwards, options, act, settle

    def attend(self, index: int, call: Call, record: Record | None) -> Tensor:
        """One attention call of layer ``index`` in the full forward of ``record``, or in a step of decoding: out
        (B, H, Sq, Dv) in q's dtype."""
        options, live = self._options, record is not None
        if record is not None:
            record.packs = record.packs and call.pattern is not None  # a model that packs has a mask for it
            self._settle(record, call.q.transpose(1, 2), None if call.pattern is None else call.pattern.mask)
            whole = call
            if call.layout.tokens == record.places[0].tokens:
                call = call._replace(layout=record.places[0].to(call.q.device))
        elif call.encoded and torch.is_grad_enabled():
            record = self.forwards.recalled()  # the backward of a checkpointed layer, whose mask knows of its forward
        recorded = record is not None and record.recorded and (live or call.encoded)
        counted: list[Tensor | None] = []
        if record is not None and recorded:
            first = call.query_starts if call.encoded else record.query_starts(options.queries)
            if first is not None and options.queries != "all":
                first = first + (call.layout.tokens - record.places[0].tokens)  # the queries are the last positions
            counted.append(None if options.queries == "all" else first)
        calibrated = self._act.concerns(index)
        groups = list(range(len(counted)))  # the entry of counted that each group of queries is
        if record is not None and live and calibrated:
            for first in self._act.counted(record):  # one that is counted already takes no second pass
                groups.append(next((i for i, own in enumerate(counted) if own is first), len(counted)))
                counted += [first] if groups[-1] == len(counted) else []
        segments = None
        if record is not None and recorded and live and call.layout.tokens == record.places[0].tokens:
            segments = self._segments(record, call.q.device)
        out, stats = call.run(options.backend, counted, segments)
        if call.sink_logits is not None and counted and not options.learned_sinks:
            with torch.no_grad():
                stats = call._replace(sink_logits=None).run(options.backend, counted, segments)[1]
        if record is not None and live and call.everything and not call.layout.full:
            out = whole.run(options.backend, [])[0]  # an encoder may read its padding later: it is computed too
        if record is not None and live:
            if not record.attended:
                out = record.poison(out)
            record.attended = True
            if calibrated:  # reads what the queries gave, which then does not wait for the backward
                calm = [stats[group] for group in groups[recorded:]]
                record.calm[index] = self._act.find(index, calm, call.layout)
            if recorded:
                self._once(record, index)
                record.sinks[index] = stats[0].of_first(record.places[0].tokens)
                if not record.fused:
                    stats[0].wait_for_backward()
        return self._act.apply(index, call, out, record, options.backend) if calibrated else out

    def _segments(self, record: Record, device: torch.device) -> Segments | None:
        kinds = record.kinds if self._options.segment_mass else None
        return None if kinds is None else kinds._replace(ids=kinds.ids.to(device))

    def calibrates(self, index: int) -> bool:
        return self._act.concerns(index)

    def note(self, index: int, a: Tensor) -> None:
        """The probabilities (B, H, Sq, Sk) of a call that the model's own code computed."""
        record = self.forwards.live
        if record is None:
            return
        a = a.detach()[..., : a.shape[2]]  # without the rest of a static cache
        seen = a.amax(dim=1, keepdim=True) > 0
        record.attended = True
        # a row in which everything is masked gives all keys the same, and says nothing of them
        blind = ((a.amax(dim=-1) - a.amin(dim=-1)) < 1e-7).all(dim=1)[:, None, :, None]
        self._settle(record, a.transpose(1, 2), seen & (~blind | blind.all()))
        layout = record.places[0].to(a.device)
        if not record.recorded or a.shape[2] != layout.tokens or a.shape[3] != layout.tokens:
            return
        self._once(record, index)
        first = record.query_starts(self._options.queries)
        keep = layout.offsets() >= 0
        if first is not None:
            position = torch.arange(layout.tokens, device=a.device)
            keep = keep & (position >= first.to(a.device)[layout.segments().clamp(min=0)])
        rows = keep[:, None, :, None]
        lse = torch.full(a.shape[:3], torch.nan, device=a.device)  # not part of what is seen
        queries, segments = (seen & rows).sum(dim=(1, 2)), self._segments(record, a.device)
        more = None if segments is None else reference.by_segment(a.float(), layout, segments, first)
        record.sinks[index] = SinkStats((a.float() * rows).sum(dim=2), queries, lse, more)

    def _once(self, record: Record, index: int) -> None:
        if index in record.sinks:
            raise ValueError(f"model: layer {index} calls attention more than once in a forward")


class Waiting(NamedTuple):
    """A layer's output that no norm has read yet."""

    layer: int
    states: Tensor


class OutputObserver:
    """Computes the loss and the largest activations of the layers' outputs."""

    def __init__(self, forwards: Forwards, options: Options, readers: list[nn.Module | None], settle: Settle) -> None:
        self._forwards, self._options, self._settle = forwards, options, settle
        self._readers = readers
        self._forms: dict[int, norms.Form | None] = {}  # norm -> how it computes, once that is known
        self._patched = False

    def install(self, layers: list[nn.Module]) -> list[Callable[[], None]]:
        """Returns the functions that undo it."""
        undo: list[Callable[[], None]] = []
        for index, layer in enumerate(layers):
            undo.append(layer.register_forward_hook(functools.partial(self._observe, index)).remove)
        for place, norm in enumerate(self._readers):
            if norm is None:
                continue
            plain: Any = norm.forward
            if not norms.undecided(norm):
                self._forms[place] = norms.form_of(norm, plain)
                if self._forms[place] is None:
                    continue
            undo.append(norms.patch(norm, functools.partial(self._normalize, place, norm, plain)))
            self._patched = True
        return undo

    def finish(self, record: Record) -> None:
        """The end of the forward: what no norm has read is read."""
        self._flush(record)
        mine = self._forwards.mine
        states, mine.states = mine.states, {}
        if states:
            layers = list(states.values())
            if record.pairs is not None:
                for index, own in states.items():
                    pairs = _of_layer(record.pairs, index, own)
                    record.losses[index] = reference.pair_sums([own], pairs, self._options.margin)[0]
                return
            layout, spans = record.places
            if any(own.device != layers[0].device for own in layers):  # layers on several devices: each on its own
                for index, own in states.items():
                    record.losses[index] = self._sums([own], layout, spans)[0]
                return
            record.losses.update(zip(states, self._sums(layers, layout, spans).unbind(), strict=True))

    def _sums(self, layers: list[Tensor], layout: Layout, spans: Tensor) -> Tensor:
        device = layers[0].device
        run = implementation(self._options.backend, device.type, layers[0], family="loss")
        return run.decorrelation_sums(layers, spans.to(device), layout.to(device), self._options.margin)

    def _observe(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """A layer's output."""
        record, mine = self._forwards.live, self._forwards.mine
        if record is None:
            return
        states = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(states, Tensor) or states.dim() != 3:
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"model: expected layers that give (B, S, C), got {got}")
        if index in record.ran:
            raise ValueError(f"model: layer {index} runs more than once in a forward")
        record.ran.add(index)
        self._settle(record, states, None)
        layout = record.places[0]
        if states.shape[:2] != (layout.rows, layout.tokens):
            expected = f"({layout.rows}, {layout.tokens}, C)"
            raise ValueError(f"model: expected states {expected} from layer {index}, got {tuple(states.shape)}")
        self._flush(record)
        if self._options.cosines and record.recorded and index < len(self._readers) - 1:
            with torch.no_grad():
                pairs = record.pairs or reference.pairs(layout, record.places[1], None)
                pairs = _of_layer(pairs, index, states)
                record.cosines[index] = reference.mean_squared_cosines(
                    states, pairs, None if pairs.states is None else pairs.states[0]
                )
        if record.fused and self._patched:
            mine.waiting = Waiting(index, states)
        else:
            self._take(record, index, states)

    def _counts(self, index: int) -> bool:
        return self._options.decorrelation and index < len(self._readers) - 1

    def _flush(self, record: Record) -> None:
        waiting, self._forwards.mine.waiting = self._forwards.mine.waiting, None
        if waiting is not None:
            self._take(record, waiting.layer, waiting.states)

    def _take(self, record: Record, index: int, states: Tensor) -> None:
        """An output that no norm reads: for the loss it waits for the others."""
        options = self._options
        if self._counts(index):
            self._forwards.mine.states[index] = states
        if options.activations and record.recorded:
            run = implementation(options.backend, states.device.type, states, family="activations")
            layout = record.places[0].to(states.device)
            record.activations[index] = run.activation_stats([states], layout, options.median)

    def _normalize(self, place: int, norm: nn.Module, plain: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The norm that reads a layer's output, with the loss and the statistics in the same pass."""
        options, mine, record = self._options, self._forwards.mine, self._forwards.live
        # outside a forward it is the backward of a checkpoint around it, which must see what the forward did
        live = record is not None
        if not live and not torch.is_grad_enabled():
            return plain(states)
        if record is None:
            record = self._forwards.recalled()
            if record is None or record.layout is None or not record.trained:
                return plain(states)
            index = record.read_by.get(place)
            if states.shape[:2] != (record.layout.rows, record.layout.tokens):
                return plain(states)
        else:
            index = mine.waiting.layer if mine.waiting is not None and _same(mine.waiting.states, states) else None
        if index is None or not self._known(place, norm, plain):
            return plain(states)
        form = self._forms[place]
        assert form is not None
        mine.waiting = None
        counts = self._counts(index)
        if counts and record.pairs is not None:  # which only a pass of its own knows
            counts = False
            if live:
                mine.states[index] = states
        if not counts and not (options.activations and record.recorded):
            return plain(states)
        layout, spans = record.places
        layout, device = layout.to(states.device), states.device
        run = implementation(options.backend, device.type, states, family="norm")
        normed = run.rms_norm(
            states, form.weight(norm), form.eps, layout, spans.to(device) if counts else None, options.margin
        )
        if live:
            record.read_by[place] = index
            if normed.total is not None:
                record.losses[index] = normed.total
            if options.activations and record.recorded:
                median = reference.row_medians(states, layout)[None] if options.median else None
                record.activations[index] = ActivationStats(normed.max_abs[None], normed.feature[None], median)
        return normed.out

    def _known(self, place: int, norm: nn.Module, plain: Callable[[Tensor], Tensor]) -> bool:
        if place not in self._forms and not torch.compiler.is_compiling():
            self._forms[place] = norms.form_of(norm, plain)
        return self._forms.get(place) is not None


def _of_layer(pairs: Pairs, index: int, states: Tensor) -> Pairs:
    """``pairs`` for the output of one layer, where it is."""
    if pairs.states is not None:
        if pairs.states.shape[2] != states.shape[2]:
            got = tuple(pairs.states.shape)
            raise ValueError(f"anchors: expected (L, C) or (L, n, C) of {states.shape[2]} features, got {got}")
        pairs = pairs._replace(states=pairs.states[index : index + 1])
    return pairs.to(states.device)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether these are one tensor, also where hooks such as ZeRO-3's have passed it through autograd on the way."""
    if a is b or torch.compiler.is_compiling():
        return a is b
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype and a.data_ptr() == b.data_ptr() != 0
