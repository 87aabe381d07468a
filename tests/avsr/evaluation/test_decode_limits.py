"""What ends decoding with one line: too little memory, logits that are NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from avsr.config import DecodeConfig
from avsr.data.batches import Example
from avsr.errors import UserError
from avsr.evaluation.decode import transcribe
from avsr.models.speech_llm import SpeechLLM

SECONDS = [0.4, 1.3, 0.4, 2.2, 0.7, 0.9, 0.3]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_names_what_to_lower(
    speech_llm: Callable[..., SpeechLLM],
    make_examples: Callable[..., list[Example]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    model, examples = speech_llm(), make_examples(SECONDS)

    def generate(**_: object) -> None:
        raise error

    monkeypatch.setattr(model.llm, "generate", generate)
    config = DecodeConfig(beams=5, batch=3)
    with pytest.raises(UserError) as caught:
        next(transcribe(model, examples.__getitem__, SECONDS, config))
    message = str(caught.value)
    assert message.startswith("out of memory while decoding 3 utterances of up to 0.4 s (") and "\n" not in message
    assert message.endswith("lower decode.batch = 3 or decode.beams = 5")
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        next(transcribe(model, examples.__getitem__, SECONDS, config))


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_nan_are_no_text(
    speech_llm: Callable[..., SpeechLLM], make_examples: Callable[..., list[Example]], beams: int
) -> None:
    """Finite weights can overflow; an empty text would be scored like any other."""
    model = speech_llm()
    with torch.no_grad():
        model.decoder.lm_head.weight.fill_(1e38)
    with pytest.raises(UserError, match="logits are NaN.*training.precision=fp32"):
        next(transcribe(model, make_examples(SECONDS).__getitem__, SECONDS, DecodeConfig(beams=beams, nbest=beams)))
