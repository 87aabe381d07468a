"""Whole training steps: a Llama of random weights with LoRA on q and v, speech-like batches, AdamW on the adapters.

A row is BOS, speech and prompt (the span), then text; only text tokens have labels. The inputs require a gradient, as
those from a projector do. Dimensions: N utterances; one packed row of T tokens or N padded rows of S; C features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flashsink
from bench.workloads.peers import reference_decorrelation
from bench.workloads.shapes import Model, random_llm
from flashsink.dispatch import implementation
from flashsink.hf import models, norms
from flashsink.types import Layout

RANK = 16
NEVER = 10**9  # stats_every: only the first forward, a warm-up, records statistics
VARLEN = "bench_varlen"


@dataclass(frozen=True)
class Setting:
    """The model cut to ``layers``, and the lengths of one batch's utterances."""

    model: Model
    layers: int
    lengths: tuple[int, ...]
    packed: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        how = "packed" if self.packed else "padded"
        span = f"{min(self.lengths)}..{max(self.lengths)}"
        return f"{self.model.name} {self.layers}/{self.model.layers} layers, {how} {len(self.lengths)} x {span}"

    @property
    def spans(self) -> list[int]:
        """A fifth of an utterance is text, at least 4 tokens."""
        return [n - max(4, n // 5) for n in self.lengths]

    @property
    def labels(self) -> int:
        return sum(self.lengths) - sum(self.spans)

    def padded(self) -> Setting:
        return dataclasses.replace(self, packed=False)


class Batch:
    """Inputs and labels of one batch in the setting's layout."""

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths, spans, width = setting.lengths, setting.spans, setting.model.hidden
        longest = max(lengths)
        starts = [sum(lengths[:i]) if setting.packed else i * longest for i in range(len(lengths))]
        # every text token is predicted from the token before it
        rows = [range(a + span - 1, a + n - 1) for a, span, n in zip(starts, spans, lengths, strict=True)]
        self.where = torch.tensor([place for row in rows for place in row], device=setting.device)
        tokens = torch.randn(sum(lengths), width, generator=generator) * 0.02
        if setting.packed:
            rows_of = tokens[None]
        else:
            rows_of = nn.utils.rnn.pad_sequence(list(tokens.split(list(lengths))), batch_first=True)
        self.embeddings = rows_of.to(setting.device, setting.dtype).requires_grad_()
        labels = torch.randint(setting.model.vocabulary, (len(self.where),), generator=generator)
        self.labels = labels.to(setting.device)
        self.spans = torch.tensor(spans, device=setting.device)
        self.inputs: dict[str, Any] = {"inputs_embeds": self.embeddings}
        if setting.packed:
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            self.inputs["position_ids"] = positions.to(setting.device)
        else:
            mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
            self.inputs["attention_mask"] = mask.long().to(setting.device)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.bounds = ends.to(setting.device, torch.int32)


@dataclass(frozen=True)
class Variant:
    """How the step is computed.

    Attributes:
        attention: "probe" (flashsink's through attach), "varlen", or an implementation of transformers.
        probe: options of ``flashsink.attach``; None = not attached.
        weight: of the decorrelation loss; None = no such loss.
        reference: as in the reference code: hidden states collected, its own loss, logits of all tokens.
        norm: "fast" for Liger's kernels (RMSNorm, rotary embedding, SwiGLU) where importable, else torch's fused
            RMSNorm; "ours" for our norm without the loss where ``attach`` would put the one with it, else as "fast";
            "" for the norm of transformers.
        optimizer: also step the adapters.
    """

    attention: str = "probe"
    probe: dict[str, Any] | None = None
    weight: float | None = None
    reference: bool = False
    norm: str = "fast"
    optimizer: bool = True


OURS = Variant(probe={}, weight=1.0)
WITHOUT = Variant(probe={"decorrelation": False, "activations": False, "stats_every": NEVER})
REFERENCE = Variant("eager", weight=1.0, reference=True, norm="")


def make_step(setting: Setting, variant: Variant, shared: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A training step that returns the loss. ``shared`` holds the weights of all variants; the first one fills it."""
    model = build(setting, variant, shared)
    batch = Batch(setting)
    probe = None if variant.probe is None else flashsink.attach(model, **variant.probe)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4) if variant.optimizer else None
    if variant.attention == "varlen":
        _register_varlen(batch.bounds, max(setting.lengths))

    def step() -> Tensor:
        if probe is None:
            loss = reference_loss(model, batch, variant) if variant.reference else cross_entropy(model, batch)
        else:
            with probe.spans(batch.spans):
                loss = cross_entropy(model, batch)
            if variant.weight is not None:
                loss = loss + variant.weight * probe.decorrelation_loss
        loss.backward()
        if probe is not None and variant.weight is not None and variant.probe == {}:
            held = [layer.received for layer in probe.sinks], probe.activations.max_abs
            del held
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        batch.embeddings.grad = None
        return loss.detach()

    return step


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """With logits only at the positions with labels."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.where])
    return F.cross_entropy(logits.float(), batch.labels)


def reference_loss(model: Any, batch: Batch, variant: Variant) -> Tensor:
    """Logits of all tokens, hidden states of all layers, and the decorrelation loss over layers 1..L-1."""
    out = model(**batch.inputs, use_cache=False, output_hidden_states=True)
    targets = torch.full((out.logits.shape[0] * out.logits.shape[1],), -100, device=batch.labels.device)
    targets[batch.where] = batch.labels
    loss = F.cross_entropy(out.logits.float().flatten(0, 1), targets)
    if variant.weight is None:
        return loss
    return loss + variant.weight * reference_decorrelation(out.hidden_states[1:-1])


def build(setting: Setting, variant: Variant, shared: dict[str, Tensor]) -> Any:
    """A ``LlamaForCausalLM`` with adapters on the weights of ``shared``."""
    attention = {"probe": "sdpa", "varlen": VARLEN}.get(variant.attention, variant.attention)
    if variant.attention == "varlen":
        _register_varlen(None, 0)
    model = random_llm(setting, add_lora, attn_implementation=attention)
    if variant.norm:
        fast_kernels(model, setting.device)
    if variant.norm == "ours":
        our_norms(model, setting)
    if shared:
        model.load_state_dict(shared, assign=True)
        model.tie_weights()
    else:
        shared.update(model.state_dict())
    return model.train()


def add_lora(model: nn.Module) -> None:
    """Rank-16 adapters on q_proj and v_proj in the model's dtype, as in DeepSpeed's bf16 training: PEFT's, or
    :class:`Lora` where PEFT is missing."""
    try:
        import peft
    except ImportError:
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
            layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
        return
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]


class Lora(nn.Module):
    """A frozen linear layer plus a low-rank one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def liger() -> str:
    """ "Liger", or "" where it cannot be imported."""
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return ""
    return "Liger"


def norm_name(device: torch.device) -> str:
    """The norm of every variant but the reference, unless it is ours."""
    return "Liger's RMSNorm" if device.type == "cuda" and liger() else "torch's rms_norm"


def fast_kernels(model: Any, device: torch.device) -> None:
    """Liger's kernels, or torch's rms_norm in place of transformers' chain of small operations, so that the peers have
    fused norms too."""
    if device.type == "cuda" and liger():
        _apply_liger(model)
        return
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            norms.patch(module, functools.partial(_torch_norm, module))


def _torch_norm(norm: Any, h: Tensor) -> Tensor:
    return F.rms_norm(h, norm.weight.shape, norm.weight, norm.variance_epsilon)


def our_norms(model: Any, setting: Setting) -> None:
    """Our norm without the loss, where :func:`flashsink.attach` puts the one with it. Dense rows without padding."""
    rows, tokens = len(setting.lengths), max(setting.lengths)
    starts = torch.zeros(rows, dtype=torch.long, device=setting.device)
    layout = Layout(starts, starts + tokens, rows, tokens, False)
    run = implementation(None, setting.device.type)
    for norm in models.find(model).readers[:-1]:  # the last layer's output has no loss

        def forward(h: Tensor, norm: Any = norm) -> Tensor:
            return run.rms_norm(h, norm.weight, norm.variance_epsilon, layout, None, 0.0).out

        norms.patch(norm, forward)


def _apply_liger(model: Any) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    classes = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", "LlamaMLP")}
    # the rotary embedding is patched in transformers' module, so all variants of this process have it
    apply_liger_kernel_to_llama(
        rope=True, swiglu=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )
    # this model is patched; the classes are restored for the next one, which may be the reference
    for name, own in classes.items():
        setattr(modeling_llama, name, own)


def _register_varlen(bounds: Tensor | None, longest: int) -> None:
    """Registers flash-attn's or torch's variable-length attention with transformers, for one batch."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return _varlen(q, k, v, bounds, longest)[None], None

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, lambda *args, **options: None)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, longest: int) -> Tensor:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))  # type: ignore
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True)


