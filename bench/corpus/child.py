"""One measurement in a process of its own, ``python child.py LINE MANIFEST``: prints a JSON object with ``seconds``,
``cpu`` (seconds) and ``mb``, the memory that the work added (proportional set size, in 10^6 bytes).

It also runs on the sources of older versions, which read a manifest line by line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsr.config import AugmentConfig, DataConfig
from avsr.data.batches import BatchSampler, collate
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.transforms import Transforms

WORKERS, BATCHES = 4, 150  # of the loader
BUDGET = 3000  # frames of a batch


class Frames:
    """Stands for an encoder: 50 frames a second, no weights."""

    width, frames_per_second, max_seconds, needs, identity = 8, 50, 60.0, frozenset({"audio"}), "bench"

    def frames(self, samples: int, video_frames: int) -> int:
        return samples // 320


class Store(FeatureStore):
    """Gives zeros instead of reading files, so that what is measured is what the rows cost."""

    def load(self, utterance: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {"audio": torch.zeros(round(utterance.duration * 50), 8)}


def memory(pid: int | str = "self", kind: str = "Pss") -> float:
    """Proportional set size of a process, in 10^6 bytes; of ``kind`` Pss_Anon without pages of files."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"smaps_rollup has no {kind}")


def dataset(manifest: str, tokenize: Callable[[str], list[int]] = lambda text: [1]) -> SpeechDataset:
    """By durations, as with data.verify=false."""
    config = DataConfig(train=manifest, validation=manifest, verify=False)
    store = Store({"audio": Frames()}, config, Transforms(AugmentConfig(), None, 0))  # type: ignore[dict-item]
    return load_dataset(manifest, config, store, tokenize, title="read", reading=Reading("audio"))


def read(manifest: str) -> Any:
    try:
        from avsr.data.index import open_manifest
    except ImportError:  # an older version
        from avsr.data.manifest import read_manifest

        return read_manifest(manifest)
    return open_manifest(manifest)


def start(manifest: str) -> SpeechDataset:
    """Everything that depends on the number of rows up to the first batch: rows, tokens, lengths, order, overlaps."""
    from avsr.data.overlap import overlaps

    data = dataset(manifest, tokenizer())
    small = dataset(manifest.replace(".jsonl", ".small.jsonl"))
    overlaps(data.utterances, {"data.validation": small.utterances})
    sampler(data).epoch_steps(0, 0)
    return data


def sampler(data: SpeechDataset) -> BatchSampler:
    return BatchSampler(data.sizes, BUDGET, 64, 0, 8, 1)


def tokenizer() -> Any:
    """As training uses one, without a model; its folder is in ``BENCH_TOKENIZER``."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from avsr.models.llm import LoadedLLM

    loaded = AutoTokenizer.from_pretrained(os.environ["BENCH_TOKENIZER"])
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(loaded)))
    return LoadedLLM(SimpleNamespace(config=config), loaded, 0, 0).tokenize


def loader(data: SpeechDataset) -> tuple[float, float]:
    """Mean memory in 10^6 bytes of loader processes that have read some batches of an epoch; without pages of files."""
    batches = [batch for step in sampler(data).epoch_steps(0, 0)[:BATCHES] for batch in step]
    order = [[(index, 0) for index in batch] for batch in batches]
    reader = iter(torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=collate, num_workers=WORKERS))
    for _ in order:
        next(reader)
    pids = [worker.pid for worker in reader._workers]  # type: ignore[attr-defined]
    whole, own = (float(np.mean([memory(pid, kind) for pid in pids])) for kind in ("Pss", "Pss_Anon"))
    return whole, own


def main() -> None:
    line, manifest = sys.argv[1:]
    torch.set_num_threads(1)
    data = dataset(manifest) if line in ("order", "loader") else None
    if line == "start":
        tokenizer()("x")  # imports and the tokenizer are there anyway
    before, cpu, clock = memory(), time.process_time(), time.perf_counter()
    kept: Any = None
    mb, note = 0.0, ""
    if line == "read":
        kept = read(manifest)
    elif line == "start":
        kept = start(manifest)
    elif line == "order":
        assert data is not None
        kept = sampler(data).epoch_steps(0, 0)
    else:
        assert data is not None
        mb, own = loader(data)
        note = f"{own:.0f} MB without pages of files"
    seconds, used = time.perf_counter() - clock, time.process_time() - cpu
    mb = mb or memory() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"seconds": seconds, "cpu": used, "mb": mb, "peak_mb": peak, "note": note}), flush=True)
    if os.environ.get("BENCH_WAIT"):
        sys.stdin.read()  # until the others have been looked at
    del kept


if __name__ == "__main__":
    main()
