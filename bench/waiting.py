"""How OpenMP's threads should wait for each other: a training step on a quiet machine and on a busy one.

``python -m bench.waiting`` times the demo's step in child processes, each with other environment variables, in turns,
alone and beside other programs, and appends the rows to the ledger. gcc's OpenMP, which torch brings along, reads its
variables when it is loaded, so every setting needs a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench import ledger

SETTINGS = ("", "GOMP_SPINCOUNT=10000", "GOMP_SPINCOUNT=1000", "GOMP_SPINCOUNT=100", "OMP_WAIT_POLICY=PASSIVE")
# another program: products on as many threads, which wait as threads do by default
OTHER = "import torch\na = torch.randn(384, 384)\nwhile True: a = (a @ a).clamp(-1, 1)"
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", type=int, default=3, help="programs that run beside on the busy machine")
    parser.add_argument("--rounds", type=int, default=3, help="processes a setting")
    parser.add_argument("--steps", type=int, default=12, help="timed in each")
    parser.add_argument("--dry", action="store_true", help="print, but leave the ledger alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(time_steps(arguments.steps)))
        return
    rows = []
    for others in (0, arguments.others):
        samples: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        with programs(others):
            for _ in range(arguments.rounds):
                for setting in SETTINGS:
                    samples[setting] += child(setting, arguments.steps)
        rows += table(samples, others)
    if not arguments.dry:
        ledger.append(rows)


def child(setting: str, steps: int) -> list[float]:
    """Seconds of every step in a process with ``setting`` = NAME=VALUE or "" in its environment."""
    command = [sys.executable, "-m", "bench.waiting", "--child", "--steps", str(steps)]
    done = subprocess.run(command, env=_environment(setting), stdout=subprocess.PIPE, check=True, text=True)
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def _environment(setting: str) -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    name, _, value = setting.partition("=")
    return {**plain, name: value} if setting else plain


@contextmanager
def programs(count: int) -> Iterator[None]:
    """Keeps the machine busy with so many other programs."""
    running = [subprocess.Popen([sys.executable, "-c", OTHER], env=_environment("")) for _ in range(count)]
    try:
        time.sleep(5.0 if count else 0.0)  # until they have imported torch
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def time_steps(count: int) -> list[float]:
    import torch

    from bench.shapes import MODELS
    from bench.speech_steps import Setting, Variant, demo_rows, make_step

    model = MODELS["smollm2-135m"]
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    step = make_step(Setting(model, model.layers, demo_rows(), torch.device("cpu"), dtype), Variant(), {})
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def table(samples: dict[str, list[float]], others: int) -> list[ledger.Row]:
    """Rows for the ledger, also printed; the ratio is to threads that wait as they do by default."""
    import torch

    from bench.speech_steps import demo_rows

    origin = ledger.origin(torch.device("cpu"))
    usual = ledger.quantiles(samples[""])[1]
    where = f"{others} programs beside" if others else "quiet"
    rows = []
    for setting, seconds in samples.items():
        low, middle, high = (value * 1e3 for value in ledger.quantiles(seconds))
        row = {
            **origin,
            "claim": "waiting",
            "provider": setting or "default",
            "shape": f"demo's step, {len(demo_rows())} utterances, {where}",
            **{"p20_ms": f"{low:.1f}", "p50_ms": f"{middle:.1f}", "p80_ms": f"{high:.1f}"},
            **{"metric": "time", "against": "default", "ratio": f"{middle / 1e3 / usual:.3f}", "verdict": "report"},
        }
        print(f"{row['provider']:26s} {row['shape']:50s} {middle:9.1f} ms ({low:.1f}..{high:.1f})  {row['ratio']}")
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