# ---- model FLOP utilisation

MFU_FORMULA = (
    "FLOP = T (4 N + 6 N_lora) + labels 4 C V + L sum_n n (n + 1) / 2 * 12 H D; MFU = FLOP / (seconds * peak). "
    "4 N: forward and input gradients of frozen matrices (no weight gradients); recomputation is not counted"
)
# dense bf16 TFLOP/s from the data sheets, by a part of the device's name
PEAK = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


def flops(setting: Setting) -> float:
    """Floating-point operations of one step, see :data:`MFU_FORMULA`."""
    m = setting.model
    attention, group = m.heads * m.dim, m.kv_heads * m.dim
    frozen = setting.layers * m.hidden * (2 * attention + 2 * group + 3 * m.intermediate)
    adapters = setting.layers * RANK * (m.hidden + attention + m.hidden + group)
    pairs = sum(n * (n + 1) / 2 for n in setting.lengths)
    tokens = sum(setting.lengths)
    head = setting.labels * 4.0 * m.hidden * m.vocabulary
    return tokens * (4.0 * frozen + 6.0 * adapters) + head + setting.layers * pairs * 12.0 * attention


def peak_flops(device: torch.device) -> float:
    """FLOP/s from the device's data sheet; nan if unknown."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK.items() if part in name), math.nan)
