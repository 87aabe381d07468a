"""``avsr pretrain CONFIG [key=value ...]``: teaches the small visual encoder to read mouths from known times.

The targets of every frame are its viseme and its word; without them nothing is learned in reasonable time. The run
folder then holds ``model.safetensors`` and ``config.json``, which an encoder of the kind ``visual`` loads,
``pretrain.yaml`` (the settings), ``metrics.jsonl`` (a line per step) and ``metrics.json`` (the final scores).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy, ctc_loss, log_softmax
from torch.nn.utils.rnn import pad_sequence

from avsr.config import LogConfig
from avsr.config.keys import key
from avsr.data.clip import center_crop
from avsr.errors import UserError
from avsr.evaluation.wer import score
from avsr.models.build import pick_device
from avsr.models.visual import WEIGHTS, VisualConfig, VisualModel, check_visual, save_visual
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim
from avsr.runtime.progress import ProgressBar
from avsr.tools.corpora.synth.visemes import VISEMES
from avsr.tools.lipreader.augment import FaceAugmentConfig, augment, check_augment
from avsr.tools.lipreader.timed import TARGETS, UNKNOWN, TimedClip, load_timed, vocabulary
from avsr.training.engine import learning_rate_factor
from avsr.training.metrics import MetricsLogger

logger = logging.getLogger("avsr")
_SETTINGS, _SCORES = "pretrain.yaml", "metrics.json"

_SWITCH = 4.0  # cost of a change of the unit in ``best_path``, as a log-probability
_EVALUATION_BATCH = 32
_STATISTICS_CLIPS = 256  # for the mean and deviation of the features
# On a CPU with AVX2, torch 2.11's backward pass of a 1x1 convolution of stride 2 over 2 to 5 channels writes outside
# its memory
_LEAST_CHANNELS = 8


@dataclass
class PretrainConfig:
    """Settings of ``avsr pretrain``.

    Attributes:
        run: the new run folder.
        train: manifest with videos and times.
        validation: another one, with the same units.
        test: name -> manifest, scored at the end.
        targets: words | phonemes | visemes; words for a small vocabulary.
        steps: of the optimizer, each over ``batch`` clips.
        ctc: weight of the CTC loss; the losses of single frames have 1.
        limit: first n clips of the training manifest, 0 = all.
        threads: CPU threads; in so small a model, more of them mostly wait for each other.
    """

    run: str = key(MISSING, path=True)
    train: str = key(MISSING, path=True)
    validation: str = key(MISSING, path=True)
    test: dict[str, str] = key({}, path=True)
    targets: str = "words"
    model: VisualConfig = field(default_factory=VisualConfig)
    augment: FaceAugmentConfig = field(default_factory=FaceAugmentConfig)
    steps: int = 1200
    batch: int = 16
    learning_rate: float = 2.0e-3
    warmup: int = 40
    weight_decay: float = 0.01
    clip: float = 5.0
    ctc: float = 0.3
    validate_every: int = 200
    limit: int = 0
    threads: int = 1
    seed: int = 42
    log: LogConfig = field(default_factory=LogConfig)


def pretrain(config: PretrainConfig) -> Path:
    """Trains to the end and returns the run folder. The same seed and number of threads give the same weights.

    Raises:
        UserError: bad settings, a run folder in use, or clips that cannot be used.
    """
    check_pretrain(config)
    torch.set_num_threads(config.threads)
    with claim(Path(config.run), key="run"):
        return _pretrain(config, Path(config.run))


def _pretrain(config: PretrainConfig, run: Path) -> Path:
    settings = OmegaConf.to_yaml(OmegaConf.structured(config)).encode()
    if (run / _SCORES).exists():  # written last
        if (run / WEIGHTS).exists() and _content(run / _SETTINGS) == settings:
            logger.info("%s holds this model already, nothing to do", run)
            return run
        raise UserError(f"run: {run} holds a trained model already; name another folder with run=")
    if (run / WEIGHTS).exists():
        logger.warning("%s holds a model whose training was stopped: it begins again", run)
    pool = config.model.pool
    train = load_timed(config.train, targets=config.targets, pool=pool, limit=config.limit, key="train")
    validation = load_timed(config.validation, targets=config.targets, pool=pool, key="validation")
    tests = {
        name: load_timed(manifest, targets=config.targets, pool=pool, key=name)
        for name, manifest in config.test.items()
    }
    try:
        write_durably(run / _SETTINGS, settings)
    except OSError as error:
        raise UserError(f"run: cannot write to {run}: {error}") from error
    torch.manual_seed(config.seed)
    model = VisualModel(config.model, VISEMES, vocabulary(train)).to(pick_device())
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s: %d clips, %d units, %d parameters", run, len(train), len(model.units), count)
    _fit(model, config, train, validation)
    measured = {name: evaluate_visual(model, clips) for name, clips in {"validation": validation, **tests}.items()}
    try:
        write_durably(run / _SCORES, (json.dumps(measured, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"run: cannot write to {run}: {error}") from error
    return run


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def check_pretrain(config: PretrainConfig) -> None:
    """Raises a ``UserError`` that names the key of an invalid value."""
    check_visual(config.model, "model.")
    if min(config.model.channels) < _LEAST_CHANNELS:
        raise UserError(f"model.channels: expected at least {_LEAST_CHANNELS} each, got {list(config.model.channels)}")
    if config.targets not in TARGETS:
        raise UserError(f"targets: expected one of {', '.join(TARGETS)}, got {config.targets!r}")
    for least, keys in (
        (1, ("steps", "batch", "validate_every", "threads")),
        (0, ("warmup", "weight_decay", "ctc", "limit")),
    ):
        for name in keys:
            if getattr(config, name) < least:
                raise UserError(f"{name}: expected at least {least}, got {getattr(config, name)}")
    for name in ("learning_rate", "clip"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name}: expected more than 0, got {getattr(config, name)}")
    check_augment(config.augment, "augment.")


def _fit(model: VisualModel, config: PretrainConfig, train: list[TimedClip], validation: list[TimedClip]) -> None:
    run = Path(config.run)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.steps, config.warmup)
    )
    log = MetricsLogger(run, config.log)
    draw = torch.Generator().manual_seed(config.seed)
    try:
        with ProgressBar("pretrain", config.steps) as bar:
            for step, clips in zip(range(1, config.steps + 1), _batches(train, config.batch, draw), strict=False):
                started = time.perf_counter()
                model.train()
                row = {"step": step, "learning_rate": schedule.get_last_lr()[0]}
                losses = _losses(model, clips, config, draw)
                loss = losses["viseme_loss"] + losses["unit_loss"] + config.ctc * losses["ctc_loss"]
                if not bool(loss.isfinite()):
                    raise UserError(f"the loss of step {step} is {loss.item()}; lower learning_rate")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimizer.step()
                schedule.step()
                row |= {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}
                row["seconds"] = time.perf_counter() - started
                if step % config.validate_every == 0 or step == config.steps:
                    _set_statistics(model, train)
                    save_visual(model, run)
                    row |= {f"validation_{k}": v for k, v in evaluate_visual(model, validation).items()}
                log.write(row)
                bar.advance(1, f"loss {row['loss']:.2f}")
    finally:
        log.close()


def _batches(clips: Sequence[TimedClip], size: int, draw: torch.Generator) -> Iterator[list[TimedClip]]:
    """Endless batches; every clip once before any is repeated."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(clips), generator=draw).tolist()
        yield [clips[index] for index in waiting[:size]]
        waiting = waiting[size:]


