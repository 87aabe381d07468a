"""Micro-batches within a frame budget, and their content.

The budget bounds the padded area of a batch: the number of utterances times the length of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from avsr.data.manifest import Utterance
from avsr.data.stopwatch import stage
from avsr.errors import UserError

Numbers = np.ndarray[Any, Any]
_WINDOW = 64  # utterances looked at for one batch, or more if all of them fit


@dataclass(frozen=True)
class Example:
    """One utterance ready for a batch: features (T, D) or encoder inputs (T, K) of its task's streams, and the token
    ids of its text without special tokens."""

    utterance: Utterance
    features: dict[str, Tensor]
    text: list[int]
    task: str = "audio"


@dataclass(frozen=True)
class Lost:
    """Takes the place of an example whose clip could not be read when the batch was made."""

    utterance: Utterance
    task: str
    reason: str


@dataclass
class Batch:
    """B utterances. ``features[stream]`` is (B, T, D), zero-padded on the right; ``lengths[stream]`` (B,) int64
    counts frames, 0 where an utterance's task lacks the stream; ``text`` holds token ids without special tokens.

    A batch that lost all its utterances is a dummy: one row with a prompt but neither speech nor text. It contributes
    nothing, but all ranks have to run the same number of forward passes.
    """

    utterances: list[Utterance]
    features: dict[str, Tensor]
    lengths: dict[str, Tensor]
    text: list[list[int]]
    tasks: list[str]
    lost: list[Lost] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """With its features in page-locked memory; torch's loader calls it when asked to pin."""
        return replace(self, features={name: rows.pin_memory() for name, rows in self.features.items()})

    @property
    def is_dummy(self) -> bool:
        """Whether all its utterances were lost."""
        return not self.utterances

    @property
    def seconds(self) -> float:
        return sum(utterance.duration for utterance in self.utterances)

    @property
    def label_tokens(self) -> int:
        """Text tokens, and one end token per utterance."""
        return 0 if self.is_dummy else sum(len(ids) + 1 for ids in self.text)


def collate(found: Sequence[Example | Lost]) -> Batch:
    """Pads examples to one batch; a stream that an example lacks gets length 0."""
    lost = [item for item in found if isinstance(item, Lost)]
    examples = [item for item in found if isinstance(item, Example)]
    if not examples:
        return Batch([], {}, {}, [[]], [lost[0].task], lost)
    with stage("collate"):
        features, lengths = _padded(examples)
    utterances, text, tasks = ([getattr(e, key) for e in examples] for key in ("utterance", "text", "task"))
    return Batch(utterances, features, lengths, text, tasks, lost)


def _padded(examples: Sequence[Example]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and lengths of a batch by stream."""
    features, lengths = {}, {}
    for name in dict.fromkeys(name for example in examples for name in example.features):
        present = [example.features[name] for example in examples if name in example.features]
        empty = present[0][:0]
        rows = [example.features.get(name, empty) for example in examples]
        features[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths[name] = torch.tensor([len(row) for row in rows])
    return features, lengths


def make_batches(
    sizes: Sequence[int] | Numbers, max_frames: int, max_utterances: int, rng: random.Random | None = None
) -> list[list[int]]:
    """Groups indices of utterances so that (utterances x largest size) is at most ``max_frames`` in every batch.

    Utterances of similar size share a batch, which keeps padding small. With ``rng``, sizes are jittered by up to 5%
    either way before they are sorted, and the batches are shuffled; without it everything is ordered by size.

    Raises:
        UserError: one utterance alone has more than ``max_frames``.
    """
    return [batch.tolist() for batch in _grouped(np.asarray(sizes), max_frames, max_utterances, rng)]


def _grouped(sizes: Numbers, max_frames: int, max_utterances: int, rng: random.Random | None) -> list[Numbers]:
    """As :func:`make_batches`, in arrays that share the memory of one."""
    if len(sizes) and sizes.max() > max_frames:
        size = next(size for size in sizes.tolist() if size > max_frames)
        raise UserError(f"an utterance of {size} frames does not fit training.frames = {max_frames}")
    lengths = sizes
    if rng is not None:
        lengths = sizes * (0.95 + (1.05 - 0.95) * np.fromiter((rng.random() for _ in sizes), float, len(sizes)))
    order = np.argsort(lengths, kind="stable")
    ordered = sizes[order]
    batches = []
    first = 0
    while first < len(order):
        window = ordered[first : first + min(max_utterances, _WINDOW)]
        count = _fitting(window, max_frames)
        while count == len(window) < max_utterances and first + count < len(order):  # of very short ones
            window = ordered[first : first + min(max_utterances, 2 * count)]
            count = _fitting(window, max_frames)
        batches.append(order[first : first + count])
        first += count
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _fitting(sizes: Numbers, max_frames: int) -> int:
    """How many of ``sizes``, from the first on, fit a batch: their number times the largest of them."""
    areas = np.maximum.accumulate(sizes) * np.arange(1, len(sizes) + 1)
    beyond = areas > max_frames
    return int(beyond.argmax()) if beyond.any() else len(sizes)


@dataclass(frozen=True)
class BatchSampler:
    """Assigns batches to ranks and micro-steps; one seed gives the same schedule on any machine.

    A step takes ``world * accumulation`` batches of the epoch's list. The rest of an epoch is dropped; the shuffle
    leaves out others in the next one.
    """

    sizes: Numbers  # (N,) int64
    max_frames: int
    max_utterances: int
    seed: int
    world: int = 1
    accumulation: int = 1

    def epoch_steps(self, epoch: int, rank: int) -> Steps:
        """All steps of an epoch for ``rank``.

        Raises:
            UserError: the epoch has fewer batches than one step needs.
        """
        rng = random.Random(f"{self.seed} {epoch}")
        batches = _grouped(np.asarray(self.sizes), self.max_frames, self.max_utterances, rng)
        per_step = self.world * self.accumulation
        if len(batches) < per_step:
            raise UserError(
                f"{len(self.sizes)} utterances make {len(batches)} batches, but one step of {self.world} ranks x "
                f"training.accumulation = {self.accumulation} needs {per_step}; lower training.frames, "
                "training.utterances or training.accumulation"
            )
        return Steps(batches[rank :: self.world], self.accumulation, len(batches) // per_step)


@dataclass(frozen=True)
class Steps(Sequence[list[list[int]]]):
    """The steps of one rank, each a list of micro-batches, made when it is asked for."""

    batches: list[Numbers]
    accumulation: int
    total: int

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, index: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(index, slice):
            return [self[place] for place in range(self.total)[index]]
        first = range(self.total)[index] * self.accumulation
        return [batch.tolist() for batch in self.batches[first : first + self.accumulation]]
