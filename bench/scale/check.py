"""The model against measurements: the demo's training on 1, 2 and 4 CPU ranks at ZeRO stages 0, 2 and 3.

The model's inputs are measured without distributed training: a step of one process at each stage, the same step in k
independent processes at once (they share the machine's cores), and gloo's collectives between k processes. Its
prediction for k ranks is compared with ``avsr profile`` under the launcher.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from avsr.config import load_config
from avsr.data.batches import BatchSampler, collate
from avsr.tools.estimate.flops import Rows, step_flops
from avsr.tools.estimate.memory import Sizes, Way
from avsr.tools.estimate.profiling import WARM_UP, model_sizes
from avsr.training.run import make_trainer, process_group
from avsr.training.trainer import Trainer
from bench.runner import ledger
from bench.scale.model import Cluster, Link, communication

FOLDER = ledger.ROOT / "runs" / "scale"
TABLE = ledger.RESULTS / "check.csv"
FIELDS = ["date", "commit", "device", "ranks", "stage", "predicted_s", "measured_s", "alone_s", "contention"]
FIELDS += ["imbalance", "communication_s", "planned_mb", "held_mb"]
CORPUS = ["grid=1000", "open=0", "voices=8", "video=0"]  # the demo's
HELD = ("frozen weights", "trained weights", "optimizer")
STEPS = 8
SMALL, LARGE = 1 << 10, 1 << 23  # bytes of messages


def check(stages: tuple[int, ...] = (0, 2, 3), ranks: tuple[int, ...] = (1, 2, 4)) -> None:
    """Measures everything (about 12 minutes on two cores) and appends to ``check.csv``."""
    _run([sys.executable, "-m", "avsr.cli", "synth", str(ledger.ROOT / "data" / "demo"), *CORPUS])
    alone = {stage: side_by_side(1, stage) for stage in stages}
    sizes, imbalance = Sizes(**alone[2]["sizes"]), alone[2]["imbalance"]
    crowd = {k: side_by_side(k, 2)["seconds"] / alone[2]["seconds"] if k > 1 else 1.0 for k in ranks}
    links = {k: link(k) for k in ranks if k > 1}
    origin = ledger.origin(torch.device("cpu"))
    for count in ranks:
        for stage in stages:
            profile = launched(count, stage)
            talk = 0.0
            if count > 1:
                cluster = Cluster("CPU", 1.0, 0.0, count, links[count], links[count])
                talk = sum(communication(sizes, Way(count, stage, 2), cluster))
            one = alone[stage]["seconds"]
            row = {
                **{key: origin[key] for key in ("date", "commit", "device")},
                **{"ranks": count, "stage": stage, "alone_s": one, "contention": crowd[count]},
                **{"imbalance": imbalance[count], "communication_s": talk},
                "predicted_s": one * crowd[count] * imbalance[count] + talk,
                "measured_s": profile["seconds a step"],
                "planned_mb": sum(profile["planned, MB"][name] for name in HELD),
                "held_mb": sum(profile["memory, MB"][name] for name in HELD),
            }
            _append({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def settings(stage: int, run: str) -> list[str]:
    return [f"deepspeed.stage={stage}", f"run={FOLDER / run}", "data.limit=400", "log.tensorboard=false"]


def launched(ranks: int, stage: int) -> dict[str, Any]:
    """profile.json of rank 0."""
    run = f"ranks{ranks}-stage{stage}"
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(_free_port()), "--module", "avsr.tools.estimate.profiling", "demo_decorrelation"]
    _run([*command, *settings(stage, run), "--steps", str(STEPS)])
    return dict(json.loads((FOLDER / f"{run}-profile" / "profile.json").read_text(encoding="utf-8")))


def side_by_side(count: int, stage: int) -> dict[str, Any]:
    """``count`` processes at once: mean seconds of a step; from the first one, the model's sizes and the imbalance
    (work of the slowest of k ranks / work of the mean rank)."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_worker, args=(n, stage, barrier, results)) for n in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    first = next(entry for entry in found if entry["sizes"])
    return {**first, "seconds": statistics.mean(entry["seconds"] for entry in found)}


def _worker(number: int, stage: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    config = load_config("demo_decorrelation", settings(stage, f"alone{number}-stage{stage}"))
    config.training.steps = WARM_UP + STEPS + 1
    with process_group():
        trainer = make_trainer(config)
        source, times = trainer.steps(), []
        for _ in range(WARM_UP + STEPS):
            barrier.wait()
            began = time.perf_counter()
            trainer.row(trainer.step(next(source)))
            times.append(time.perf_counter() - began)
        found: dict[str, Any] = {"seconds": statistics.mean(times[WARM_UP:]), "sizes": None}
        if number == 0:
            found["sizes"] = dataclasses.asdict(model_sizes(trainer))
            found["imbalance"] = {k: _imbalance(trainer, k) for k in (1, 2, 4)}
        results.put(found)


def _imbalance(trainer: Trainer, ranks: int) -> float:
    data, sizes, training = trainer.train, model_sizes(trainer), trainer.settings
    sampler = BatchSampler(data.sizes, training.frames, training.utterances, training.seed, ranks)
    by_rank = [sampler.epoch_steps(0, rank)[: WARM_UP + STEPS] for rank in range(ranks)]

    def work(indices: list[int]) -> float:
        batch = collate([data[i] for i in indices])
        spans = trainer.model.prompt_lengths(batch)
        longest = max(span + len(ids) for span, ids in zip(spans, batch.text, strict=True))  # padding included
        return step_flops(sizes, Rows([longest] * len(indices), sum(spans), batch.label_tokens))

    steps = [[work(steps[n][0]) for steps in by_rank] for n in range(len(by_rank[0]))]
    return sum(max(step) for step in steps) / sum(sum(step) / len(step) for step in steps)


def link(ranks: int) -> Link:
    """gloo between ``ranks`` processes of this machine: rate and latency of a ring all-reduce."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), _free_port()
    processes = [context.Process(target=_reduce, args=(rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    small, large = results.get(timeout=300)
    for process in processes:
        process.join()
    share = (ranks - 1) / ranks
    delay = small / 2 / (ranks - 1)
    return Link(share * LARGE / max(large / 2 - small / 2, 1e-9), delay)


def _reduce(rank: int, ranks: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found = []
    for size in (SMALL, LARGE):
        tensor, times = torch.zeros(size // 2, dtype=torch.bfloat16), []
        for _ in range(30):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times))
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _append(row: dict[str, Any]) -> None:
    ledger.append([row], TABLE, FIELDS)
    print(", ".join(f"{key} {row[key]}" for key in FIELDS[3:]), flush=True)


def _run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, env=environment, cwd=ledger.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
