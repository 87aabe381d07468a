"""A projector pretrained to map speech to the embeddings of the spoken words, as initial weights for training.

A random projector needs most of a small training run to find the language model's embedding space. If the corpus has
word times (``avsr synth`` writes them), the target of every speech token is the sum of the mean token embeddings of the
words that overlap it, weighted by the overlap (cosine loss). No decoder layer takes part, so sinks are not affected.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from avsr.config import Config
from avsr.data.dataset import Reading, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.members import read_text
from avsr.errors import UserError
from avsr.models.build import build_model, build_store, pick_device
from avsr.models.compression import compress
from avsr.models.llm import LoadedLLM
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.progress import ProgressBar
from avsr.runtime.tensors import save_file

logger = logging.getLogger("avsr")

STEPS, ROWS, LEARNING_RATE = 1000, 512, 2e-3
SMALLEST = 0.2  # norm of a target; below it a token hardly overlaps any word
STREAM = "audio"


def warm_projector(config: Config, path: Path, steps: int = STEPS) -> Path:
    """Trains the audio projector of ``config`` on ``data.train`` and writes its weights to ``path`` (safetensors, named
    as in a checkpoint, for ``training.initial_weights``), unless the file is there.

    Raises:
        UserError: the corpus has no word times, or the task has no sound.
    """
    if path.is_file():
        return path
    if STREAM not in config.model.streams:
        raise UserError(f"model.task = {config.model.task} has no projector for sound to teach")
    if config.data.cache is None:
        raise UserError("data.cache: the projector is taught from cached features; name a folder for them")
    device = pick_device()
    store = build_store(config, device)
    model, loaded = build_model(config, store, device)
    inputs, targets = _pairs(config, store.encoders[STREAM].frames_per_second, model, loaded, store)
    projector = model.projectors[STREAM].float()
    loss = _fit(projector, inputs.to(device), targets.to(device), steps)
    logger.info("%s: 1 - cosine to the words' embeddings %.3f", path, loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"projectors.{STREAM}.{name}": value.cpu().contiguous() for name, value in projector.state_dict().items()}
    save_file(state, path)
    return path


def _pairs(
    config: Config, frames_per_second: float, model: SpeechLLM, loaded: LoadedLLM, store: FeatureStore
) -> tuple[Tensor, Tensor]:
    """Speech tokens of the whole training set (N, features) and their targets (N, C)."""
    compression = config.model.streams[STREAM].compression
    table = model.decoder.get_input_embeddings().weight.detach().float().cpu()
    dataset = load_dataset(
        config.data.train,
        config.data,
        store,
        loaded.tokenize,
        title="read train",
        reading=Reading(config.model.task),
        refuse=model.layout.unusable,
    )
    inputs, targets = [], []
    for index, utterance in enumerate(dataset.utterances):
        if utterance.times is None:
            raise UserError(f"{utterance.where}: {utterance.id} has no word times")
        tokens = compress(dataset[index].features[STREAM].float()[None], compression.kind, compression.rate)[0]
        words = json.loads(read_text(utterance.times))["words"]
        inputs.append(tokens)
        targets.append(_targets(words, len(tokens), compression.rate / frames_per_second, table, loaded))
    return torch.cat(inputs), torch.cat(targets)


def _targets(
    words: list[tuple[str, float, float]], count: int, seconds: float, table: Tensor, llm: LoadedLLM
) -> Tensor:
    """(count, C) targets of tokens of so many seconds each."""
    targets = torch.zeros(count, table.shape[1])
    for word, start, end in words:
        embedding = table[torch.tensor(llm.tokenize(f" {word}"))].mean(dim=0)
        first = torch.arange(count) * seconds
        overlap = (first + seconds).clamp(max=end) - first.clamp(min=start)
        targets += (overlap.clamp(min=0) / (end - start))[:, None] * embedding
    return targets


def _fit(projector: torch.nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> float:
    heard = targets.norm(dim=1) > SMALLEST
    inputs, targets = inputs[heard], targets[heard]
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    loss = torch.zeros(())
    with ProgressBar("teach the projector", steps) as bar:
        for _ in range(steps):
            rows = torch.randint(len(inputs), (ROWS,), generator=random)
            loss = 1 - torch.cosine_similarity(projector(inputs[rows]), targets[rows]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.advance()
    return float(loss.detach())
