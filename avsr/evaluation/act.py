"""ACT at inference (Yu et al. 2024): which heads of a model are calibrated, and when.

The heads are read from a JSON file: ``heads`` is a list of [layer, head], both from 0; ``layers`` and
``heads_per_layer`` are the model's; ``beta`` and ``threshold`` are those of the search. Everything else that
:mod:`avsr.evaluation.act_search` writes there is for the reader.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avsr.config import Config
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM

logger = logging.getLogger("avsr")
Heads = list[tuple[int, int]]


def heads_file(config: Config) -> Path:
    """The file that ``act.heads`` names; for null and "all" the one that a search writes."""
    named = config.act.heads
    return Path(config.run, "act_heads.json") if named in (None, "all") else Path(str(named))


def size_of(model: SpeechLLM) -> tuple[int, int]:
    """(number of layers, query heads per layer)."""
    return len(model.decoder.model.layers), int(model.decoder.config.num_attention_heads)


def every_head(model: SpeechLLM) -> Heads:
    layers, heads = size_of(model)
    return [(layer, head) for layer in range(layers) for head in range(heads)]


@contextmanager
def calibrated(config: Config, model: SpeechLLM, heads: Heads | None = None) -> Iterator[dict[str, Any] | None]:
    """Calibrates ``model`` as ``config.act`` says inside this context; afterwards nothing is attached.

    Args:
        config: the run's.
        model: to be calibrated.
        heads: instead of those that ``act.heads`` names.

    Yields:
        beta, threshold and number of heads, or None with ``act.beta`` = 1, which leaves the model alone.

    Raises:
        UserError: the heads cannot be read or belong to another model.
    """
    act = config.act
    if act.beta == 1.0:
        yield None
        return
    if heads is None:
        heads = every_head(model) if act.heads == "all" else _read(config, model)
    try:
        if heads:
            probe = model.attach(attention=True, decorrelation=False, activations=False)
            probe.calibrate(heads, beta=act.beta, threshold=act.threshold)
        else:
            logger.warning("%s names no head: ACT changes nothing", heads_file(config))
        yield {"beta": act.beta, "threshold": act.threshold, "heads": len(heads)}
    finally:
        model.detach()


def _read(config: Config, model: SpeechLLM) -> Heads:
    path = heads_file(config)
    if not os.path.isfile(path):
        raise UserError(
            f"act.heads: {path} is missing; make it with 'avsr act-search {config.run}', or take act.heads=all"
        )
    try:
        held = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"act.heads: {path}: not a readable JSON file: {error}") from error
    layers, count = size_of(model)
    try:
        size = int(held["layers"]), int(held["heads_per_layer"])
        searched = float(held["beta"]), float(held["threshold"])
        heads = [(int(layer), int(head)) for layer, head in held["heads"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"act.heads: {path}: not a file of avsr act-search: {type(error).__name__} {error}") from error
    if size != (layers, count):
        raise UserError(
            f"act.heads: {path}: expected {layers} layers of {count} heads as in this model, got {size[0]} of {size[1]}"
        )
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise UserError(f"act.heads: {path}: there is no head [{layer}, {head}]")
    if searched != (config.act.beta, config.act.threshold):
        logger.warning("%s was searched with beta %g and threshold %g", path, *searched)
    return heads
