"""The projector that all trainings of the study begin with: it points to the embeddings of the words spoken.

A cold projector needs most of a training of this size to find the language model's embedding space, and WER does not
settle. The corpus knows when each word was said: every speech token is taught the sum of the mean token embeddings of
the words that overlap it, weighted by the overlap (cosine loss). No decoder layer takes part, so nothing is decided
about sinks.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avsr.build import build_model, build_store, pick_device
from avsr.config import Config
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import UserError
from avsr.models.compression import compress
from avsr.models.llm import LoadedLLM

logger = logging.getLogger("avsr")

STEPS, ROWS, LEARNING_RATE = 1000, 512, 2e-3
SMALLEST = 0.2  # norm of a target; below it hardly a word is heard
FRAMES_PER_SECOND = 50  # of Whisper


def warm_projector(config: Config, path: Path) -> Path:
    """Trains the audio projector of ``config`` and writes its weights to ``path`` (safetensors), unless they are there.

    Raises:
        UserError: the corpus has no word times.
    """
    if path.is_file():
        return path
    device = pick_device()
    store = build_store(config, device)
    model, loaded = build_model(config, store, device)
    compression = config.model.audio.compression
    table = model.decoder.get_input_embeddings().weight.float()
    dataset = load_dataset(
        config.data.train,
        config.data,
        store,
        loaded.tokenize,
        title="read train",
        reading=Reading("audio"),
        refuse=model.refuse,
    )
    inputs, targets = [], []
    for index, utterance in enumerate(dataset.utterances):
        if utterance.times is None:
            raise UserError(f"{utterance.where}: {utterance.id} has no word times")
        tokens = compress(dataset[index].features["audio"].float()[None], compression.kind, compression.rate)[0]
        words = json.loads(utterance.times.read_text(encoding="utf-8"))["words"]
        inputs.append(tokens)
        targets.append(_targets(words, len(tokens), compression.rate / FRAMES_PER_SECOND, table, loaded))
    loss = _fit(model.projectors["audio"].float(), torch.cat(inputs), torch.cat(targets))
    logger.info("%s: 1 - cosine to the words' embeddings %.3f", path, loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.projectors["audio"].state_dict().items()}, path)
    return path


def load_projector(projector: torch.nn.Module, path: Path) -> None:
    projector.load_state_dict(load_file(path))


def _targets(
    words: list[tuple[str, float, float]], count: int, seconds: float, table: Tensor, llm: LoadedLLM
) -> Tensor:
    """(count, C): of tokens of so many seconds each."""
    targets = torch.zeros(count, table.shape[1])
    for word, start, end in words:
        embedding = table[torch.tensor(llm.tokenize(f" {word}"))].mean(dim=0)
        first = torch.arange(count) * seconds
        overlap = (first + seconds).clamp(max=end) - first.clamp(min=start)
        targets += (overlap.clamp(min=0) / (end - start))[:, None] * embedding
    return targets


def _fit(projector: torch.nn.Module, inputs: Tensor, targets: Tensor) -> float:
    heard = targets.norm(dim=1) > SMALLEST
    inputs, targets = inputs[heard], targets[heard]
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    loss = torch.zeros(())
    for _ in range(STEPS):
        rows = torch.randint(len(inputs), (ROWS,), generator=random)
        loss = 1 - torch.cosine_similarity(projector(inputs[rows]), targets[rows]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return float(loss.detach())
