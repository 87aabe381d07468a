"""The attention function that transformers calls in an attached model, and what it refuses.

An attention call may carry more than q, k, v and the mask: arguments of the model's code, and those its caller passed
to ``forward``. Anything not known to be harmless is refused by name.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashsink import checks, reference
from flashsink.checks import check_values
from flashsink.dispatch import implementation
from flashsink.hf import encoded, layouts, masks, own
from flashsink.hf.own import MARK
from flashsink.hf.records import Record
from flashsink.types import Layout, Pattern, Segments

# transformers takes every name with "flash" in it for a FlashAttention kernel to fetch
IMPLEMENTATION = "sink_capture"

# Seen in the models of transformers 5.17 to 5.23; attention's result does not depend on them (rotary embeddings are
# applied before, the mask says what windows leave out, and what a model returns besides the logits is not attention's
# concern).
_HARMLESS = {
    *(
        "cache_position",
        "decoder_attention_mask",
        "deterministic",
        "ignore_index",
        "image_sizes",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "shift_labels",
    ),
    *("output_hidden_states", "output_router_logits", "position_ids", "return_dict", "sliding_window", "use_cache"),
}
_KNOWN = {"dropout", "is_causal", "scaling"}  # looked at
# terms of the scores that the model's own code passes, with the attributes of its attention modules that they come from
_TERMS = {"softcap": ("attn_logit_softcapping",), "s_aux": ("sinks",)}
# repeat what restarting positions say; only some implementations read them
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_ELSE = "; attention=False observes the model all the same"


class Call(NamedTuple):
    """One attention call: q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), and what the mask says.

    Attributes:
        layout: over the keys. Where a pattern has its own mask, that masks padding too.
        query_starts: of the statistics, where the mask carries them, or None.
        encoded: the mask was numbers, so it is of a full forward.
        everything: the module is not causal, but an encoder's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    causal: bool
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    pattern: Pattern | None = None
    query_starts: Tensor | None = None
    encoded: bool = False
    everything: bool = False

    def run(
        self, backend: str | None, counted: list[Tensor | None], segments: Segments | None = None
    ) -> tuple[Tensor, list[Any]]:
        """(out (B, H, Sq, Dv), statistics), as :func:`flashsink.reference.attention`."""
        q, pattern = self.q, self.pattern
        chosen = implementation(backend, q.device.type, q, self.v, pattern, self.softcap, segments=segments is not None)
        return chosen.attention(
            q,
            self.k,
            self.v,
            self.layout,
            causal=self.causal,
            scale=self.scale,
            counted=counted,
            sink_logits=self.sink_logits,
            pattern=pattern,
            softcap=self.softcap,
            segments=segments,
        )

    def calibrated(self, backend: str | None, sinks: Tensor, beta: float) -> Tensor:
        """The output with ACT on the columns ``sinks`` (B, H, Sk)."""
        q, pattern = self.q, self.pattern
        chosen = implementation(backend, q.device.type, q, self.v, pattern, self.softcap, "ACT")
        return chosen.calibrated_attention(
            q,
            self.k,
            self.v,
            sinks,
            self.layout,
            beta=beta,
            scale=self.scale,
            causal=self.causal,
            pattern=pattern,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
        )


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # without a mask function of the same name transformers passes no mask at all
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, masks.make_mask)


class _BeyondError(ValueError):
    """What flashsink's operators do not compute, but the model's own code does."""


def _check_call(module: nn.Module, mask: Any, arguments: dict[str, Any], record: Record | None) -> None:
    if arguments.get("dropout"):
        raise _BeyondError(f"attention_dropout: expected 0, got {arguments['dropout']}{_ELSE}")
    for name, value in arguments.items():
        if value is None or name in _HARMLESS or name in _KNOWN:
            continue
        if name in _PACKING and encoded.is_packed(mask):
            if name == "cu_seq_lens_q" and record is not None and record.bounds is None:
                layout = record.places[0]  # by the positions alone
                layouts.of_bounds(value, layout.offsets(), layout.tokens, False, record.doubts)
            continue
        if any(getattr(module, key, None) is value for key in _TERMS.get(name, ())):  # else a caller's, which few read
            continue
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        why = " without position_ids that restart" if name in _PACKING else ""
        why = f"{name}: flashsink's attention does not know it, expected None, got {got}{why}{_ELSE}"
        raise _BeyondError(why) if own.takes(module, name) else ValueError(why)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, Any]:
    place: Any = getattr(module, MARK, None)
    if place is None:
        known = masks.before(getattr(module, "config", None)) is not None
        return (_elsewhere if known else _alone)(module, query, key, value, attention_mask, arguments)
    if query.dim() != 4 or query.shape[0] != key.shape[0]:
        raise ValueError(f"model: expected queries (B, H, S, D) in attention, got {tuple(query.shape)}{_ELSE}")
    record: Record | None = place.observer.forwards.live
    if record is not None and not getattr(module, "is_causal", True):
        record.anchored = False  # where all are seen there is no BOS
    try:
        _check_call(module, attention_mask, arguments, record)
        _check_weights(module, arguments)
        call = _read(module, query, key, value, attention_mask, arguments, record)
    except _BeyondError as why:
        return _by_itself(module, query, key, value, attention_mask, arguments, why)
    out: Tensor = place.observer.attend(place.layer, call, record)
    return out.transpose(1, 2).contiguous(), None


