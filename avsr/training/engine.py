"""DeepSpeed: start-up with or without its launcher, its config, and the optimizer."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from avsr.config import Config, TrainingConfig
from avsr.errors import UserError
from avsr.models.resnet import VisualFrontEnd
from avsr.models.speech_llm import SpeechLLM
from avsr.training import jit, meeting
from avsr.training.deepspeed_json import deepspeed_config, explained
from avsr.training.watchdog import Watchdog

_NO_LIMIT = timedelta(days=7)


def import_deepspeed() -> Any:
    """Imports DeepSpeed with its logging reduced, on the CPU accelerator where there is no CUDA device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports the missing CUDA runtime
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.ops.op_builder.builder import OpBuilder
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    jit.supervise(OpBuilder)
    return deepspeed


def start_distributed(watchdog: Watchdog | None = None) -> tuple[int, int]:
    """Joins the launcher's process group, or makes one of a single process, and connects the watchdog.

    Returns:
        (rank, world size).

    Raises:
        UserError: the environment makes no sense, or the ranks do not find each other.
    """
    place = meeting.read_place(os.environ)
    meeting.settle_environment(place)
    deepspeed = import_deepspeed()
    if deepspeed.get_accelerator().device_name() == "cpu":
        # An all-reduce for inference that training never calls; DeepSpeed would compile it at every first start on a
        # CPU. Its table of compatible ops is read before compiling.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed compiles with ninja, which is installed next to this interpreter and may not be on PATH
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if not path.startswith(beside):
        os.environ["PATH"] = f"{beside}{os.pathsep}{path}"
    if not dist.is_initialized():
        watchdog = watchdog or Watchdog(0)
        store = meeting.meet(place, watchdog.patience, watchdog.move)
        watchdog.connect(place)
        _use_device(place.local)
        _make_group(deepspeed, place, store)
    deepspeed.init_distributed(verbose=False)
    return dist.get_rank(), dist.get_world_size()


def _use_device(local: int) -> None:
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if local >= count:
        raise UserError(f"LOCAL_RANK={local}: this host has {count} GPUs (CUDA_VISIBLE_DEVICES); start as many ranks")
    torch.cuda.set_device(local)


def _make_group(deepspeed: Any, place: meeting.Place, store: dist.Store) -> None:
    from deepspeed.constants import default_pg_timeout

    backend = deepspeed.get_accelerator().communication_backend_name()
    # the watchdog ends what hangs, and lets one rank read a corpus for hours while the others wait
    timeout = default_pg_timeout if "DEEPSPEED_TIMEOUT" in os.environ else _NO_LIMIT
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=timeout)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the ranks met at {place.address}, but rank {place.rank} cannot connect to the others by {backend}: "
            f"{reason} ({backend.upper()}_SOCKET_IFNAME names the network)"
        ) from error


def learning_rate_factor(step: int, steps: int, warmup: int, decay: float = 0.0) -> float:
    """The factor for the update number ``step`` (from 0): linear warm-up, then a cosine to 0, or with ``decay`` 1 and
    over this share of the steps a line to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if decay:
        return min(1.0, max(steps - step, 0) / (decay * steps))
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@contextmanager
def partitioned_loading(config: Config) -> Iterator[None]:
    """Under ZeRO-3, a model that transformers loads inside this context is partitioned weight by weight as its file is
    read, so no rank ever holds all of it. Does nothing on other stages."""
    settings = deepspeed_config(config)
    if settings["zero_optimization"].get("stage") != 3:
        yield
        return
    import_deepspeed()
    from transformers.integrations import HfDeepSpeedConfig

    known = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference to it
    yield
    del known


def make_engine(model: SpeechLLM, config: Config) -> Any:
    """The DeepSpeed engine around ``model``: AdamW and the schedule, unless the user's JSON has its own."""
    deepspeed = import_deepspeed()
    settings = deepspeed_config(config)
    _gather_whole(model)
    parameters = list(model.trainable().values())
    # DeepSpeed's default bucket holds 500 million gradients, 1 to 2 GB that so few parameters would never fill
    count = sum(parameter.numel() for parameter in parameters)
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        settings["zero_optimization"].setdefault(bucket, max(count, 1))
    optimizer = None if "optimizer" in settings else make_optimizer(parameters, config.training)
    training = config.training

    def schedule(inner: Any) -> LambdaLR:
        return LambdaLR(inner, lambda step: learning_rate_factor(step, training.steps, training.warmup, training.decay))

    scheduler: Callable[[Any], LambdaLR] | None = None if "scheduler" in settings else schedule
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with explained(config.deepspeed):
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=parameters,
                optimizer=optimizer,
                lr_scheduler=scheduler,
                config=settings,
            )
    return engine


def _gather_whole(model: SpeechLLM) -> None:
    """Makes a visual front end gather all its weights once per call under ZeRO-3. Its submodules are called once per
    chunk of frames, so ranks with different numbers of frames would otherwise gather different numbers of times."""
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if isinstance(module, VisualFrontEnd):
            set_z3_leaf_module(module, True)


def make_optimizer(parameters: list[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, without weight decay on biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    beta1, beta2 = training.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, betas=(beta1, beta2)
    )
