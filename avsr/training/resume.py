"""Resuming a run from its last intact checkpoint, on any number of ranks."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from avsr.config import Config, read_run_config, to_yaml
from avsr.config.composing import differences
from avsr.data.dataset import REJECTED
from avsr.errors import UserError
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import WEIGHTS, load_weights
from avsr.runtime import folders
from avsr.runtime.locks import LOCK
from avsr.runtime.tensors import read_file
from avsr.training import optimizer_state
from avsr.training.checkpoint import GENERATORS, OPTIMIZER, STATE, Progress
from avsr.training.engine import learning_rate_factor
from avsr.training.frames import FRAMES, MANY
from avsr.training.optimizer_state import OptimizerState

logger = logging.getLogger("avsr")
# A resumed run may change these: its folder, logging and decoding, and what does not change the steps
_FREE = (
    *("run", "resume", "log.", "decode.", "data.workers", "data.cache", "data.test", "training.keep_"),
    *("data.on_bad", "data.max_bad", "data.allow_absolute"),
    "training.steps",  # see _check_steps
    *("noise.snr", "act."),  # used by evaluation only
    *("deepspeed.", "training.save_every", "training.gradient_checkpointing", "training.packed"),
    *("training.kernels", "training.compile", "loss.cross_entropy"),
    "training.accumulation",  # but not its product with the number of ranks, see _check_parts
)


_COUNTS = ("step", "epoch", "step_in_epoch", "clipped", "skipped", "ranks", "accumulation")
_KEYS = {*_COUNTS, "best", "validation", "optimizer", "scheduler", "random"}
_OWN = ("config.yaml.", "frames.", "metrics.jsonl.", "last.", "best.", "step-")  # what training alone writes
_MOST = 2**53  # floats represent every integer up to here


@dataclass(frozen=True)
class Start:
    """What to resume from. The weights are loaded before the engine is made, the rest afterwards."""

    folder: Path
    progress: Progress
    record: dict[str, Any]  # all of state.json


def prepare_run(config: Config, ranks: int) -> str:
    """Makes the run folder, or with ``resume`` finds the checkpoint to resume from. Called by rank 0 only.

    Returns:
        The name of the newest intact checkpoint, or "" to begin with the first step.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, all its checkpoints are damaged, the config differs,
            or ranks x accumulation does.
    """
    run = Path(config.run)
    saved = run / "config.yaml"
    name = ""
    if config.resume:
        name = _newest(run)
        before = read_run_config(run) if saved.is_file() else config
        changed = [line for line in differences(config, before) if not line.startswith(_FREE)]
        if changed:
            raise UserError(f"resume: the config differs from {saved} (new != saved): {'; '.join(changed)}")
        if name:
            record = _read_record(run / "checkpoints" / name)
            _check_parts(record, config.training.accumulation, ranks)
            _check_steps(config, before.training.steps, record["step"])
        else:
            logger.warning("resume: %s has no checkpoint yet, training begins with the first step", run)
    elif run.exists() and not run.is_dir() or run.is_dir() and _holds_something(run):
        raise UserError(f"run: {run} exists already; continue it with resume=true, or name another folder with run=")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in (*run.glob("*.part"), *(run / "checkpoints").glob("*.part")):
            if part.name.startswith(_OWN):  # left by a killed training; of others' a live process may be the owner
                folders.remove(part)
        if not config.resume:
            for frames in (FRAMES, *MANY.values()):
                (run / frames).unlink(missing_ok=True)  # left by a start that was refused
        folders.write_durably(saved, to_yaml(config).encode())
    except OSError as error:
        raise UserError(f"run: cannot write to {run}: {error}") from error
    return name


def _newest(run: Path) -> str:
    """ "last", or "previous" if that is damaged or missing, or "" if neither has been written."""
    found: list[str] = []
    for name in ("last", "previous"):
        folder = run / "checkpoints" / name
        if not folder.is_dir():
            continue
        problem = folders.damage(folder)
        if not problem:
            if found:  # or the next save would keep the damaged one as "previous"
                folders.swap_in(run / "checkpoints" / "last", run / "checkpoints" / "last.damaged")
            return name
        found.append(problem)
        logger.warning("resume: %s", problem)
    if found:
        raise UserError(f"resume: no checkpoint of {run} is whole: {'; '.join(found)}")
    return ""


def _check_parts(record: dict[str, Any], accumulation: int, ranks: int) -> None:
    before, now = int(record["ranks"]) * int(record["accumulation"]), ranks * accumulation
    if before != now:
        fits = before % ranks == 0
        way = f"training.accumulation={before // ranks}" if fits else f"a number of ranks that divides {before}"
        raise UserError(
            f"resume: a step was {record['ranks']} ranks x training.accumulation = {record['accumulation']}, now it "
            f"would be {ranks} x {accumulation}, with other batches; the same steps need {way}"
        )


def _check_steps(config: Config, before: int, done: int) -> None:
    """Says what another number of steps does to the learning rate."""
    training = config.training
    if training.steps == before:
        return
    if training.steps < done:
        raise UserError(f"resume: training.steps = {training.steps}, but the run has {done} steps already")
    if config.deepspeed.config is not None:
        rates = f"a scheduler of {config.deepspeed.config} goes on as it was; without one the learning rate ends there"
    else:
        old, new = (
            training.learning_rate * learning_rate_factor(done, steps, training.warmup, training.decay)
            for steps in (before, training.steps)
        )
        rates = f"the schedule ends there: the learning rate after step {done} is {new:.3g} instead of {old:.3g}"
    logger.warning("resume: training.steps = %d instead of %d: %s", training.steps, before, rates)


def _holds_something(run: Path) -> bool:
    """Whether ``run`` has more than :func:`prepare_run` leaves when training is refused before its first step."""
    known = {"config.yaml", FRAMES, *MANY.values(), REJECTED, LOCK, "checkpoints"}
    extra = [item for item in run.iterdir() if item.name not in known and item.suffix != ".part"]
    return bool(extra) or (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        _check_record(record)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"resume: {folder / STATE} cannot be read: {error}") from error
    return dict(record)


def _check_record(record: Any) -> None:
    """Raises ValueError, TypeError or OverflowError unless :func:`avsr.training.checkpoint.save` can have written
    ``record``."""
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        raise ValueError("it is not that of a training")
    for key in _COUNTS:
        if type(record[key]) is not int or not (key in ("ranks", "accumulation")) <= record[key] <= _MOST:
            raise ValueError(f"{key} is no such number")
    for key in ("best", "validation"):
        if not (record[key] is None or isinstance(record[key], float)):
            raise ValueError(f"{key} is neither a number nor null")
    optimizer = record["optimizer"]
    if not isinstance(optimizer, dict) or not all(map(_plain, optimizer.values())):
        raise ValueError("optimizer is no table of numbers")
    if not isinstance(record["scheduler"], dict):
        raise ValueError("scheduler is no table")
    _, _, rest = record["random"]
    if not (rest is None or isinstance(rest, float)):
        raise ValueError("random is no state of Python's generator")
    _set_random(random.Random(), record["random"])


def _plain(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MOST  # false for NaN too


def _alike(saved: Any, own: Any) -> bool:
    """Whether a saved value of the schedule's state can replace its own."""
    if isinstance(own, list):
        return isinstance(saved, list) and len(saved) == len(own) and all(map(_alike, saved, own))
    return _plain(saved) if _plain(own) else type(saved) is type(own)


