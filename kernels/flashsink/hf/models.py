"""What is known of Hugging Face decoders: where their layers and norms are, and which norms are Llama's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger("flashsink")

# weight * (x / rms(x)).to(dtype), as reference.rms_norm has it
_LLAMA_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "LigerRMSNorm"}


def find_decoder(model: nn.Module) -> tuple[Any, Any]:
    """(decoder, its layers) inside ``model``, whatever wraps it.

    Raises:
        ValueError: there is none, or more than one.
    """
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


def norms_of_outputs(decoder: Any, layers: Any) -> list[Any]:
    """For every layer the norm that reads its output: the next layer's first, at the end the decoder's own."""
    return [getattr(layer, "input_layernorm", None) for layer in list(layers)[1:]] + [getattr(decoder, "norm", None)]


def epsilon(norm: Any) -> float | None:
    """The epsilon of a norm whose work :func:`flashsink.reference.rms_norm` does, or None with a logged reason.

    Liger's norms are taken over in their Llama form, by class or by patched instance; its other forms (an offset, or
    the multiplication by the weight before the rounding) are left alone.
    """
    name = type(norm).__name__
    if hasattr(norm, "_hf_hook"):
        logger.info("%s moves with accelerate's hooks: the states are read once more instead", name)
        return None
    if name not in _LLAMA_NORMS or not hasattr(norm, "variance_epsilon"):
        logger.info("%s is not Llama's RMSNorm: the states are read once more instead", name)
        return None
    if getattr(norm, "casting_mode", "llama") not in ("llama", 0) or float(getattr(norm, "offset", 0) or 0):
        logger.info("%s is Liger's in another form than Llama's: the states are read once more instead", name)
        return None
    return float(norm.variance_epsilon)


def patch(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replaces ``forward`` of this one module; returns the function that restores it. Hooks of the module, such as
    ZeRO-3's that gather its weight, run around it as before."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign, assignment]

    def undo() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    return undo
