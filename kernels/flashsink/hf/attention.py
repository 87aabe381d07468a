"""The attention function that transformers calls in an attached model, and what it refuses.

An attention call may carry more than q, k, v and the mask: arguments of the model's code, and those its caller passed
to ``forward``. Anything not known to be harmless is refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flashsink import checks
from flashsink.dispatch import implementation
from flashsink.hf import masks

# transformers takes every name with "flash" in it for a FlashAttention kernel to fetch
IMPLEMENTATION = "sink_capture"
MARK = "_flashsink_probe"  # the attribute of an attached model's attention modules

# Seen in the models of transformers 5.17 to 5.23; attention's result does not depend on them (rotary embeddings are
# applied before, and what a model returns besides the logits is not attention's concern).
_HARMLESS = {
    *("cache_position", "image_sizes", "labels", "logits_to_keep", "num_items_in_batch", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache"),
}
_KNOWN = {"dropout", "is_causal", "scaling", "sliding_window"}  # looked at
# repeat what restarting positions say; only some implementations read them
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # the latter within a window or chunk
_OWN_MASKS = {"doge"}  # model types whose layers read the mask before attention does
_ELSE = "; attention=False observes the model all the same"


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # without a mask function of the same name transformers passes no mask at all
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, masks.make_mask)


def check_config(config: Any) -> None:
    """Raises:
    ValueError: the config says that a layer does something else than causal softmax attention.
    """
    if getattr(config, "is_causal", True) is False:
        raise ValueError("model: its config has is_causal=False, expected causal attention" + _ELSE)
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if other or config.model_type in _OWN_MASKS:
        got = f"{', '.join(other)} in layer_types" if other else f"masks that every layer of {config.model_type} makes"
        raise ValueError(f"model: expected layers of {', '.join(sorted(_LAYERS))}, got {got}{_ELSE}")


def check_window(window: int | None, tokens: int) -> None:
    """Raises:
    ValueError: a window leaves keys out.
    """
    if window and tokens > window:  # 0 is off as well as None
        raise ValueError(
            f"sliding_window: expected sequences of at most {window} tokens, got {tokens}; sliding-window "
            "attention is not supported"
        )


def _check_call(module: nn.Module, mask: Any, arguments: dict[str, Any]) -> None:
    causal = arguments.get("is_causal")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        raise ValueError(f"is_causal: expected causal attention, {type(module).__name__} has False{_ELSE}")
    if arguments.get("dropout"):
        raise ValueError(f"attention_dropout: expected 0, got {arguments['dropout']}")
    for name, value in arguments.items():
        if value is None or name in _HARMLESS or name in _KNOWN:
            continue
        if name in _PACKING and masks.is_packed(mask):
            continue
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        why = {"s_aux": " (learned sink logits, GPT-OSS)", "softcap": " (capped scores)"}.get(name, "")
        why = " without position_ids that restart" if name in _PACKING else why
        raise ValueError(f"{name}: flashsink's attention does not know it, expected None, got {got}{why}{_ELSE}")


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    _check_call(module, attention_mask, arguments)
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast rotary embeddings leave them in float32
    scaling, window = arguments.get("scaling"), arguments.get("sliding_window")
    q, scale = checks.positive_scale(q, q.shape[-1] ** -0.5 if scaling is None else float(scaling))
    probe: Any = getattr(module, MARK, None)
    if probe is not None:
        out = probe.attend(int(module.layer_idx), q, k, v, attention_mask, scale, window)  # type: ignore[arg-type]
    else:
        layout, _ = masks.decode(attention_mask, k.shape[0], k.shape[2], k.device)
        check_window(window, layout.tokens)
        k, v = k[:, :, : layout.tokens], v[:, :, : layout.tokens]
        out = implementation(None, q.device.type, q).attention(q, k, v, layout, causal=True, scale=scale)[0]
    return out.transpose(1, 2).contiguous(), None
