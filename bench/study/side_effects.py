"""What massive activations and adapters cost: WER with INT8 inputs, perplexity on plain English without speech."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from avsr.models.speech_llm import SpeechLLM

# documentation that every Python has, mostly ordinary prose
MODULES = ("argparse", "decimal", "email.message", "logging", "random", "statistics", "tarfile", "unittest", "uuid")
WINDOW = 256  # tokens after BOS


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
    """(exp of the mean negative log-likelihood of the tokens of ``text``, in windows after BOS; number of tokens)."""
    ids = model.tokenize(text)
    total = 0.0
    for first in range(0, len(ids), WINDOW):
        window = torch.tensor([[model.bos, *ids[first : first + WINDOW]]], device=model.device)
        logits = model.decoder(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(total / len(ids)), len(ids)


@contextmanager
def int8_inputs(decoder: nn.Module) -> Iterator[None]:
    """Inside, the inputs of every ``nn.Linear`` of the layers of ``decoder`` are rounded to 8 bits.

    Symmetric and dynamic with one scale per tensor, max |x| / 127 over the batch, as the per-tensor baseline of
    SmoothQuant (arXiv 2211.10438); weights stay as they are. One outlier coarsens the grid of all other values.
    """
    hooks = [module.register_forward_pre_hook(_round_input) for module in _linear(decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear(decoder: nn.Module) -> list[nn.Module]:
    """The linear layers; one with an adapter counts once, since the adapter would be merged."""
    layers: Any = decoder.layers
    found = dict(layers.named_modules())
    adapted = [name for name, module in found.items() if hasattr(module, "base_layer")]
    inside = tuple(f"{name}." for name in adapted)
    plain = [m for name, m in found.items() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return plain + [found[name] for name in adapted]


def rounded(x: Tensor) -> Tensor:
    """``x`` on 255 levels of one scale, in its own dtype."""
    scale = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (torch.round(x.float() / scale) * scale).to(x.dtype)


def _round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(args[0]), *args[1:])
