"""``avsr profile CONFIG``: how fast a training is, where its time and memory go, and which batches would fit.

One process, or many under ``deepspeed --module avsr.tools.estimate.profiling CONFIG [key=value]``. The folder
RUN-profile then holds profile.json, trace.json (chrome://tracing, Perfetto) and, on CUDA, memory.pickle
(pytorch.org/memory_viz).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from avsr.config import Config, load_config
from avsr.data.batches import Batch, collate
from avsr.data.stopwatch import watching
from avsr.errors import UserError, guarded
from avsr.runtime.folders import remove, swap_in, write_durably
from avsr.runtime.locks import hold
from avsr.tools.estimate.flops import FORMULA, Rows, step_flops
from avsr.tools.estimate.memory import Load, Sizes, memory, read_sizes
from avsr.tools.estimate.planning import way_of
from avsr.tools.estimate.trace import Trace, memory_parts
from avsr.training.losses import all_sum
from avsr.training.memory import device_memory, measured
from avsr.training.run import make_trainer, process_group
from avsr.training.trainer import Trainer

logger = logging.getLogger("avsr")
WARM_UP = 3
DATA_BATCHES = 4
# dense bf16 FLOP/s by a substring of the device's name (NVIDIA's data sheets)
_PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Measured:
    """One step over all ranks."""

    seconds: float
    wait: float
    tokens: int
    audio_seconds: float
    flops: float


def profile(config: Config, steps: int = 10) -> dict[str, Any]:
    """Runs a few steps of ``config`` and returns what profile.json holds; all ranks call it.

    Raises:
        UserError: bad input, or the folder exists and is not a profile.
    """
    if steps < 1:
        raise UserError(f"--steps: expected at least 1, got {steps}")
    out = Path(f"{config.run}-profile")
    made = out.with_name(f"{out.name}.unfinished")  # what is there stays until this is whole
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as held:
        if first:
            held.enter_context(hold(out.parent, out.name, "run"))
            remove(made)
        if out.exists() and not (out / "profile.json").is_file() and any(out.iterdir()):
            raise UserError(f"{out} exists and is not a profile; name another folder with run=")
        try:
            with ExitStack() as inside:
                result = _profile(config, steps, made, inside)
            dist.barrier()
            if first:
                swap_in(made, out)
        finally:
            if first:
                remove(made)
    return result


def _profile(config: Config, steps: int, out: Path, held: ExitStack) -> dict[str, Any]:
    config.run, config.resume, config.log.tensorboard = str(out), False, False
    config.training.steps = WARM_UP + steps + 2
    trainer = make_trainer(config, held=held)
    source = trainer.steps()
    rows = [_measure(trainer, source) for _ in range(WARM_UP + steps)][WARM_UP:]
    batch, trace = _trace(trainer, source, out)
    result = _summary(trainer, rows, trace)
    result.update(_room(result["memory, MB"], _frames(batch), trainer))
    result["planned, MB"] = _planned(trainer, batch)
    result["data, ms a clip"] = _data_stages(trainer)
    if dist.get_rank() == 0:
        write_durably(out / "profile.json", json.dumps(result, indent=1).encode())
        print(_page(result))
    trainer.model.detach()
    return result


def profile_and_leave(config: Config, steps: int = 10) -> dict[str, Any]:
    with process_group():
        return profile(config, steps)


def _measure(trainer: Trainer, source: Any) -> Measured:
    _settle()
    began = time.perf_counter()
    data = next(source)
    ready = time.perf_counter()
    row = trainer.row(trainer.step(data))
    _settle()
    seconds = time.perf_counter() - began
    flops = all_sum([step_flops(model_sizes(trainer), _rows(trainer, data.batches))], trainer.device)[0]
    return Measured(seconds, ready - began, row["tokens"], row["audio_seconds"], flops)


def _data_stages(trainer: Trainer) -> dict[str, float]:
    """Milliseconds that one process takes for a clip by stage, in the first batches of an epoch."""
    steps = trainer.sampler.epoch_steps(0, trainer.rank)
    batches = [batch for step in steps[:DATA_BATCHES] for batch in step][:DATA_BATCHES]
    with watching() as seconds:
        for batch in batches:
            collate([trainer.train[index, 0] for index in batch])
    clips = sum(map(len, batches))
    return {name: 1e3 * spent / clips for name, spent in seconds.items()}


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rows(trainer: Trainer, batches: Sequence[Batch]) -> Rows:
    lengths, speech = [], 0
    for batch in batches:
        for span, ids in zip(trainer.model.prompt_lengths(batch), batch.text, strict=True):
            lengths.append(span + len(ids))
            speech += span
    return Rows(lengths, speech, sum(batch.label_tokens for batch in batches))


def _trace(trainer: Trainer, source: Any, out: Path) -> tuple[Batch, Trace]:
    """The first micro-batch of a step, and the step's trace by torch's profiler."""
    cuda = torch.cuda.is_available()
    data = next(source)
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch_profile(activities=activities, profile_memory=True) as profiler:
        trainer.row(trainer.step(data))
        _settle()
    path = out / f"trace-{dist.get_rank()}.json" if dist.get_rank() else out / "trace.json"
    profiler.export_chrome_trace(str(path))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(out / f"memory-{dist.get_rank()}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    return data.batches[0], Trace(path, device=int(cuda))


def _frames(batch: Batch) -> int:
    """Padded encoder frames, which training.frames limits."""
    return sum(features.shape[0] * features.shape[1] for features in batch.features.values())


def _room(parts: dict[str, float], frames: int, trainer: Trainer) -> dict[str, Any]:
    """What a frame costs, and the largest frame budget for the device's memory, a tenth of which stays free.

    What is kept for the backward is proportional to the number of tokens, also in attention, which keeps one number per
    row.
    """
    moving = ("activations", "head or layer")
    each = sum(parts[name] for name in moving) / frames
    fixed = sum(size for name, size in parts.items() if name not in moving and not name.startswith("of it"))
    whole = device_memory() / 2**20
    room = 0.9 * whole - fixed
    return {
        "memory of the device, MB": whole,
        "memory of 1,000 frames, MB": 1000 * each,
        "largest training.frames": max(int(room / each), 0),
        "training.frames": trainer.settings.frames,
    }


def model_sizes(trainer: Trainer) -> Sizes:
    model = trainer.model
    projectors, encoders = (
        sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())
        for module in (model.projectors, model.encoders)
    )
    return read_sizes(model.decoder.config, model.llm, trainer.config.model.lora, projectors, encoders)


def _planned(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """What ``avsr plan`` says of the same micro-batch."""
    lengths = _rows(trainer, [batch]).lengths
    tokens = sum(lengths) if trainer.config.training.packed else len(lengths) * max(lengths)
    way = way_of(trainer.config, dist.get_world_size())
    planned = memory(model_sizes(trainer), Load(tokens, batch.label_tokens), way)
    return {name: size / 2**20 for name, size in planned.items()}


def _summary(trainer: Trainer, rows: Sequence[Measured], trace: Trace) -> dict[str, Any]:
    seconds = sum(row.seconds for row in rows)
    base = measured(trainer.engine)
    base.pop("activations and the rest")
    stages = {name: trace.ranges(f"avsr/{name}") for name in ("forward", "backward", "optimizer", "metrics")}
    whole = (min(r[0][0] for r in stages.values()), max(r[-1][1] for r in stages.values()))
    flops = sum(row.flops for row in rows)
    peak = _peak_flops(trainer) * dist.get_world_size()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "steps": len(rows),
        "seconds a step": seconds / len(rows),
        "tokens a second": sum(row.tokens for row in rows) / seconds,
        "audio hours an hour": sum(row.audio_seconds for row in rows) / seconds,
        "model TFLOPs a step": flops / len(rows) / 1e12,
        "peak TFLOP/s": peak / 1e12,
        "MFU": flops / seconds / peak,
        "data-wait share": sum(row.wait for row in rows) / seconds,
        "exposed communication share": trace.exposed_communication(whole),
        "stages, ms": {name: sum(b - a for a, b in found) / 1e3 for name, found in stages.items()},
        "memory, MB": {name: size / 2**20 for name, size in memory_parts(trace, base).items()},
        "formula": FORMULA,
    }


def _peak_flops(trainer: Trainer) -> float:
    """FLOP/s of the device: by its name, or else as measured with a matrix product."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, peak in _PEAKS.items():
            if part in name:
                return peak
    dtype = trainer.model.decoder.dtype
    size = 2048 if torch.cuda.is_available() else 1024
    a = torch.randn(size, size, dtype=dtype, device=trainer.device)
    best = float("inf")
    for _ in range(8):
        _settle()
        began = time.perf_counter()
        a @ a
        _settle()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _page(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {name:24s} {number:12,.1f}" for name, number in value.items()]
        elif isinstance(value, float):
            shown = f"{value:.1%}" if key.endswith("share") or key == "MFU" else f"{value:,.3f}"
            lines.append(f"{key:26s} {shown}")
        else:
            lines.append(f"{key:26s} {value}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="avsr.tools.estimate.profiling")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    arguments = parser.parse_args()
    with guarded():
        profile_and_leave(load_config(arguments.config, arguments.overrides), arguments.steps)


if __name__ == "__main__":
    main()
