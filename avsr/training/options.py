"""Options that save memory or time and change no result beyond rounding: activation checkpointing, Liger's kernels,
torch.compile, and how the cross entropy is computed."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from avsr.config import Config
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.training.deepspeed_json import check_deepspeed, deepspeed_config

logger = logging.getLogger("avsr")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model_type of the decoders whose parts Liger replaces
# operators by torch's names; those that a release does not have are never seen
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1}  # position of the left factor
_ATTENTION = {
    *(f"flashsink::{name}" for name in ("attention", "received", "triton_attention", "triton_received")),
    *(f"aten::_scaled_dot_product_{name}" for name in ("flash_attention", "efficient_attention", "cudnn_attention")),
    *("aten::_scaled_dot_product_flash_attention_for_cpu", "torch_attn::_varlen_attn"),
    *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
}


def check(config: Config, device: torch.device) -> None:
    """Called before anything is loaded.

    Raises:
        UserError: an option cannot work on this device, with these packages or on this ZeRO stage, or DeepSpeed refuses
            the user's JSON.
    """
    lines = check_deepspeed(config)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for line in lines:
            logger.warning(line)
    partitioned = deepspeed_config(config)["zero_optimization"].get("stage") == 3
    for key, value in (
        ("training.kernels", config.training.kernels),
        ("loss.cross_entropy", config.loss.cross_entropy),
    ):
        if value == "liger":
            _need_liger(key, device)
    if partitioned and config.loss.cross_entropy == "liger":
        raise UserError("loss.cross_entropy: liger needs the whole matrix of the vocabulary, not ZeRO stage 3")
    if partitioned and config.training.gradient_norms_every:
        raise UserError("training.gradient_norms_every: not available under ZeRO stage 3; set it to 0")
    if partitioned and config.training.compile:
        raise UserError("training.compile: not available under ZeRO stage 3, which fetches weights by hooks")


def _need_liger(key: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"{key}: Liger's kernels need a CUDA device, this training runs on {device.type}; set it to plain"
        )
    try:
        importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise UserError(f"{key}: Liger is missing here ({error}): pip install 'flashsink[liger]'") from error


def apply(model: SpeechLLM, config: Config) -> None:
    """Called before flashsink is attached, which patches norms, Liger's too, and must find the final layers."""
    if config.training.kernels == "liger":
        use_liger(model.decoder)
    checkpoint_layers(model.decoder, config.training.gradient_checkpointing)


def checkpoint_layers(decoder: Any, how: str) -> None:
    """Applies ``training.gradient_checkpointing`` to the layers of a causal LM."""
    if how == "false":
        return
    contexts = {"context_fn": selective(decoder.config)} if how == "selective" else {}
    decoder.gradient_checkpointing_enable({"use_reentrant": False, **contexts})


def use_liger(decoder: Any) -> None:
    """Applies Liger's rotary embedding, SwiGLU and RMSNorm to this causal LM. The rotary embedding is patched into
    transformers' module and affects every model of the family in this process.

    Raises:
        UserError: a family that Liger does not know.
    """
    family = decoder.config.model_type
    if family not in FAMILIES:
        raise UserError(
            f"training.kernels: liger is for {', '.join(FAMILIES)}, the model is a {family}; set it to plain"
        )
    liger = importlib.import_module("liger_kernel.transformers")
    # SpeechLLM never calls the causal LM's forward, whose loss Liger would replace
    liger._apply_liger_kernel_to_instance(
        model=decoder, rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def selective(config: Any) -> Callable[[], Any]:
    """Contexts of a checkpoint that saves what is expensive: attention's results and the products of the layer's own
    matrices. Norms, rotary embedding, SwiGLU and the adapters' low-rank products are recomputed.

    Of the last product, ``down_proj``, nothing is saved: no backward needs its result, and recomputation stops before
    it. Products are told apart by their inner dimension: that of an adapter's second product is its rank.

    Args:
        config: the decoder's.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    inner = {config.hidden_size, width}

    def policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        name = operator.name()
        keep = name in _ATTENTION
        if name in _PRODUCTS:
            keep = arguments[_PRODUCTS[name]].shape[-1] in inner
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def compile_parts(model: SpeechLLM, backend: str = "inductor") -> None:
    """Compiles every layer's MLP and norms: one graph for all layers and, beyond one row, all shapes.

    Called after flashsink is attached: its norms and attention hold Python state of their layer, so a graph around them
    would be compiled for each layer, and a graph of the whole decoder for every shape of a batch.
    """
    for layer in model.decoder.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            if "forward" not in part.__dict__:  # flashsink has patched it otherwise
                part.compile(dynamic=True, backend=backend)
