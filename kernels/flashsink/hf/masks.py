"""What a model's own mask says, for flashsink's attention: through Hugging Face's mask interface.

Transformers asks a mask function once a forward for every kind of mask that the model wants, and hands its result to
every attention call. Where the mask is no more than causal attention over padded or packed rows, in a window or chunks
or not, it becomes numbers (:mod:`flashsink.hf.encoded`); any other mask stays what the model's own functions make of
it, (B, 1, Sq, Sk) bool.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashsink import reference
from flashsink.checks import check_values
from flashsink.hf import layouts, mask_functions
from flashsink.hf.encoded import decode, encode, is_encoded, pattern_of
from flashsink.hf.layouts import Doubts
from flashsink.hf.records import Record
from flashsink.types import Layout, Pattern

# model types whose layers read the mask before attention does: they get it as the model makes it
_READ_BY_LAYERS = ("deepseek_v4", "doge", "hy_v4", "nllb-moe", "qwen4_exp", "t5gemma2")
# and those without torch's attention, for softcap or sink logits, of which attention alone reads the mask
_READ_BY_ATTENTION = ("gemma2", "gpt_oss", "vaultgemma")
_RESTART = "position_ids: a compiled model cannot see that they restart; expected one sequence a row"


@dataclass
class Asking:
    """Who asks for masks: the attached decoder that this thread runs.

    Attributes:
        configs: those of its modules.
        additive: the model knows floating masks only.
        record: of its full forward; None in a step of decoding.
        queries: of the options, as is validate.
    """

    configs: list[Any]
    additive: bool
    record: Record | None
    queries: str
    validate: bool


class Made(NamedTuple):
    """A mask that was made before its decoder was called."""

    mask: Tensor
    layout: Layout
    plain: bool  # no more than causal in the pattern
    pattern: Pattern | None
    doubts: Doubts


class _Here(threading.local):
    def __init__(self) -> None:
        self.asking: Asking | None = None
        self.made: deque[Made] = deque(maxlen=8)  # more than a forward has kinds of masks


here = _Here()


@dataclass
class Held:
    """A config of attached models, which may share it.

    Attributes:
        config: the config.
        implementation: that it named before.
        count: of the models.
    """

    config: weakref.ref[Any]
    implementation: str
    count: int = 1


_held: dict[int, Held] = {}  # by the config's id


def hold(config: Any, implementation: str | None = None) -> None:
    """Notes that a model with ``config`` is attached; ``implementation`` is what the config named before, if that is
    known already."""
    if id(config) in _held:
        _held[id(config)].count += 1
        return
    known = weakref.ref(config, functools.partial(lambda number, _: _held.pop(number, None), id(config)))
    _held[id(config)] = Held(known, implementation or config._attn_implementation)


def let_go(config: Any) -> str | None:
    """What the config named before, if no other attached model shares it."""
    held = _held.get(id(config))
    if held is None:
        return None
    held.count -= 1
    return _held.pop(id(config)).implementation if not held.count else None


def before(config: Any) -> str | None:
    """The implementation that an attached model's config named before; None where no model with it is attached."""
    held = _held.get(id(config))
    return None if held is None else held.implementation


