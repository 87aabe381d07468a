"""The training loop: steps, validation, checkpoints."""

from __future__ import annotations

import logging
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from avsr.config import Config
from avsr.data.batches import Batch, BatchSampler, collate, make_batches
from avsr.errors import Interrupted, UserError
from avsr.models.speech_llm import SpeechLLM, Terms
from avsr.runtime.progress import ProgressBar
from avsr.training import checkpoint
from avsr.training.checkpoint import Progress
from avsr.training.faults import LostClips, Nonfinite, explained
from avsr.training.losses import Counts, all_max, all_sum, count_step, decorrelated_tokens, scaled
from avsr.training.metrics import MetricsLogger, peak_memory_mb
from avsr.training.stages import Stages
from avsr.training.term_gradients import TermGradients
from avsr.training.watchdog import Watchdog

if TYPE_CHECKING:
    from avsr.data.dataset import SpeechDataset

logger = logging.getLogger("avsr")
PREFETCH = 4  # batches that a loader process reads ahead: steps differ in length (bench/LOG.md)


class Trainer:
    """Runs ``training.steps`` optimizer steps of ``engine`` over ``train``."""

    def __init__(
        self,
        engine: Any,
        config: Config,
        train: SpeechDataset,
        validation: SpeechDataset,
        progress: Progress,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.engine = engine
        self.model: SpeechLLM = engine.module
        self.config, self.settings = config, config.training
        self.train, self.validation = train, validation
        self.progress = progress
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = self.model.device
        self._stop = 0  # the signal that asked to stop
        self._asked = -math.inf  # when Ctrl-C last asked
        self._log: MetricsLogger | None = None
        self._watchdog = watchdog or Watchdog(timeout=0)
        self._stages = Stages(self._watchdog)
        self._lost = LostClips(Path(config.run))
        self._nonfinite = Nonfinite(Path(config.run), config.training.skip_nonfinite)
        settings = self.settings
        self.sampler = BatchSampler(
            train.sizes, settings.frames, settings.utterances, settings.seed, self.world, settings.accumulation
        )

    def fit(self) -> None:
        """Trains to the end, or until SIGINT or SIGTERM, after which a checkpoint is written.

        Raises:
            Interrupted: after a signal.
            UserError: out of memory, a loader process died, too many steps were not finite, or the last checkpoint
                cannot be written.
        """
        if self.progress.step >= self.settings.steps:
            logger.info("%s has all its %d steps", self.config.run, self.settings.steps)
            return
        resumed = self.progress.step if self.config.resume else None
        if self.rank == 0:
            self._log = MetricsLogger(Path(self.config.run), self.config.log, resume_at=resumed)
        before = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self._watchdog.enter("data", self.progress.step + 1)
        try:
            with (
                ProgressBar("train", self.settings.steps, done=self.progress.step, shown=self.rank == 0) as bar,
                explained(self.engine, self.config, self.progress),
            ):
                self._loop(bar)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._log is not None:
                self._log.close()

    def _loop(self, bar: ProgressBar) -> None:
        settings, progress = self.settings, self.progress
        waiting = time.perf_counter()
        for batches in self.batches():
            started = time.perf_counter()
            row, stop = self.step(batches)
            row["seconds"] = time.perf_counter() - started
            row["wait_seconds"] = started - waiting
            last = progress.step == settings.steps
            validated = progress.step % settings.validate_every == 0 or last
            before, better, progress.validation = progress.best, False, None
            if validated:
                row.update(self.validate())
                progress.validation = row["validation_ce"]
                finite = math.isfinite(progress.validation)
                better = finite and (progress.best is None or progress.validation < progress.best)
                progress.best = progress.validation if better else progress.best
            if self._log is not None:
                self._log.write(row)
            bar.advance(1, _note(row))
            stop = self._told_to_stop() if validated else stop  # a validation may take long
            every = settings.save_every
            if better or stop or last or (validated if not every else progress.step % every == 0):
                with self._stages.enter("checkpoint", progress.step):
                    failure = checkpoint.save(self.engine, self.config, progress, best=better)
                if failure:
                    progress.best = before
                    self._cannot_save(failure, end=last or bool(stop))
                stop = self._told_to_stop()
            if stop and not last:
                raise Interrupted(stop)
            if last:
                return
            waiting = time.perf_counter()
            self._watchdog.enter("data", progress.step + 1)

    def _cannot_save(self, failure: str, *, end: bool) -> None:
        if end:
            raise UserError(f"{failure}; what was trained since the last checkpoint is lost, resume=true repeats it")
        if self.rank == 0:
            logger.error("%s; training goes on, the old checkpoint stays", failure)

    def batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of every step, from the current progress on, epoch after epoch."""
        progress = self.progress
        schedule = _Schedule(self.sampler, self.rank, progress.epoch, progress.step_in_epoch)
        loader = DataLoader(
            self.train,
            batch_sampler=schedule,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=self.config.data.workers,
            prefetch_factor=PREFETCH if self.config.data.workers else None,
            # separate, so that making a loader after a resume draws nothing from the model's
            generator=torch.Generator().manual_seed(self.settings.seed + progress.epoch),
        )
        batches: list[Batch] = []
        for batch in _plain_errors(_started(loader)):
            batches.append(batch)
            if len(batches) < self.settings.accumulation:
                continue
            if progress.step_in_epoch == schedule.steps[progress.epoch]:
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            progress.step_in_epoch += 1
            progress.step += 1
            yield batches
            batches = []
        if schedule.failure is not None:
            raise schedule.failure

    def step(self, batches: list[Batch]) -> tuple[dict[str, Any], int]:
        """Runs one optimizer step. Returns the metrics row, and the signal that asked any rank to stop, or 0."""
        self.engine.train()
        step, enter = self.progress.step, self._stages.enter
        prompts = [self.model.prompt_lengths(batch) for batch in batches]
        with enter("counts", step):
            counts = count_step(batches, prompts, self.device)
            if counts.lost:
                self._lost.add(step, [item for batch in batches for item in batch.lost])
        every = self.settings.gradient_norms_every
        split = TermGradients(self.model) if every and step % every == 0 else None
        sums = torch.zeros(3, dtype=torch.float64)  # cross entropy, decorrelation, correct
        for batch, lengths in zip(batches, prompts, strict=True):
            with enter("forward", step):
                terms: Terms = self.engine(batch)
                cross_entropy, decorrelation = scaled(terms.cross_entropy, terms.decorrelation, lengths, counts)
                loss = cross_entropy
                if decorrelation is not None:
                    loss = loss + self.config.loss.decorrelation * decorrelation
                    sums[1] += float(terms.decorrelation.detach()) * decorrelated_tokens(lengths)  # type: ignore[union-attr]
                sums[0] += float(terms.cross_entropy.detach())
                sums[2] += int(terms.correct)
            if split is not None:
                split.add(*scaled(terms.own.cross_entropy, terms.own.decorrelation, lengths, counts), counts.parts)
            with enter("backward", step):
                self.engine.backward(loss)
            with enter("optimizer", step):
                norm = self._update()
        seconds = sum(batch.seconds for batch in batches)
        tokens = sum(sum(n) + b.label_tokens - len(n) for n, b in zip(prompts, batches, strict=True))
        with enter("metrics", step):
            totals = all_sum([*sums.tolist(), seconds, tokens], self.device)
        row = self._row(totals, counts, norm)
        if split is not None:
            row.update(split.norms(self.config.loss.decorrelation))
        if not math.isfinite(row["loss"]) or norm is None or not math.isfinite(norm):
            self._nonfinite.add(self.progress, row, batches, sums)
        return row, self._told_to_stop()

    def _told_to_stop(self) -> int:
        """Collective. The signal that asked any rank to stop, or 0."""
        return int(all_max(self._stop, self.device))

    def _update(self) -> float | None:
        """Ends a micro-batch. The last one of a step updates the weights and returns the gradient's norm; with a
        gradient that is not finite no weight changes, but the schedule advances."""
        engine = self.engine
        boundary = engine.is_gradient_accumulation_boundary()
        norm = self._plain_norm() if boundary else None
        if norm is not None and not math.isfinite(norm):
            with _idle(engine.optimizer):
                engine.step()
        else:
            engine.step()
        if not boundary:
            return None
        if not engine.was_step_applied():
            if engine.lr_scheduler is not None:
                engine.lr_scheduler.step()
            return math.inf
        return float(engine.get_global_grad_norm()) if norm is None else norm

    def _row(self, totals: list[float], counts: Counts, norm: float | None) -> dict[str, Any]:
        progress, weight = self.progress, self.config.loss.decorrelation
        labels = counts.labels or math.nan
        progress.clipped += norm is not None and norm > self.settings.clip
        row: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, "ce": totals[0] / labels}
        if weight:
            row["decorrelation"] = totals[1] / max(counts.decorrelated, 1)
        row["loss"] = row["ce"] + weight * row.get("decorrelation", 0.0)
        row["accuracy"] = totals[2] / labels
        row["lr"] = self.engine.get_lr()[0]
        row["grad_norm"] = norm
        row["clipped_share"] = progress.clipped / progress.step
        row["audio_seconds"], row["tokens"] = totals[3], int(totals[4])
        if counts.lost:
            row["lost"] = counts.lost
        row["peak_memory_mb"] = peak_memory_mb()
        return row

    def _plain_norm(self) -> float | None:
        """The gradient's norm if DeepSpeed does not compute it: in float32 without ZeRO."""
        engine = self.engine
        if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
            return None
        norms = [p.grad.norm() for p in self.model.trainable().values() if p.grad is not None]
        return float(torch.stack(norms).norm())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cross entropy and accuracy over the whole validation set, and decorrelation if it is trained."""
        self.engine.eval()
        order = make_batches(self.validation.sizes, self.settings.frames, self.settings.utterances)
        mine = order[self.rank :: self.world]
        rounds = -(-len(order) // self.world)  # under ZeRO-3 all ranks must run the same number of forwards
        sums, lost = [0.0] * 6, []
        for index in range(rounds):
            own = index < len(mine)
            with self._stages.enter("validation", self.progress.step):
                batch = collate([self.validation[i] for i in (mine[index] if own else order[0])])
                terms: Terms = self.engine(batch)
            if not own:
                continue
            count = decorrelated_tokens(self.model.prompt_lengths(batch))
            values = [float(terms.cross_entropy), int(terms.correct), batch.label_tokens, 0.0, count, len(batch.lost)]
            lost += batch.lost
            if terms.decorrelation is not None:
                values[3] = float(terms.decorrelation) * count
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        ce, correct, labels, decorrelation, counted, lost_clips = all_sum(sums, self.device)
        if lost_clips:
            self._lost.add(self.progress.step, lost)
        labels = labels or math.nan
        row = {"validation_ce": ce / labels, "validation_accuracy": correct / labels}
        if self.config.loss.decorrelation:
            row["validation_decorrelation"] = decorrelation / max(counted, 1)
        return row

    def _interrupt(self, number: int, frame: Any) -> None:
        # launcher and scheduler may each send one; only a later second Ctrl-C means to stop at once
        if number == signal.SIGINT:
            now = time.monotonic()
            if math.isfinite(self._asked) and now - self._asked > 1.0:
                raise KeyboardInterrupt
            self._asked = now
        if not self._stop:
            logger.warning("stopping after this step; a checkpoint will be written")
        self._stop = max(self._stop, number)


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


@contextmanager
def _idle(optimizer: Any) -> Iterator[None]:
    """Inside this context the optimizer's steps change nothing."""
    step, optimizer.step = optimizer.step, lambda: None
    try:
        yield
    finally:
        optimizer.step = step


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


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _note(row: dict[str, Any]) -> str:
    if row.get("skipped"):
        return "skipped: not finite"
    parts = [f"ce {row['ce']:.3f}"]
    if "decorrelation" in row:
        parts.append(f"decorrelation {row['decorrelation']:.4f}")
    if "validation_ce" in row:
        parts.append(f"validation {row['validation_ce']:.3f}")
    return "  ".join([*parts, f"{row['audio_seconds'] / row['seconds']:.0f} audio s/s"])
