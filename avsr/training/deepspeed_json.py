"""DeepSpeed's settings: the recipe's, or a user's own JSON completed with what the recipe decides."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from avsr.config import Config, DeepSpeedConfig, TrainingConfig
from avsr.errors import UserError

logger = logging.getLogger("avsr")
# batches have a frame budget instead of a size; steps are logged by MetricsLogger
_FIXED = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 1 << 30}
_REPLACED = {
    "train_batch_size": "training.frames and training.accumulation make the batches",
    "train_micro_batch_size_per_gpu": "training.frames makes the batches",
    "steps_per_print": "every step is logged",
}
_ABSENT = ("auto", None)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The recipe's DeepSpeed config, or the user's JSON completed with what the recipe decides.

    An "auto" means what it does in transformers: the recipe's value in an optimizer or scheduler, DeepSpeed's default
    in "zero_optimization", off for fp16.

    Raises:
        UserError: unreadable JSON, fp16, or a value that contradicts the recipe.
    """
    training = config.training
    ours: dict[str, Any] = {
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.clip,
        "bf16": {"enabled": training.precision == "bf16"},
    }
    if config.deepspeed.config is None:
        return {**ours, **_FIXED, **_zero(config.deepspeed)}
    path = Path(config.deepspeed.config)
    theirs = _read_json(path)
    theirs.pop("train_batch_size", None)
    for key, value in ours.items():
        theirs[key] = _settle(key, theirs.get(key, "auto"), value, path)
    _fill_in(theirs, training)
    for part in ("optimizer", "scheduler", "zero_optimization"):
        if '"auto"' in json.dumps(theirs.get(part)):
            raise UserError(
                f"deepspeed.config: {path}: {part} holds an 'auto' that the recipe has no value for; write the value, "
                "or leave the part out for the recipe's"
            )
    theirs.setdefault("zero_optimization", {"stage": 0})
    return {**theirs, **_FIXED}


def check_deepspeed(config: Config) -> list[str]:
    """Lets DeepSpeed read the user's JSON before anything is loaded; without one there is nothing to check.

    Returns:
        A line for each of its keys, or of the recipe's, that has no effect.

    Raises:
        UserError: DeepSpeed refuses it, does not know its optimizer or scheduler, or knows a key of almost that name.
    """
    settings = deepspeed_config(config)
    if config.deepspeed.config is None:
        return []
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.config import DeepSpeedConfig as Parsed
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    read = _Read(settings)
    with explained(config.deepspeed):
        Parsed(read)
    where = f"deepspeed.config: {config.deepspeed.config}"
    _check_type(settings, "optimizer", DEEPSPEED_OPTIMIZERS, torch.optim, where)
    _check_type(settings, "scheduler", VALID_LR_SCHEDULES, torch.optim.lr_scheduler, where)
    lines = []
    for key in settings:
        if key not in read.keys_read:
            near = difflib.get_close_matches(key, read.keys_read, 1, 0.8)
            if near:
                raise UserError(f"{where}: DeepSpeed knows no key {key!r}; did you mean {near[0]!r}?")
            lines.append(f"{where}: {key} is ignored: DeepSpeed does not read it")
    return lines + _without_effect(_read_json(Path(config.deepspeed.config)), settings, config, where)


def _without_effect(theirs: dict[str, Any], settings: dict[str, Any], config: Config, where: str) -> list[str]:
    lines = [
        f"{where}: {key} = {theirs[key]!r} is ignored: {reason}"
        for key, reason in _REPLACED.items()
        if theirs.get(key) not in (*_ABSENT, _FIXED.get(key))
    ]
    defaults = DeepSpeedConfig()
    stage = settings["zero_optimization"].get("stage", 0)
    if config.deepspeed.stage not in (defaults.stage, stage):
        lines.append(f"deepspeed.stage = {config.deepspeed.stage} is ignored: {where} has {stage}")
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(config.deepspeed, key):
            lines.append(f"deepspeed.{key} is ignored: {where} decides")
    if "optimizer" in settings:
        keys = "training.learning_rate, training.betas and training.weight_decay"
        lines.append(f"{keys} are ignored wherever the optimizer of {where} says otherwise")
    if "scheduler" in settings:
        lines.append(f"training.warmup and the cosine schedule are replaced by the scheduler of {where}")
    return lines


