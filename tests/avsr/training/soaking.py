"""A training that hurts itself: run as ``python soaking.py SEED OUT train RECIPE ...`` under the launcher.

Kills this rank, fills the disk in a save or spoils a loss at random steps, and writes this process' memory and open
files to OUT/RANK-PID.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from avsr.config import load_config
from avsr.errors import guarded
from avsr.training import checkpoint, trainer
from avsr.training.run import train_and_leave

KILLS, FULL, NANS = 0.012, 0.15, 0.01


def main() -> None:
    # the launcher puts its --local_rank in front
    seed, out, recipe, *overrides = [text for text in sys.argv[1:] if not text.startswith("--")]
    rank = int(os.environ.get("RANK", "0"))
    rng = random.Random(f"{seed} {rank}")
    log = Path(out) / f"{rank}-{os.getpid()}.jsonl"
    real_step, real_save, real_scaled = trainer.Trainer.step, checkpoint.save_file, trainer.scaled

    def step(self: trainer.Trainer, batches: Any) -> Any:
        if int(seed) and rng.random() < KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real_step(self, batches)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir("/proc/self/fd"))
        with log.open("a") as file:
            file.write(json.dumps({"step": self.progress.step, "resident": resident, "files": files}) + "\n")
        return done

    def save_file(*args: Any, **kwargs: Any) -> None:
        if int(seed) and rng.random() < FULL:
            raise OSError(28, "No space left on device")
        real_save(*args, **kwargs)

    def scaled(*args: Any) -> Any:
        cross_entropy, decorrelation = real_scaled(*args)
        if rng.random() < NANS and int(seed):
            cross_entropy = cross_entropy * float("nan")
        return cross_entropy, decorrelation

    trainer.Trainer.step = step  # type: ignore[method-assign]
    checkpoint.save_file = save_file
    trainer.scaled = scaled
    with guarded():
        train_and_leave(load_config(recipe, overrides))


if __name__ == "__main__":
    main()
