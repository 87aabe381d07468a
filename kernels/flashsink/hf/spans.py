"""Which tokens the decorrelation loss of an attached model counts, and against which anchors.

What a user sets is a :class:`Choice`. A forward makes it :class:`Given` when its token ids are known, and its layout
makes that lengths and pairs. Dimensions: B rows, S tokens, N sequences (N = B, or the packed ones of a single row),
L layers, C features.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashsink import checks, dispatch, reference
from flashsink.hf import models
from flashsink.types import Layout, Pairs, Segments

if TYPE_CHECKING:
    from flashsink.hf.records import Forwards

logger = logging.getLogger("flashsink")

Anchors = Tensor | int | str | Sequence[int | str]


@dataclass(frozen=True)
class Choice:
    """What was set.

    Attributes:
        spans: (N,) integers or (B, S) bool.
        anchors: (B, n) integers, (L, n, C) floating, or token ids.
        names: the segments among ``anchors``, which do not count as tokens.
        masks: (B, S) bool of every segment, for the statistics.
    """

    spans: Tensor | None = None
    anchors: Tensor | tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Given:
    """What one forward is to count.

    Attributes:
        spans: (N,) integers or (B, S) bool; None for all valid tokens.
        by_ids: whether ``spans`` comes from token ids, which padding may have too.
        anchors: (B, n) integers or (L, n, C) floating; None for BOS or with ``anchored``.
        anchored: (B, S) bool, the anchors by their token ids.
        masks: (B, S) bool of every segment.
    """

    spans: Tensor | None = None
    by_ids: bool = False
    anchors: Tensor | None = None
    anchored: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)

    def kinds(self, layout: Layout) -> Segments | None:
        """The segments of the tokens, None where there are none. A token of several is of the first.

        Raises:
            ValueError: more segments than statistics are kept of.
        """
        if not self.masks:
            return None
        if len(self.masks) > checks.MOST_SEGMENTS:
            raise ValueError(
                f"segments: expected at most {checks.MOST_SEGMENTS} for segment_mass, got {len(self.masks)}"
            )
        ids = torch.full((layout.rows, layout.tokens), -1, device=layout.starts.device)
        for number, mask in reversed(list(enumerate(self.masks.values()))):
            ids = ids.masked_fill(mask.to(ids.device), number)
        return Segments(ids.masked_fill(~layout.valid(), -1), len(self.masks))

    @property
    def names_anchors(self) -> bool:
        return self.anchors is not None or self.anchored is not None

    def settle(self, layout: Layout, layers: int, validate: bool) -> tuple[Tensor, Pairs | None]:
        """((N,) int64, the number of tokens up to the last that counts; the pairs, None where lengths and BOS say all).

        Raises:
            ValueError: it does not fit the forward's tokens.
        """
        device = layout.lengths.device
        for mask in self.masks.values():
            _fitting(mask, layout)
        spans, anchors = (None if x is None else x.to(device) for x in (self.spans, self.anchors))
        if spans is None:
            spans = layout.lengths
        elif self.by_ids:
            spans = _fitting(spans, layout)
        else:
            spans = checks.check_counted(spans, layout, validate)
        if self.anchored is not None:
            anchors = _places(_fitting(self.anchored.to(device), layout))
        else:
            anchors = checks.check_anchors(anchors, layout, layers, validate)
        if anchors is None and spans.dtype != torch.bool:
            return spans, None
        pairs = reference.pairs(layout, spans, anchors)
        if spans.dtype == torch.bool:
            ends = ((layout.offsets() + 1) * spans).flatten()
            index = layout.segments().clamp(min=0).flatten()
            spans = torch.zeros_like(layout.lengths).scatter_reduce(0, index, ends, "amax")
        return spans, pairs


def _fitting(mask: Tensor, layout: Layout) -> Tensor:
    if tuple(mask.shape) != (layout.rows, layout.tokens):
        raise ValueError(
            f"segments: expected input_ids or masks of the layers' ({layout.rows}, {layout.tokens}) tokens, got "
            f"{tuple(mask.shape)}"
        )
    return mask


def _places(mask: Tensor) -> Tensor:
    """(B, n) int64: the positions where ``mask`` (B, S) is, -1 after the last of a row."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    if not torch.compiler.is_compiling() and mask.numel():  # else of any number
        order = order[:, : max(int(mask.sum(dim=1).max()), 1)]
    return torch.where(mask.gather(1, order), order, -1)