def _losses(
    model: VisualModel, clips: Sequence[TimedClip], config: PretrainConfig, draw: torch.Generator
) -> dict[str, Tensor]:
    device = model.feature_mean.device
    mouths = augment([clip.mouth for clip in clips], model.side, model.config.pool, config.augment, draw)
    inputs, lengths = pad_sequence(mouths, batch_first=True).to(device), torch.tensor([len(mouth) for mouth in mouths])
    logits = model.logits(inputs, lengths.to(device))
    classes = _classes(model)
    labels = pad_sequence([clip.labels(classes) for clip in clips], batch_first=True, padding_value=UNKNOWN)
    visemes = torch.cat([clip.visemes for clip in clips]).to(device)
    losses = {
        "viseme_loss": cross_entropy(logits.visemes, visemes),
        "unit_loss": cross_entropy(logits.units.flatten(0, 1), labels.flatten().to(device)),
    }
    sequences = [torch.tensor([classes[span.text] for span in clip.spans]) for clip in clips]
    losses["ctc_loss"] = ctc_loss(
        log_softmax(logits.ctc, -1).transpose(0, 1),
        torch.cat(sequences).to(device),
        lengths.to(device),
        torch.tensor([len(sequence) for sequence in sequences], device=device),
        zero_infinity=True,
    )
    return losses