def make_mask(**given: Any) -> Tensor | None:
    """Called by transformers, or a model's code through it, for every kind of mask that a forward needs; by generate
    and multimodal models before they call the decoder, which then get what they got before the model was attached."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    function, queries, keys = given["mask_function"], given["q_length"], given["kv_length"]
    asking, config = here.asking, given.get("config")
    if asking is None or not _among(config, asking.configs):
        make = eager_mask if before(config) == "eager" else sdpa_mask
        mask: Tensor | None = make(**given)
        if _held and isinstance(mask, Tensor) and mask.dim() == 4 and _at_start(given):
            doubts: Doubts = []
            with contextlib.suppress(ValueError):  # a decoder that is attached reads the mask itself then
                here.made.append(Made(mask, *_layout(given, False, doubts, None), doubts))
        return mask
    make = eager_mask if asking.additive else sdpa_mask  # never left out
    whole = functools.partial(make, **given | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    everything = mask_functions.sees_all(function)
    if asking.record is None or not _at_start(given) or (everything and queries != keys):
        return whole()  # a step of decoding, or cross-attention
    layout, plain, pattern = _layout(given, asking.validate, asking.record.doubts, asking.record)
    if asking.record.bounds is not None and (not plain or everything or _read_by_layers(given)):
        raise ValueError("cu_seq_lens_q: expected a model that wants no more than causal masks and windows")
    asking.record.settle(layout, asking.validate)
    asking.record.anchored = asking.record.anchored and not everything
    if asking.additive or everything or _read_by_layers(given):
        return whole()  # what an encoder's padding sees is left, since it may be read later
    first = asking.record.query_starts(asking.queries)
    if plain:
        return encode(layout, first, pattern)
    mask, valid = whole(), layout.valid()[:, None, :, None]  # what a padded query sees does not matter
    if check_values(mask.device, asking.validate):
        equal = reference.visible(layout, queries, True) == mask[..., :queries]
        if bool((equal | ~valid).all()):  # as a window longer than the rows, and images where there are none
            return encode(layout, first)
    return mask & valid


def _among(config: Any, configs: list[Any]) -> bool:
    for own in configs:  # noqa: SIM110 - dynamo cannot trace a generator here
        if config is own:
            return True
    return False


def _layout(
    given: dict[str, Any], validate: bool, doubts: Doubts, record: Record | None
) -> tuple[Layout, bool, Pattern | None]:
    """(the rows' layout, whether the mask is no more than causal in the pattern, a window or chunk or None) of a mask
    that is asked for.

    Raises:
        ValueError: the mask has holes, or there are several rows of packed sequences.
    """
    from transformers.masking_utils import causal_mask_function

    rows, queries, said = given["batch_size"], given["q_length"], mask_functions.read(given)
    if record is not None and record.bounds is not None:
        return layouts.of_bounds(*record.bounds, queries, validate, record.doubts), said.plain, said.pattern
    if said.plain and given["mask_function"] is not causal_mask_function and record is not None:
        _doubt_positions(record)
    sequence = said.sequence
    if sequence is not None and bool((sequence != sequence[:, :1]).any()):
        if rows != 1:
            raise ValueError(f"position_ids: expected packed sequences in a single row, got {rows} rows")
        return layouts.packed(sequence[0]), said.plain, said.pattern
    layout = layouts.of_mask(given["attention_mask"], rows, queries, given["device"], validate, doubts)
    if said.chunks_from is not None and said.pattern is not None:
        elsewhere = ((said.chunks_from.to(layout.starts.device) != layout.starts) & (layout.lengths > 0)).any()
        if not check_values(layout.starts.device, validate):
            doubts.append((elsewhere, "attention_mask: expected chunks that begin with the first valid token"))
        elif bool(elsewhere):
            return layout, False, None
    return layout, said.plain, said.pattern


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _read_by_layers(given: dict[str, Any]) -> bool:
    """Whether layers read the mask: indexers of sparse attention, layers that add terms to it, and those that ask for
    a causal mask in any case."""
    from transformers.masking_utils import causal_mask_function

    asked = given["mask_function"] is causal_mask_function and not given.get("allow_is_causal_skip", True)
    return asked or reads(given["config"])


def reads(config: Any) -> bool:
    """Whether the model's layers read the mask before attention does."""
    named = str(getattr(config, "model_type", "")).startswith(_READ_BY_LAYERS)
    return named or bool(getattr(config, "index_topk", None))


def floating(decoder: Any, configs: list[Any]) -> bool:
    """Whether the decoder knows floating masks only."""
    if not configs or getattr(decoder, "_supports_sdpa", True):
        return not configs
    named = [str(getattr(config, "model_type", "")) for config in configs]
    return not all(name.startswith(_READ_BY_ATTENTION) for name in named)


def settle(record: Record, states: Tensor, seen: Tensor | None, validate: bool) -> None:
    """Makes the layout known where no mask did: by the call's 2-D mask and position ids, for states (B, S, ...).

    ``seen``: what attention sees, (B, 1, S, S) bool, where that is known; position ids alone pack no row of a model
    that makes its masks without them.

    Raises:
        ValueError: the mask is not one of these tokens.
    """
    if record.layout is not None:
        return
    if record.bounds is not None:
        record.settle(layouts.of_bounds(*record.bounds, states.shape[1], validate, record.doubts), validate)
        return
    (rows, tokens), device, mask = states.shape[:2], states.device, record.padding
    fits = mask is None or mask.shape[1] == tokens or (record.cached and mask.shape[1] > tokens)
    if mask is not None and not fits and seen is not None and check_values(device, validate):
        mask = None  # it is of what the model makes these tokens from, as sound; attention says what is padding
    elif mask is not None and not fits:
        raise ValueError(f"attention_mask: expected one for the layers' {tokens} tokens, got {tuple(mask.shape)}")
    if seen is not None and rows == 1 and record.padding is None and check_values(device, validate):
        packed = layouts.blocks(seen)
        if packed is not None and len(packed.starts) > 1:
            record.settle(packed, validate)
            return
    if mask is None and seen is not None and check_values(device, validate):
        keep = seen.any(dim=-2)[:, 0].expand(rows, -1)  # keys that no query sees are padding, at a row's ends
        ends = keep.cummax(-1).values & keep.flip(-1).cummax(-1).values.flip(-1)
        mask = keep if torch.equal(ends, keep) and not bool(keep.all()) else None
    layout = layouts.of_mask(mask, rows, tokens, device, validate, record.doubts)
    positions = record.positions if record.packs else None
    if mask is None and not record.cached and positions is not None and positions.shape[-1] == tokens:
        from transformers.masking_utils import find_packed_sequence_indices

        # with four axes the first holds what a mask is made from
        own = positions[0] if positions.dim() == 3 and positions.shape[0] == 4 else positions
        _doubt_positions(record)
        compiled = torch.compiler.is_compiling()
        sequence = find_packed_sequence_indices(own.expand(rows, -1)) if own.dim() == 2 and not compiled else None
        if sequence is not None:
            if rows != 1:
                raise ValueError(f"position_ids: expected packed sequences in a single row, got {rows} rows")
            packed = layouts.packed(sequence[0])
            if seen is None or not bool((seen & ~reference.visible(packed, tokens, False)).any()):
                layout = packed
    record.settle(layout, validate)


def _doubt_positions(record: Record) -> None:
    """A compiled forward is taken for one sequence a row: whether it is, its positions say when they are known."""
    positions = record.positions
    if torch.compiler.is_compiling() and positions is not None and record.padding is None and not record.cached:
        record.doubts.append(((positions.diff(dim=-1) != 1).any(), _RESTART))


def packs_by_bounds(asking: Asking) -> bool:
    """Whether bounds of packed sequences say all that the model's masks do beside windows: it wants no others. Not
    every release of transformers counts chunks from where a sequence begins."""
    for config in asking.configs:
        for kind in getattr(config, "layer_types", None) or ():
            if kind not in ("full_attention", "sliding_attention"):
                return False
        if reads(config) or getattr(config, "attention_chunk_size", None):
            return False
    return len(asking.configs) > 0 and not asking.additive


def of_call(mask: Any, rows: int, tokens: int, record: Record, asking: Asking) -> Any:
    """What a decoder's layers are to get for the 4-D mask that its caller gives it, or a dict of them by kind: numbers
    with the spans of this forward, or the mask itself. Other masks, and None, are left to the decoder."""
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    known = [own for own in masks if isinstance(own, Tensor) and own.dim() == 4]
    for own in known:
        if asking.additive and own.dtype == torch.bool:
            raise ValueError("attention_mask: expected a floating 4-D mask, which the model adds, got torch.bool")
        if is_encoded(own):
            record.settle(decode(own, rows, tokens)[0], asking.validate)
        else:
            made = next((made for made in here.made if made.mask is own), None)
            record.doubts += [] if made is None else made.doubts
            record.settle(
                layouts.of_pattern(own, rows, tokens, asking.validate, record.doubts) if made is None else made.layout,
                asking.validate,
            )
    if not known or not asking.configs or asking.additive or any(reads(config) for config in asking.configs):
        return mask
    layout, _ = record.places
    first = record.query_starts(asking.queries)

    def given(own: Any) -> Any:
        made = next((made for made in here.made if made.mask is own), None)
        if not isinstance(own, Tensor) or own.dim() != 4 or (made is not None and not made.plain):
            return own
        pattern = pattern_of(own) if is_encoded(own) else None if made is None else made.pattern
        return encode(layout, first, pattern).to(own.device)

    return {kind: given(own) for kind, own in mask.items()} if isinstance(mask, dict) else given(mask)


def _at_start(given: dict[str, Any]) -> bool:
    """Whether the queries are the first positions. Static caches count in tensors, which a compiler cannot read."""
    queries, start, other = given["q_length"], given.get("q_offset", 0), given.get("kv_offset", 0)
    if queries > given["kv_length"] or not isinstance(other, int) or other != 0:
        return False
    if isinstance(start, Tensor):
        return queries > 1 and not torch.compiler.is_compiling() and int(start) == 0
    return int(start) == 0
