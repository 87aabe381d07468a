"""Perplexity of the adapted language model on plain English, without speech."""

from __future__ import annotations

import importlib
import inspect
import math

import torch

from avsr.models.speech_llm import SpeechLLM

# Documentation that every Python brings along; ordinary prose for the most part.
MODULES = ("argparse", "decimal", "email.message", "logging", "random", "statistics", "tarfile", "unittest", "uuid")
WINDOW = 256  # tokens behind BOS


def plain_text() -> str:
    """Docstrings of modules of the standard library and of their classes."""
    parts = []
    for name in MODULES:
        module = importlib.import_module(name)
        members = [member for _, member in sorted(vars(module).items()) if inspect.isclass(member)]
        own = [member for member in members if member.__module__ == name]
        parts += [inspect.cleandoc(item.__doc__) for item in (module, *own) if item.__doc__]
    return "\n\n".join(parts)


@torch.no_grad()
def perplexity(model: SpeechLLM, text: str) -> tuple[float, int]:
    """exp of the mean negative log-likelihood (nats) of the tokens of ``text``, in windows behind BOS; their number."""
    ids = model.tokenize(text)
    total = 0.0
    for first in range(0, len(ids), WINDOW):
        window = torch.tensor([[model.bos, *ids[first : first + WINDOW]]], device=model.device)
        logits = model.decoder(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(total / len(ids)), len(ids)