def _classes(model: VisualModel) -> dict[str, int]:
    """The class of each unit; 0 is none of them."""
    return {name: index for index, name in enumerate(model.units, 1)}


@torch.no_grad()
def _set_statistics(model: VisualModel, clips: Sequence[TimedClip]) -> None:
    """Sets the model's feature mean and scale over the first clips."""
    model.eval()
    model.feature_mean.zero_()
    model.feature_scale.fill_(1.0)
    rows = []
    for inputs, lengths in _eval_batches(model, clips[:_STATISTICS_CLIPS]):
        features = model(inputs, lengths)
        rows += [row[:length].double() for row, length in zip(features, lengths.tolist(), strict=True)]
    features = torch.cat(rows)
    model.feature_mean.copy_(features.mean(0))
    model.feature_scale.copy_(1.0 / features.std(0).clamp(min=1e-3))


def _eval_batches(model: VisualModel, clips: Sequence[TimedClip]) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, lengths) of all clips as the encoder sees them."""
    device, side = model.feature_mean.device, model.side
    for first in range(0, len(clips), _EVALUATION_BATCH):
        part = clips[first : first + _EVALUATION_BATCH]
        mouths = [center_crop(clip.mouth.float(), side, side).flatten(1) for clip in part]
        yield pad_sequence(mouths, batch_first=True).to(device), torch.tensor([len(m) for m in mouths], device=device)


@torch.no_grad()
def evaluate_visual(model: VisualModel, clips: Sequence[TimedClip]) -> dict[str, Any]:
    """Fractions: ``viseme_accuracy`` and ``unit_accuracy`` over frames; ``unit_error`` (edit distance of ``best_path``)
    and ``ctc_error`` (of greedy CTC) over the number of units, both without a grammar."""
    model.eval()
    classes = _classes(model)
    right = {"visemes": 0, "units": 0}
    said, read, spelled = [], [], []
    total, rest = 0, list(clips)
    for inputs, lengths in _eval_batches(model, clips):
        logits = model.logits(inputs, lengths)
        batch, rest = rest[: len(lengths)], rest[len(lengths) :]
        visemes = torch.cat([clip.visemes for clip in batch]).to(inputs.device)
        right["visemes"] += int((logits.visemes.argmax(-1) == visemes).sum())
        total += len(visemes)
        for clip, units, ctc in zip(batch, log_softmax(logits.units, -1).cpu(), logits.ctc.cpu(), strict=True):
            frames = len(clip.mouth)
            right["units"] += int((units[:frames].argmax(-1) == clip.labels(classes)).sum())
            said.append(_spell([classes.get(span.text, UNKNOWN) for span in clip.spans]))
            read.append(_spell(_runs(best_path(units[:frames]).tolist())))
            spelled.append(_spell(_runs(ctc[:frames].argmax(-1).tolist())))
    return {
        "viseme_accuracy": right["visemes"] / total,
        "unit_accuracy": right["units"] / total,
        "unit_error": score(said, read).wer,
        "ctc_error": score(said, spelled).wer,
        "clips": len(clips),
    }


def best_path(log_probabilities: Tensor, switch: float = _SWITCH) -> Tensor:
    """(T, U) -> (T,): the classes with the largest sum, less ``switch`` for each change of class (Viterbi)."""
    best = log_probabilities[0]
    back = []
    for row in log_probabilities[1:]:
        top = best.argmax()
        stay = best >= best[top] - switch
        back.append(torch.where(stay, torch.arange(len(best)), top))
        best = torch.where(stay, best, best[top] - switch) + row
    path = [int(best.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return torch.tensor(path[::-1])


def _runs(classes: list[int]) -> list[int]:
    """Without repetitions and class 0."""
    changed = [here for before, here in zip([0, *classes], classes, strict=False) if here != before]
    return [value for value in changed if value != 0]


def _spell(classes: list[int]) -> str:
    """Classes as words for the edit distance."""
    return " ".join(f"u{value}" if value >= 0 else "unknown" for value in classes)
