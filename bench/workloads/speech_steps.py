"""Whole training steps of avsr's model: projector, prompt and an LLM of random weights with LoRA, speech-like batches.

Every variant has flashsink's attention, loss and statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.runner import rehearsal
from bench.runner.measure import Absent
from bench.workloads.shapes import Model, random_llm, utterances

RATE, WIDTH = 8, 384  # frames per token, features per frame: the demo's compression of Whisper-tiny
PROMPT = 7  # tokens of the demo's prompt
FIXED = 1 + 2 + PROMPT  # BOS, delimiter tokens, prompt
# the demo's commands: frames of one batch of its corpus as training draws it, and tokens of every text
DEMO_FRAMES, DEMO_TEXT = (81, 84, 84, 85, 84, 84, 88, 87), 6


@dataclass(frozen=True)
class Setting:
    """A model cut to ``layers``, and (frames, text tokens) of a batch's utterances."""

    model: Model
    layers: int
    rows: tuple[tuple[int, int], ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def lengths(self) -> list[int]:
        return [FIXED + frames // RATE + text for frames, text in self.rows]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    @property
    def shape(self) -> str:
        lengths = self.lengths
        size = f"{len(lengths)} x {min(lengths)}..{max(lengths)}"
        return f"{self.model.name} {self.layers}/{self.model.layers} layers, {size} tokens"


def demo_rows() -> tuple[tuple[int, int], ...]:
    return tuple((frames, DEMO_TEXT) for frames in DEMO_FRAMES)


def neighbours(tokens: int) -> tuple[tuple[int, int], ...]:
    """Utterances of Llama-AVSR's lengths, a fifth of each being text, for a batch of at most ``tokens`` including
    padding: neighbours in length around the median, as training batches them."""
    if rehearsal.ON:
        return ((16, 3), (24, 4))
    drawn = sorted(utterances(200 * tokens // 16))
    first = len(drawn) // 2
    last = first
    while last < len(drawn) and drawn[last] * (last + 1 - first) <= tokens:
        last += 1
    return tuple(((n - n // 5 - FIXED) * RATE, n // 5) for n in drawn[first:last])


@dataclass(frozen=True)
class Variant:
    """``all_logits``: logits of every position, padding included, with labels of -100 where there are none, as in the
    reference code. The other fields are keys of a recipe."""

    packed: bool = True
    all_logits: bool = False
    checkpointing: str = "false"
    cross_entropy: str = "plain"
    compile: bool = False


def make_step(setting: Setting, variant: Variant, shared: dict[str, Any]) -> Callable[[], Tensor]:
    """A step from forward to optimizer that returns the loss. ``shared`` holds the LLM's weights for all variants.

    Raises:
        Absent: avsr's packages are missing.
    """
    try:
        from avsr.training import options
    except ImportError as error:
        raise Absent(f"avsr cannot be imported: {error}") from error
    model = build(setting, variant, shared)
    batch = make_batch(setting)
    probe = model.attach(activations=False, margin=0.5)
    options.checkpoint_layers(model.decoder, variant.checkpointing)
    if variant.compile:
        torch._dynamo.reset()
        options.compile_parts(model)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-5)

    def step() -> Tensor:
        terms = model(batch)
        loss = terms.cross_entropy / batch.label_tokens + 50.0 * terms.decorrelation
        loss.backward()
        assert len(probe.sinks) == setting.layers
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def build(setting: Setting, variant: Variant, shared: dict[str, Any]) -> Any:
    """A ``SpeechLLM`` in training mode, entirely in the setting's dtype."""
    from avsr.config import LoraConfig, ModelConfig
    from avsr.models.llm import LoadedLLM
    from avsr.models.speech_llm import SpeechLLM

    if "llm" not in shared:
        shared["llm"] = random_llm(setting)

    def tokenizer(text: str, add_special_tokens: bool) -> Mapping[str, list[int]]:
        return {"input_ids": list(range(3, 3 + PROMPT))}

    class AllLogits(SpeechLLM):
        def label_states(self, batch: Any, rows: Any) -> tuple[Tensor, Tensor]:
            hidden = self.hidden_states(rows)
            targets = torch.full(hidden.shape[:2], -100, device=hidden.device)
            for row, (ids, span) in enumerate(zip(batch.text, rows.spans.tolist(), strict=True)):
                targets[row, span - 1 : span + len(ids)] = torch.tensor([*ids, self.eos], device=hidden.device)
            return hidden.flatten(0, 1), targets.flatten()

    torch.manual_seed(0)
    config = ModelConfig(lora=LoraConfig(rank=16, alpha=32.0))
    config.audio.compression = replace(config.audio.compression, rate=RATE)
    loaded = LoadedLLM(copy.deepcopy(shared["llm"]), tokenizer, bos=1, eos=2)
    kind = AllLogits if variant.all_logits else SpeechLLM
    ways = {"packed": variant.packed, "cross_entropy": variant.cross_entropy}
    model = kind(config, loaded, {"audio": WIDTH}, **ways).to(setting.device, setting.dtype)
    assert not (variant.all_logits and variant.packed)
    return model.train()


def make_batch(setting: Setting) -> Any:
    from avsr.data.batches import Example, collate

    generator = torch.Generator().manual_seed(0)
    examples = []
    for frames, text in setting.rows:
        ids = torch.randint(3, setting.model.vocabulary, (text,), generator=generator).tolist()
        utterance: Any = SimpleNamespace(duration=frames / 50)
        examples.append(Example(utterance, {"audio": torch.randn(frames, WIDTH, generator=generator)}, ids))
    return collate(examples)