class Selector:
    """The spans, segments and anchors of one attached model."""

    def __init__(
        self, forwards: Forwards, model: nn.Module, found: models.Found, anchors: Anchors | None, backend: str | None
    ) -> None:
        self._forwards, self._backend, self._layers = forwards, backend, len(found.layers)
        self._segments: dict[str, tuple[int, ...]] = {}
        self._kept = Choice()
        inner = found.decoder
        self._around = [
            own for own in model.modules() if own is not inner and any(part is inner for part in own.modules())
        ]
        self._hooks: list[Callable[[], None]] = []
        self._first = self._choice(None, anchors, "attach")

    @contextmanager
    def spans(
        self, spans: Tensor | None, anchors: Anchors | None, segments: Mapping[str, Tensor] | None
    ) -> Iterator[None]:
        mine = self._forwards.mine
        chosen = replace(self._choice(spans, anchors, "spans"), masks=checks.check_segment_masks(segments))
        before, mine.spans = mine.spans, chosen
        try:
            yield
        finally:
            mine.spans = before

    def segments(self, ids: Mapping[str, int | Sequence[int]] | None, anchors: Anchors | None) -> None:
        known = {} if ids is None else {name: _ids(name, own) for name, own in ids.items()}
        if ids is not None and not known:
            raise ValueError("segments: expected at least one name with its token ids, got none")
        if ids is None and anchors is not None:
            raise ValueError("anchors: expected none without segments; attach and spans take them too")
        before, self._segments = self._segments, known
        try:
            kept = self._choice(None, anchors, "segments")
            if known and not set(known) - set(kept.names):
                raise ValueError("segments: expected one that is no anchor, got anchors only")
        except ValueError:
            self._segments = before
            raise
        if known:
            dispatch.require_general(self._backend)
            self._watch()
        self._kept = kept

    def given(self, ids: Any) -> Given | None:
        """What a forward whose decoder gets ``ids`` is to count; None where nothing was set.

        Raises:
            ValueError: token ids are asked for, and the forward has none.
        """
        set_here = self._forwards.mine.spans or Choice()
        given = self._counted(set_here, ids)
        return given if set_here.masks is None else replace(given or Given(), masks=dict(set_here.masks))

    def _counted(self, set_here: Choice, ids: Any) -> Given | None:
        kept = self._kept
        chosen = next((own for own in (set_here, kept, self._first) if own.anchors is not None), Choice())
        by_ids = set_here.spans is None and bool(self._segments)
        anchors = chosen.anchors
        if set_here.spans is None and anchors is None and not by_ids:
            return None
        if isinstance(anchors, Tensor) and not by_ids:
            return Given(set_here.spans, anchors=anchors)
        if anchors is None and not by_ids:
            return Given(set_here.spans)
        if not isinstance(ids, Tensor):
            own = self._forwards.mine.ids
            ids = own[-1][1] if own else None
        if ids is None:
            raise ValueError("segments: expected a forward with input_ids, got one without (inputs_embeds alone)")
        masks = {name: _found(ids, own, name) for name, own in self._segments.items()}
        spans = set_here.spans
        if by_ids:
            counted = [mask for name, mask in masks.items() if name not in chosen.names]
            if not counted:
                raise ValueError("segments: expected one that is no anchor, got anchors only")
            spans = torch.stack(counted).any(dim=0)
        if isinstance(anchors, Tensor) or anchors is None:
            return Given(spans, by_ids, anchors, None, masks)
        return Given(spans, by_ids, None, _found(ids, anchors, "anchors"), masks)

    def detach(self) -> None:
        for undo in self._hooks:
            undo()
        self._hooks.clear()

    def _choice(self, spans: Tensor | None, anchors: Anchors | None, where: str) -> Choice:
        if anchors is not None or (isinstance(spans, Tensor) and spans.dtype == torch.bool):
            dispatch.require_general(self._backend)
        if anchors is None:
            return Choice(spans)
        if isinstance(anchors, Tensor) and anchors.dtype in checks.FLOATS:
            return Choice(spans, checks.check_constants(anchors, self._layers))
        if isinstance(anchors, Tensor):
            if where != "spans":
                raise ValueError(
                    f"anchors: expected token ids, or floating (L, C) or (L, n, C), in {where}, got positions"
                )
            return Choice(spans, anchors)
        own = [anchors] if isinstance(anchors, int | str) or not isinstance(anchors, Sequence) else list(anchors)
        names = tuple(part for part in own if isinstance(part, str))
        unknown = [name for name in names if name not in self._segments]
        if unknown:
            raise ValueError(f"anchors: expected names among segments {sorted(self._segments)}, got {unknown}")
        ids = _ids("anchors", [part for part in own if not isinstance(part, str)]) if len(names) < len(own) else ()
        ids += tuple(part for name in names for part in self._segments[name])
        if not ids:
            raise ValueError("anchors: expected at least one, got none")
        self._watch()
        return Choice(spans, ids, names)

    def _watch(self) -> None:
        """From now on keeps the input_ids of the modules around the decoder, which a composite model embeds itself."""
        for module in [] if self._hooks else self._around:
            names = list(inspect.signature(module.forward).parameters)
            before = functools.partial(self._enter, names)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True).remove)

    def _enter(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = self._forwards.mine.ids
        for depth, (inside, _) in enumerate(stack):
            if inside is module:  # an interrupt has left it before
                del stack[depth:]
                break
        ids = (dict(zip(names, args, strict=False)) | kwargs).get("input_ids")
        outer = stack[-1][1] if stack else None
        stack.append((module, ids if isinstance(ids, Tensor) else outer))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._forwards.mine.ids:
            self._forwards.mine.ids.pop()


def _ids(name: str, value: Any) -> tuple[int, ...]:
    own = [value] if isinstance(value, int) else value
    fits = isinstance(own, Sequence) and not isinstance(own, str) and len(own) > 0
    if not fits or any(not isinstance(part, int) or isinstance(part, bool) or part < 0 for part in own):
        raise ValueError(f"{name}: expected a token id or a list of them, got {value!r}")
    return tuple(own)


def _found(ids: Tensor, wanted: tuple[int, ...], name: str) -> Tensor:
    """(B, S) bool: the tokens that have one of these ids."""
    mask = (ids[..., None] == torch.tensor(wanted, device=ids.device)).any(dim=-1)
    if checks.check_values(ids.device) and not bool(mask.any()):
        _say_once(name, wanted)
    return mask


@functools.cache
def _say_once(name: str, wanted: tuple[int, ...]) -> None:
    logger.warning("segments: %s: a batch has none of the token ids %s, which then count nothing", name, wanted)


# ---- constant anchors


def bos_states(model: nn.Module, tokens: Any = None, *, module: str | None = None) -> Tensor:
    """The states of BOS in the base model, constant ``anchors`` of the decorrelation loss.

    Runs the decoder once, in eval mode and without PEFT's adapters, over the tokens alone; leaves the model as it was.
    With fixed anchors the loss cannot be satisfied by BOS and another token that swap roles.

    Args:
        model: as for :func:`flashsink.attach`, which comes after.
        tokens: a tokenizer, whose ``bos_token_id`` is taken; a token id; or a sequence of ids whose last token's states
            are returned. Default: ``bos_token_id`` of the model's config.
        module: as in :func:`flashsink.attach`.

    Returns:
        (L, C) float32 (float64 of a float64 model) without a graph: the outputs of the L decoder layers.

    Raises:
        ValueError: no BOS is known, ids outside the vocabulary, a decoder that takes no ``input_ids``, adapters that
            are merged into their weights, or flashsink is attached already.
    """
    found = models.find(model, module)
    decoder = found.decoder
    if getattr(decoder, models.PROBE, None) is not None:
        raise ValueError("model: expected one without flashsink attached; take its states before attach")
    if "input_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(f"model: expected a decoder that takes input_ids, got {type(decoder).__name__}")
    if tokens is None or hasattr(tokens, "bos_token_id"):
        tokens = getattr(decoder.config if tokens is None else tokens, "bos_token_id", None)
        if not isinstance(tokens, int):
            raise ValueError(f"tokens: expected one that has a bos_token_id, or token ids, got {tokens!r}")
    ids = _ids("tokens", tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    embeddings = decoder.get_input_embeddings()
    if max(ids) >= embeddings.num_embeddings:
        raise ValueError(f"tokens: expected ids below {embeddings.num_embeddings}, got {list(ids)}")
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        own = output[0] if isinstance(output, tuple | list) else output
        states.append(reference.wide(own[0, -1].detach()))

    hooks = [layer.register_forward_hook(keep) for layer in found.layers]
    try:
        with _base(model), torch.no_grad():
            decoder(input_ids=torch.tensor([ids], device=embeddings.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([own.to(states[0].device) for own in states])


@contextmanager
def _base(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode and without adapters."""
    modes = [(own, own.training) for own in model.modules()]
    learns = [(own, own.requires_grad) for own in model.parameters()]
    adapters: list[Any] = [own for own in model.modules() if isinstance(getattr(own, "disable_adapters", None), bool)]
    adapters = [own for own in adapters if not own.disable_adapters]
    if any(getattr(own, "merged", False) for own in adapters):
        raise ValueError("model: expected adapters apart from their weights, got merged ones; unmerge them first")
    try:
        model.eval()
        for own in adapters:
            own.enable_adapters(False)
        yield
    finally:
        for own in adapters:
            own.enable_adapters(True)
        for parameter, before in learns:  # which switching adapters changes
            parameter.requires_grad_(before)
        for module, training in modes:
            module.training = training
