"""A speech LLM on the tiny Llama whose adapters do something, and utterances of random features for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from avsr.config import CompressionConfig, EncoderConfig, LLMConfig, LoraConfig, ModelConfig, StreamConfig
from avsr.config import ProjectorConfig as Projector
from avsr.data.batches import Example
from avsr.data.manifest import Utterance
from avsr.models.llm import load_llm
from avsr.models.speech_llm import SpeechLLM

WIDTH = 32


@pytest.fixture(scope="session")
def speech_llm(tiny_llm: Path) -> Callable[..., SpeechLLM]:
    def make(folder: Path = tiny_llm, adapters: float = 0.3, biases: float = 0.3) -> SpeechLLM:
        """``adapters`` and ``biases`` are standard deviations: of LoRA, and of the projector's vectors."""
        config = ModelConfig(
            audio=StreamConfig(EncoderConfig(name="none"), CompressionConfig(rate=4)),
            llm=LLMConfig(name=str(folder)),
            projector=Projector(hidden=16),
            lora=LoraConfig(rank=4, dropout=0.3),
        )
        torch.manual_seed(0)
        model = SpeechLLM(config, load_llm(config.llm), {"audio": WIDTH})
        with torch.no_grad():
            for name, parameter in model.own_state().items():
                if "lora_" in name:
                    parameter.normal_(0, adapters)
                elif name.startswith("projectors.") and parameter.dim() == 1:
                    parameter.normal_(0, biases)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[Example]]:
    """``make_examples(seconds, texts, tokenize)``: random features of these durations, without texts by default."""

    def make(
        seconds: Sequence[float], texts: Sequence[str] = (), tokenize: Callable[[str], list[int]] = lambda text: []
    ) -> list[Example]:
        generator = torch.Generator().manual_seed(7)
        return [
            Example(
                Utterance(id=f"u{i}", audio=Path(f"u{i}.wav"), text=text, duration=duration),
                {"audio": 3 * torch.randn(round(duration * 50), WIDTH, generator=generator)},
                tokenize(text),
            )
            for i, (duration, text) in enumerate(zip(seconds, texts or [""] * len(seconds), strict=True))
        ]

    return make


class TokenIds:
    """A tokenizer whose text is the token ids themselves: nothing is left out or stripped."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def ids_as_text(monkeypatch: pytest.MonkeyPatch) -> Callable[[SpeechLLM], None]:
    """Makes a model decode into the token ids themselves, for the rest of the test."""
    return lambda model: monkeypatch.setattr(model, "tokenizer", TokenIds())
