"""Micro-batches within a frame budget, and their content.

The budget bounds the padded area of a batch: the number of utterances times the length of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from avsr.data.manifest import Utterance
from avsr.errors import UserError


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
    features, lengths = {}, {}
    for name in dict.fromkeys(name for example in examples for name in example.features):
        present = [example.features[name] for example in examples if name in example.features]
        empty = present[0][:0]
        rows = [example.features.get(name, empty) for example in examples]
        features[name] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths[name] = torch.tensor([len(row) for row in rows])
    utterances, text, tasks = ([getattr(e, key) for e in examples] for key in ("utterance", "text", "task"))
    return Batch(utterances, features, lengths, text, tasks, lost)


def make_batches(
    sizes: Sequence[int], max_frames: int, max_utterances: int, rng: random.Random | None = None
) -> list[list[int]]:
    """Groups indices of utterances so that (utterances x largest size) is at most ``max_frames`` in every batch.

    Utterances of similar size share a batch, which keeps padding small. With ``rng``, sizes are jittered by up to 5%
    either way before they are sorted, and the batches are shuffled; without it everything is ordered by size.

    Raises:
        UserError: one utterance alone has more than ``max_frames``.
    """
    lengths = np.asarray(sizes)
    if rng is not None:
        lengths = lengths * (0.95 + (1.05 - 0.95) * np.array([rng.random() for _ in sizes]))  # as of rng.uniform
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for index in np.argsort(lengths, kind="stable").tolist():
        size = sizes[index]
        if size > longest:
            longest = size
            if size > max_frames:
                raise UserError(f"an utterance of {size} frames does not fit training.frames = {max_frames}")
        if current and (longest * (len(current) + 1) > max_frames or len(current) >= max_utterances):
            batches.append(current)
            current, longest = [], size
        current.append(index)
    if current:
        batches.append(current)
    if rng is not None:
        rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class BatchSampler:
    """Assigns batches to ranks and micro-steps; one seed gives the same schedule on any machine.

    A step takes ``world * accumulation`` batches of the epoch's list. The rest of an epoch is dropped; the shuffle
    leaves out others in the next one.
    """

    sizes: tuple[int, ...]
    max_frames: int
    max_utterances: int
    seed: int
    world: int = 1
    accumulation: int = 1

    def epoch_steps(self, epoch: int, rank: int) -> list[list[list[int]]]:
        """All steps of an epoch for ``rank``.

        Raises:
            UserError: the epoch has fewer batches than one step needs.
        """
        batches = self._epoch(epoch)
        per_step = self.world * self.accumulation
        if len(batches) < per_step:
            raise UserError(
                f"{len(self.sizes)} utterances make {len(batches)} batches, but one step of {self.world} ranks x "
                f"training.accumulation = {self.accumulation} needs {per_step}; lower training.frames, "
                "training.utterances or training.accumulation"
            )
        return [
            [batches[first + micro * self.world + rank] for micro in range(self.accumulation)]
            for first in range(0, len(batches) - per_step + 1, per_step)
        ]

    def _epoch(self, epoch: int) -> list[list[int]]:
        return make_batches(self.sizes, self.max_frames, self.max_utterances, random.Random(f"{self.seed} {epoch}"))