class _Read(dict[str, Any]):
    """Remembers the keys that are asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.keys_read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # DeepSpeed asks "key in config.keys()"


@contextmanager
def explained(config: DeepSpeedConfig) -> Iterator[None]:
    """Turns whatever DeepSpeed raises about a user's JSON into a ``UserError``."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        if config.config is None:
            raise
        reasons = [line for line in str(error).splitlines() if "errors.pydantic.dev" not in line]
        text = " ".join(" ".join(reasons).split()) or type(error).__name__
        raise UserError(f"deepspeed.config: {config.config}: DeepSpeed refuses it: {text}") from error


def _check_type(settings: dict[str, Any], part: str, known: list[str], module: Any, where: str) -> None:
    if part not in settings:
        return
    kind = settings[part].get("type") if isinstance(settings[part], dict) else None
    classes = [name for name, value in vars(module).items() if isinstance(value, type)]
    names = {name.lower(): name for name in (*known, *classes)}
    if not isinstance(kind, str) or kind not in (*classes, *known) and kind.lower() not in known:
        near = difflib.get_close_matches(str(kind).lower(), names, 1)
        hint = f"; did you mean {names[near[0]]!r}?" if near else f"; it knows {', '.join(known)}"
        raise UserError(f"{where}: {part}.type: DeepSpeed knows no {part} {kind!r}{hint}")


def _zero(config: DeepSpeedConfig) -> dict[str, Any]:
    stage: dict[str, Any] = {"stage": config.stage}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_optimizer:
        stage["offload_optimizer"] = host
    if config.offload_parameters:
        stage["offload_param"] = host
    # torch's AdamW is fast enough for the few trained parameters on the host; DeepSpeed's would have to be compiled
    return {"zero_optimization": stage, "zero_force_ds_cpu_optimizer": False}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed.config: {path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"deepspeed.config: {path}: expected a JSON object")
    for part in ("optimizer", "scheduler", "zero_optimization"):
        if content.get(part) is None:
            content.pop(part, None)
        elif not isinstance(content[part], dict):
            raise UserError(f"deepspeed.config: {path}: {part}: expected a JSON object, got {content[part]!r}")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed.config: {path}: zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
    fp16 = content.pop("fp16", None)
    if (fp16.get("enabled") if isinstance(fp16, dict) else fp16) not in (*_ABSENT, False):
        raise UserError(
            f"deepspeed.config: {path}: fp16 training is refused: massive activations of 26,000 and a large "
            "lambda leave no room below 65,504; use bf16"
        )
    return content


def _fill_in(settings: dict[str, Any], training: TrainingConfig) -> None:
    """Replaces "auto" in the parameters of optimizer and scheduler, and removes it from "zero_optimization"."""
    ours = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "eps": 1e-8,
        "weight_decay": training.weight_decay,
        "warmup_min_lr": 0,
        "warmup_max_lr": training.learning_rate,
        "warmup_num_steps": training.warmup,
        "total_num_steps": training.steps,
    }
    for part in ("optimizer", "scheduler"):
        given = settings.get(part, {}).get("params")
        if isinstance(given, dict):
            given.update({key: ours[key] for key, value in given.items() if value == "auto" and key in ours})
    zero = settings.get("zero_optimization", {})
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]


def _settle(key: str, given: Any, value: Any, path: Path) -> Any:
    """The recipe's ``value`` if the user's JSON agrees: "auto" or an equal value. Of a group, other keys are kept."""
    if isinstance(value, dict):
        own = given if isinstance(given, dict) else {}
        return {
            **own,
            **{inner: _settle(f"{key}.{inner}", own.get(inner, "auto"), value[inner], path) for inner in value},
        }
    if given not in ("auto", value):
        raise UserError(
            f"deepspeed.config: {path}: {key} is {given!r}, the recipe says {value!r}; set it to 'auto' or change "
            "the recipe"
        )
    return value
