"""The batches of every step, in the order of training, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from avsr.data.batches import Batch, BatchSampler, collate
from avsr.errors import UserError
from avsr.training.checkpoint import Progress
from avsr.training.losses import Counts

if TYPE_CHECKING:
    from avsr.data.dataset import SpeechDataset

PREFETCH = 4  # batches that a loader process reads ahead: steps differ in length (bench/LOG.md)


@dataclass
class StepData:
    """What one rank computes a step from.

    Attributes:
        batches: its micro-batches.
        prompts: the prompt lengths of each.
        place: (step, epoch, step of the epoch), as in :class:`Progress`.
        seconds: that the host waited for the loader.
        counts: of all ranks, when they are known before the step begins.
    """

    batches: list[Batch]
    prompts: list[list[int]]
    place: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 0.0
    counts: Counts | None = None

    @property
    def tokens(self) -> int:
        """That the language model reads."""
        return sum(sum(n) + b.label_tokens - len(n) for n, b in zip(self.prompts, self.batches, strict=True))

    @property
    def audio_seconds(self) -> float:
        return sum(batch.seconds for batch in self.batches)


def feed(
    data: SpeechDataset, sampler: BatchSampler, rank: int, progress: Progress, *, workers: int, pinned: bool = False
) -> Iterator[tuple[tuple[int, int, int], list[Batch]]]:
    """The place (as in :class:`StepData`) and the micro-batches of every step after ``progress``, which stays as it is;
    with ``pinned`` in page-locked memory.

    Raises:
        UserError: a clip cannot be read, the loader processes cannot be started, or an epoch makes no step.
    """
    step, epoch, step_in_epoch = progress.step, progress.epoch, progress.step_in_epoch
    schedule = _Schedule(sampler, rank, epoch, step_in_epoch)
    loader = DataLoader(
        data,
        batch_sampler=schedule,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pinned,
        # separate, so that making a loader after a resume draws nothing from the model's
        generator=torch.Generator().manual_seed(sampler.seed + epoch),
    )
    batches: list[Batch] = []
    for batch in _plain_errors(_started(loader)):
        batches.append(batch)
        if len(batches) < sampler.accumulation:
            continue
        if step_in_epoch == schedule.steps[epoch]:
            epoch, step_in_epoch = epoch + 1, 0
        step, step_in_epoch = step + 1, step_in_epoch + 1
        yield (step, epoch, step_in_epoch), batches
        batches = []
    if schedule.failure is not None:
        raise schedule.failure


class _Schedule:
    """The micro-batches of one rank, each a list of (utterance, epoch): without end, so that the loader processes go on
    from epoch to epoch. ``steps`` holds the number of steps of every epoch that was begun.

    It ends before a later epoch that cannot make a step, and ``failure`` says why: loaders ask for batches long before
    they are trained, perhaps never."""

    def __init__(self, sampler: BatchSampler, rank: int, epoch: int, step: int) -> None:
        self.steps: dict[int, int] = {}
        self.failure: UserError | None = None
        self._sampler, self._rank, self._start = sampler, rank, (epoch, step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self._start
        while True:
            try:
                steps = self._sampler.epoch_steps(epoch, self._rank)
            except UserError as error:
                self.failure = error
                return
            self.steps[epoch] = len(steps)
            for number in range(step, len(steps)):
                for batch in steps[number]:
                    yield [(index, epoch) for index in batch]
            epoch, step = epoch + 1, 0


def _started(loader: DataLoader[Any]) -> Iterator[Batch]:
    try:
        if loader.num_workers:
            torch.multiprocessing.get_context().Lock()  # where this fails, the loader also prints a traceback
        return iter(loader)
    except OSError as error:
        raise UserError(
            f"data.workers = {loader.num_workers}: cannot start the loader processes ({error}); they need shared "
            "memory in /dev/shm (docker run --shm-size=8g); or set data.workers=0"
        ) from error


def _plain_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Strips the traceback that a loader process adds to the message of a UserError."""
    try:
        yield from batches
    except UserError as error:
        kind = type(error)
        raise UserError(str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")[2].strip()) from None
