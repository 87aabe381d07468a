"""The training loop: steps, validation, checkpoints."""

from __future__ import annotations

import logging
import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from avsr.config import Config
from avsr.data.batches import Batch, BatchSampler, collate, make_batches
from avsr.errors import Interrupted, UserError
from avsr.models.speech_llm import SpeechLLM, Terms
from avsr.runtime.progress import ProgressBar
from avsr.runtime.transfer import Carrier, Later
from avsr.training import checkpoint
from avsr.training.attention_shares import AttentionShares
from avsr.training.checkpoint import Progress
from avsr.training.faults import LostClips, Nonfinite, explained
from avsr.training.feed import StepData, feed
from avsr.training.launched import Launched
from avsr.training.losses import Counts, Sums, all_counts, all_max, all_sum, own_counts, scaled
from avsr.training.metrics import MetricsLogger, peak_memory_mb
from avsr.training.stages import Stages
from avsr.training.term_gradients import TermGradients
from avsr.training.update import update
from avsr.training.watchdog import Watchdog

if TYPE_CHECKING:
    from avsr.data.dataset import SpeechDataset

logger = logging.getLogger("avsr")


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
        self._bar: ProgressBar | None = None
        self._feed: Iterator[tuple[tuple[int, int, int], list[Batch]]] | None = None  # while :meth:`fit` runs
        self._ahead: StepData | Exception | None = None  # of the next step
        self._unread: Launched | None = None  # the last step, if its row has not been made
        self._watchdog = watchdog or Watchdog(timeout=0)
        self._stages = Stages(self._watchdog)
        self._carrier = Carrier(self.device)
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
        self._bar = bar
        self._feed = self._start_feed()
        try:
            self._ahead = self._read_ahead()
            while self.progress.step < self.settings.steps:
                if isinstance(self._ahead, Exception):
                    self._settle()
                    raise self._ahead
                self._take(self._ahead)
        finally:
            self._feed = None
            if self._unread is not None and self._log is not None:  # something failed in the step after it
                with suppress(RuntimeError):
                    self._log.write(self._unread.row(self.config, self.progress))

    def _take(self, data: StepData) -> None:
        """One step, and what is due after it. Its row is written now, or when the next step has been launched."""
        settings, progress = self.settings, self.progress
        began = time.perf_counter()
        self._advance(data)
        self._watchdog.enter("counts", progress.step)
        done = self._unread = self.step(data)
        stop = self._agree(done)
        read = self._ahead.seconds if isinstance(self._ahead, StepData) else 0.0
        done.times = {"seconds": time.perf_counter() - began - read, "wait_seconds": data.seconds}
        last, every = progress.step == settings.steps, settings.save_every
        validated = progress.step % settings.validate_every == 0 or last
        due = bool(stop) or last or (validated if not every else progress.step % every == 0)
        before, better, progress.validation = progress.best, False, None
        if not validated and not due:
            return
        self._unread, row = None, self.row(done)
        if validated:
            row.update(self.validate())
            progress.validation = row["validation_ce"]
            finite = math.isfinite(progress.validation)
            better = finite and (progress.best is None or progress.validation < progress.best)
            progress.best = progress.validation if better else progress.best
        self._write(row)
        stop = self._told_to_stop() if validated else stop  # a validation may take long
        if better or stop or due:
            with self._stages.enter("checkpoint", progress.step):
                failure = checkpoint.save(self.engine, self.config, progress, best=better)
            if failure:
                progress.best = before
                self._cannot_save(failure, end=last or bool(stop))
            stop = self._told_to_stop()
        if stop and not last:
            raise Interrupted(stop)

    def _agree(self, done: Launched) -> int:
        """Gives the next step the counts that came with the sums of this one. Returns the signal that asked any rank
        to stop, or 0."""
        *counts, interrupted, terminated = done.along
        if isinstance(self._ahead, StepData):
            self._ahead.counts = all_counts(counts, len(self._ahead.batches))
        return signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0

    def _read_ahead(self) -> StepData | Exception:
        """The data of the next step. What reading fails with is raised when that step begins: until then the other
        ranks count on this one."""
        assert self._feed is not None
        self._watchdog.enter("data", self.progress.step + 1)
        began = time.perf_counter()
        try:
            place, batches = next(self._feed)
            seconds = time.perf_counter() - began
            batches = [replace(batch, features=self._carrier.send(batch.features)) for batch in batches]
            return self.data(batches, place, seconds)
        except Exception as error:
            return error

    def _advance(self, data: StepData) -> None:
        self.progress.step, self.progress.epoch, self.progress.step_in_epoch = data.place

    def _settle(self) -> None:
        """Writes the row of a step that was launched and not read yet."""
        if self._unread is not None:
            done, self._unread = self._unread, None
            self._write(self.row(done))

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(row)
        if self._bar is not None:
            self._bar.advance(1, _note(row))

    def _cannot_save(self, failure: str, *, end: bool) -> None:
        if end:
            raise UserError(f"{failure}; what was trained since the last checkpoint is lost, resume=true repeats it")
        if self.rank == 0:
            logger.error("%s; training goes on, the old checkpoint stays", failure)

    def steps(self) -> Iterator[StepData]:
        """The data of every step from the current progress on, which it moves, without looking ahead."""
        for place, batches in self._start_feed():
            data = self.data(batches, place)
            self._advance(data)
            yield data

    def data(self, batches: list[Batch], place: tuple[int, int, int] | None = None, seconds: float = 0.0) -> StepData:
        """``batches`` as the micro-batches of a step; arguments as in :class:`StepData`, by default here and now."""
        progress = self.progress
        place = place or (progress.step, progress.epoch, progress.step_in_epoch)
        return StepData(batches, [self.model.prompt_lengths(batch) for batch in batches], place, seconds)

    def _start_feed(self) -> Iterator[tuple[tuple[int, int, int], list[Batch]]]:
        workers, pinned = self.config.data.workers, self.device.type == "cuda"
        return feed(self.train, self.sampler, self.rank, self.progress, workers=workers, pinned=pinned)

    def step(self, data: StepData) -> Launched:
        """Runs one optimizer step, collectively. Its sums stay on the device; :meth:`row` reads them. Between the last
        backward and the update, while a GPU computes, :meth:`_while_it_computes` does the host's work."""
        self.engine.train()
        step, enter = data.place[0], self._stages.enter
        self._carrier.receive(rows for batch in data.batches for rows in batch.features.values() if rows.is_cuda)
        with enter("counts", step):
            counts = data.counts or self._count(data)
            if counts.lost:
                self._lost.add(step, [item for batch in data.batches for item in batch.lost])
        every = self.settings.gradient_norms_every
        split = TermGradients(self.model) if every and step % every == 0 else None
        sums, norm, totals = Sums(self.device), None, None  # totals: when all is launched
        for index, (batch, lengths) in enumerate(zip(data.batches, data.prompts, strict=True)):
            with enter("forward", step):
                terms: Terms = self.engine(batch)
                cross_entropy, decorrelation = scaled(terms.cross_entropy, terms.decorrelation, lengths, counts)
                loss = cross_entropy
                if decorrelation is not None:
                    loss = loss + self.config.loss.decorrelation * decorrelation
                sums.add(terms, lengths)
            if split is not None:
                split.add(*scaled(terms.own.cross_entropy, terms.own.decorrelation, lengths, counts), counts.parts)
            with enter("backward", step):
                self.engine.backward(loss)
            if index + 1 == len(data.batches):
                totals = self._while_it_computes(data, sums)
            with enter("optimizer", step):
                norm = update(self.engine, self.model.trainable().values())
        assert totals is not None
        norms = {} if split is None else split.norms(self.config.loss.decorrelation)
        ids = [utterance.id for batch in data.batches for utterance in batch.utterances]
        place = step, data.place[1]
        return Launched(place, ids, counts, sums, totals, norm, self.engine.get_lr()[0], peak_memory_mb(), norms)

    def _while_it_computes(self, data: StepData, sums: Sums) -> Later:
        """Writes the row of the step before, reads the data of the next one, and launches the one reduction of a step:
        the sums, the counts of the next one, and whether to stop."""
        step, ahead = data.place[0], [0, 0, 0]
        with self._stages.enter("metrics", step):
            self._settle()
        if self._feed is not None and step < self.settings.steps:
            self._ahead = self._read_ahead()
            if isinstance(self._ahead, StepData):
                ahead = own_counts(self._ahead.batches, self._ahead.prompts)
        with self._stages.enter("metrics", step):
            asked = [self._stop == signal.SIGINT, self._stop == signal.SIGTERM]
            return sums.send([data.audio_seconds, data.tokens, *ahead, *asked])

    def _count(self, data: StepData) -> Counts:
        """The counts of a step that the one before has not brought along."""
        return all_counts(all_sum(own_counts(data.batches, data.prompts), self.device), len(data.batches))

    def _told_to_stop(self) -> int:
        """Collective. The signal that asked any rank to stop, or 0."""
        return int(all_max(self._stop, self.device))

    def row(self, done: Launched) -> dict[str, Any]:
        """Collective. The metrics of a step, when the device has computed its sums.

        Raises:
            UserError: one more step that is not finite than are allowed.
        """
        row = done.row(self.config, self.progress)
        if row.get("skipped"):
            self._nonfinite.add(self.progress, row["step"], done.ids, done.sums.own)
        return row

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cross entropy and accuracy over the whole validation set, and decorrelation if it is trained."""
        self.engine.eval()
        order = make_batches(self.validation.sizes, self.settings.frames, self.settings.utterances)
        mine = order[self.rank :: self.world]
        rounds = -(-len(order) // self.world)  # under ZeRO-3 all ranks must run the same number of forwards
        sums, host, lost = Sums(self.device), [0, 0, 0], []  # of the host: labels, decorrelated, lost
        shares = AttentionShares(self.device) if self.config.log.attention else None
        for index in range(rounds):
            own = index < len(mine)
            with self._stages.enter("validation", self.progress.step):
                batch = collate([self.validation[i] for i in (mine[index] if own else order[0])])
                terms: Terms = self.engine(batch)
            if own:
                prompts = self.model.prompt_lengths(batch)
                sums.add(terms, prompts)
                host = [a + b for a, b in zip(host, own_counts([batch], [prompts]), strict=True)]
                lost += batch.lost
                if shares is not None and not batch.is_dummy and self.model.probe is not None:
                    shares.add(self.model.probe)
        ce, decorrelation, correct, labels, counted, lost_clips = sums.send(host).read()
        if lost_clips:
            self._lost.add(self.progress.step, lost)
        labels = labels or math.nan
        row = {"validation_ce": ce / labels, "validation_accuracy": correct / labels}
        if self.config.loss.decorrelation:
            row["validation_decorrelation"] = decorrelation / max(counted, 1)
        return row | (shares.row() if shares is not None else {})

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
