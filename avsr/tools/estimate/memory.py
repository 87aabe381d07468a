"""How much memory a training takes, before it runs: closed forms over the sizes of its parts.

They count what grows with model, batch and ranks, and the largest parts of a step's working memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from avsr.config import LoraConfig
from avsr.models.label_loss import CHUNKS

_FLOAT = 4  # masters, Adam's two moments, softmax and frozen encoders are float32
_LIVE = 10**9  # parameters that ZeRO-3 keeps gathered at most (stage3_max_live_parameters)


@dataclass(frozen=True)
class Sizes:
    """Of a Llama-style decoder and what is trained around it; ``frozen``, ``lora``, ``projectors`` and ``encoders`` are
    numbers of weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    frozen: int  # in the language model; a tied head counts once
    lora: int
    tied: bool = True  # the head is the embedding table
    adapted: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 0  # of LoRA
    projectors: int = 0
    encoders: int = 0  # frozen, inside the step

    @property
    def trained(self) -> int:
        return self.lora + self.projectors

    @property
    def layer(self) -> int:
        """Frozen weights of one layer."""
        ends = self.hidden * self.vocabulary * (1 if self.tied else 2) + self.hidden
        return (self.frozen - ends) // self.layers


@dataclass(frozen=True)
class Load:
    """A micro-batch of one rank in the decoder, including padding."""

    tokens: int
    labels: int


@dataclass(frozen=True)
class Way:
    """How it is trained."""

    ranks: int = 1
    stage: int = 1
    element: int = 2  # bytes: 2 bf16, 4 fp32
    attention: int = 2  # bytes of what attention keeps: 4 on a CPU, which computes it in float32
    checkpointing: str = "false"  # training.gradient_checkpointing
    cross_entropy: str = "plain"  # loss.cross_entropy
    kernels: str = "plain"  # training.kernels
    offload_optimizer: bool = False
    offload_parameters: bool = False


def memory(sizes: Sizes, load: Load, way: Way) -> dict[str, float]:
    """Bytes of one rank's device by part, at the step's peak.

    Frozen weights (under stage 3 a share, and what is gathered); trained weights, gradients, master weights and Adam's
    moments; activations kept for the backward; the head's memory or the working set of a layer's backward, whichever is
    larger.
    """
    share = 1 / way.ranks
    gathered = way.stage == 3
    weights = sizes.frozen * way.element
    parts = {"frozen weights": 0.0 if way.offload_parameters else weights * (share if gathered else 1.0)}
    parts["gathered weights"] = min(_fetched(sizes), _LIVE) * way.element * (gathered and way.ranks > 1)
    parts["encoders"] = float(sizes.encoders * _FLOAT)
    parts["trained weights"] = float(sizes.trained * way.element)
    parts["gradients"] = sizes.trained * way.element * (1 + (share if way.stage >= 2 else 1.0))
    masters = _FLOAT if way.element < _FLOAT or way.stage else 0
    adam = sizes.trained * (masters + 2 * _FLOAT) * (share if way.stage >= 1 else 1.0)
    parts["optimizer"] = 0.0 if way.offload_optimizer else adam
    kept = layer_bytes(sizes, way)
    parts["activations"] = load.tokens * (sizes.layers * kept + 2 * sizes.hidden * _FLOAT)
    # a layer's backward: gradients of product, SiLU, up and gate at once, and what was recomputed
    working = way.element * 4.0 * sizes.intermediate + layer_bytes(sizes, replace(way, checkpointing="false")) - kept
    parts["head or layer"] = max(head_bytes(sizes, load, way), load.tokens * working)
    return parts


def layer_bytes(sizes: Sizes, way: Way) -> float:
    """Bytes per token that a layer keeps for its backward.

    Frozen matrices need no input for a weight gradient, so these are kept: the input of a norm (in its own precision
    by ours and Liger's, in float32 by transformers'), the normed states that LoRA reads, q, k, v, attention's output
    with its log-sum-exp, gate, SiLU (not by Liger) and up. Full checkpointing keeps only the layer's input; selective
    keeps the matrix products, the adapters' low-rank ones, and attention's output.
    """
    wide, group = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    targets = set(sizes.adapted)
    if way.checkpointing == "true":
        return float(way.element * sizes.hidden)
    # DeepSpeed's linear layer also keeps the inputs of frozen matrices
    inputs = 2 * sizes.hidden + wide + sizes.intermediate if way.stage == 3 else 0
    if way.checkpointing == "selective":
        thin = sizes.rank * len(targets - {"down_proj"})
        kept = 2 * sizes.hidden + wide + 2 * group + 2 * sizes.intermediate + thin
        return way.element * kept + way.attention * wide + _FLOAT * sizes.heads
    liger = way.kernels == "liger"
    read = sizes.hidden * bool(targets & {"q_proj", "k_proj", "v_proj"})
    read += sizes.hidden * bool(targets & {"gate_proj", "up_proj"})
    read += sizes.intermediate * ("down_proj" in targets)
    kept = sizes.hidden + (2 if liger else 3) * sizes.intermediate + max(read, inputs)
    norm = (way.element if liger else _FLOAT) * sizes.hidden
    return way.element * kept + way.attention * 2 * (wide + group) + norm + _FLOAT * sizes.heads


def head_bytes(sizes: Sizes, load: Load, way: Way) -> float:
    """Peak bytes of the head, in the backward: log-softmax and the gradients of both steps of the loss, in float32 (the
    logits and their copy are freed by then); one of ``PARTS`` at a time if chunked; Liger's kernel holds about as many
    numbers as the hidden states have."""
    width = sizes.hidden if way.cross_entropy == "liger" else sizes.vocabulary
    return load.labels * width * 3.0 * _FLOAT / (CHUNKS if way.cross_entropy == "chunked" else 1)


def _fetched(sizes: Sizes) -> int:
    """Weights gathered at once under ZeRO-3: a layer and the next, or the embedding table."""
    return max(2 * sizes.layer, sizes.hidden * sizes.vocabulary)


def largest(fits: Callable[[int], bool], start: int = 1) -> int:
    """The largest number that ``fits``, given that all smaller ones do; 0 if ``start`` does not."""
    if not fits(start):
        return 0
    low, high = start, start * 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def read_sizes(config: Any, model: nn.Module, adapters: LoraConfig, projectors: int, encoders: int) -> Sizes:
    """
    Args:
        config: of Hugging Face, like Llama's.
        model: the language model with its adapters.
        adapters: LoRA's settings.
        projectors: number of weights.
        encoders: number of weights of those inside the step.
    """
    counts = [0, 0]
    for parameter in model.parameters():
        whole: Any = parameter
        counts[parameter.requires_grad] += int(getattr(whole, "ds_numel", parameter.numel()))
    heads = int(config.num_attention_heads)
    return Sizes(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate=int(config.intermediate_size),
        vocabulary=int(config.vocab_size),
        frozen=counts[0],
        lora=counts[1],
        tied=bool(config.tie_word_embeddings),
        adapted=tuple(
            sorted({n.rpartition(".")[2] for n, part in model.named_modules() if isinstance(part, LoraLayer)})
        ),
        rank=adapters.rank,
        projectors=projectors,
        encoders=encoders,
    )