def _by_itself(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: dict[str, Any], why: ValueError
) -> tuple[Tensor, Any]:
    """The module's own eager attention, with the sinks of its probabilities."""
    place: Any = getattr(module, MARK)
    if place.observer.calibrates(place.layer):
        raise why
    out, weights, a = own.eager(module, q, k, v, mask, arguments)
    if a is not None:
        place.observer.note(place.layer, a)
    return out, weights if _was_eager(module) else None


def _check_weights(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Weights that were asked for: of eager attention they come as before, of others there were none."""
    if not arguments.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)):
        return
    if _was_eager(module):
        raise _BeyondError(f"output_attentions: expected None or False, got True{_ELSE}")
    if not torch.compiler.is_compiling():
        warnings.warn(
            "output_attentions: flashsink's attention returns no weights; probe.sinks has what each key receives, and "
            "a model loaded with attn_implementation='eager' returns them while attached",
            stacklevel=2,
        )


def _alone(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Attention of a model whose config names flashsink's, without a probe: nothing is recorded, and what the operators
    do not compute torch's attention does."""
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        try:
            _check_call(module, mask, arguments, None)
            call = _read(module, q, k, v, mask, arguments, None)
            return call.run(None, [])[0].transpose(1, 2).contiguous(), None
        except ValueError:
            pass
    return _elsewhere(module, q, k, v, mask, arguments)


def _elsewhere(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Attention that is not observed: to other states (cross-attention), or of an encoder that shares the config."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _was_eager(module) or any(arguments.get(name) is not None for name in ("s_aux", "softcap")):
        return own.eager(module, q, k, v, mask, arguments)[:2]
    if encoded.is_encoded(mask):
        layout, _ = encoded.decode(mask.to(q.device), q.shape[0], q.shape[2])
        mask = reference.visible(layout, q.shape[2], True, encoded.pattern_of(mask))
    return sdpa_attention_forward(module, q, k, v, mask, **arguments)


def _was_eager(module: nn.Module) -> bool:
    return masks.before(getattr(module, "config", None)) == "eager"


def _read(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: dict[str, Any], record: Record | None
) -> Call:
    """What a call and its mask say."""
    scaling, causal = arguments.get("scaling"), arguments.get("is_causal")
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotary embeddings leave them in float32
    scale = checks.check_scale(scaling, q)
    rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    everything = not getattr(module, "is_causal", True)
    terms: dict[str, Any] = {"scale": scale, "softcap": arguments.get("softcap"), "sink_logits": arguments.get("s_aux")}
    terms["everything"] = everything
    if encoded.is_encoded(mask):
        layout, first = encoded.decode(mask.to(q.device), rows, queries)
        k, v = k[:, :, :queries], v[:, :, :queries]  # the rest of a static cache
        terms |= {"pattern": encoded.pattern_of(mask), "query_starts": first}
        return Call(q, k, v, layout, causal=True, encoded=True, **terms)
    if mask is None:
        # eager attention knows masks only
        causal = (not everything if causal is None else bool(causal)) and queries > 1 and not _was_eager(module)
        if causal and queries < keys:  # as torch's attention takes it: the first positions
            k, v = k[:, :, :queries], v[:, :, :queries]
        return Call(q, k, v, layouts.of_mask(None, rows, k.shape[2], q.device), causal=causal, **terms)
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 4
        or mask.shape[2] not in (1, queries)
        or mask.shape[3] not in (1, keys)
    ):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected ({rows}, 1, {queries}, {keys}), got {got}{_ELSE}")
    seen = _seen(mask.to(q.device), record).expand(-1, -1, queries, keys)
    if record is not None and queries < keys and check_values(q.device) and not bool(seen[..., queries:].any()):
        seen, k, v = seen[..., :queries], k[:, :, :queries], v[:, :, :queries]  # the rest is of a static cache
    layout = layouts.of_mask(None, rows, k.shape[2], q.device)
    pattern = None if check_values(seen.device) and bool(seen.all()) else Pattern(mask=seen)
    return Call(q, k, v, layout, causal=False, pattern=pattern, **terms)


def _seen(mask: Tensor, record: Record | None) -> Tensor:
    """A mask of the model's own as bool.

    Raises:
        ValueError: it adds to the scores that it does not mask, or differs among heads.
    """
    if mask.shape[1] != 1:
        raise _BeyondError(f"attention_mask: expected one mask for all heads, got {tuple(mask.shape)}{_ELSE}")
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    masked = mask <= max(torch.finfo(mask.dtype).min / 2, -1e9) if mask.is_floating_point() else ~seen
    why = f"attention_mask: expected 0 and the least number, got terms that are added to the scores{_ELSE}"
    if check_values(mask.device):
        if not bool((seen | masked).all()):
            raise _BeyondError(why)
    elif record is not None:
        record.doubts.append((~(seen | masked).all(), why))
    return seen