def _set_random(generator: Any, state: Any) -> None:
    version, numbers, rest = state
    generator.setstate((version, tuple(numbers), rest))


def load_start(config: Config, name: str, model: SpeechLLM) -> Start | None:
    """Loads the weights of the checkpoint ``name`` into ``model``; None if ``name`` is empty."""
    if not name:
        return None
    folder = Path(config.run) / "checkpoints" / name
    record = _read_record(folder)
    load_weights(model, folder)
    progress = Progress(**{item.name: record[item.name] for item in fields(Progress)})
    return Start(folder, progress, record)


def load_engine(engine: Any, start: Start) -> None:
    """Restores optimizer, schedule and random generators. Collective; all ranks read the same folder.

    Raises:
        UserError: the state belongs to another model or optimizer.
    """
    record = start.record
    state = OptimizerState(read_file(start.folder / OPTIMIZER, "resume"), record["optimizer"])
    optimizer_state.scatter(engine, state, read_file(start.folder / WEIGHTS, "resume"))
    scheduler = engine.lr_scheduler
    if scheduler is not None:
        own = scheduler.state_dict()
        for key, value in record["scheduler"].items():
            if key not in own or not _alike(value, own[key]):
                raise UserError(f"resume: {start.folder / STATE}: scheduler.{key} is not of this schedule")
        scheduler.load_state_dict({**own, **record["scheduler"]})
        rates = scheduler.get_last_lr()
        if isinstance(scheduler, LambdaLR):  # ours, perhaps with another number of steps than when it was saved
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    engine.global_steps = start.progress.step
    if record["ranks"] != dist.get_world_size():
        logger.warning("resume: another number of ranks: the same batches, but dropout draws other numbers")
        return
    _set_random(random, record["random"])
    generators = read_file(start.folder / GENERATORS, "resume")
    cuda = generators.get(f"cuda/{dist.get_rank()}")
    try:
        torch.set_rng_state(generators[f"cpu/{dist.get_rank()}"])
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"resume: {start.folder / GENERATORS} holds no states of generators: {error}") from error
