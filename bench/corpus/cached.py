"""A start with a complete feature cache: seconds and looks at the file system, in a process of its own,
``python cached.py MANIFEST CACHE [fill]``. With ``BENCH_DELAY``, every open and stat takes so many seconds longer, as
on a network file system. ``fill`` writes the features first. It also runs on the sources of older versions.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avsr.config import AugmentConfig, DataConfig
from avsr.data.clip import Clip
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.transforms import Transforms

READS = 5000  # utterances whose features are read at random


class Tiny:
    """Stands for an encoder whose features are 50 times 64 random numbers a second."""

    width, frames_per_second, max_seconds, needs, identity = 64, 50, 60.0, frozenset({"audio"}), "bench"

    def frames(self, samples: int, video_frames: int) -> int:
        return samples // 320

    def prepare(self, clip: Clip) -> Tensor:
        return torch.zeros(clip.samples)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        return [torch.randn(len(wave) // 320, self.width) for wave in inputs]


class Store(FeatureStore):
    """Decodes nothing: a clip lasts as long as its line says."""

    def _checked(self, utterance: Any) -> Clip:
        clip = Clip(torch.zeros(round(utterance.duration * 16_000)))
        if hasattr(clip, "measured"):
            self.measured[utterance.id] = clip.measured
        else:  # an older version
            self.sizes[utterance.id] = (clip.samples, 0)  # type: ignore[attr-defined]
        return clip


class Looks:
    """Counts opens and stats, and makes each take longer."""

    def __init__(self, delay: float) -> None:
        self.count, self._delay = 0, delay

    def __enter__(self) -> Looks:
        self._before = [(place, name, getattr(place, name)) for place, name in self._patched()]
        for place, name, real in self._before:
            setattr(place, name, self._slow(real))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, real in self._before:
            setattr(place, name, real)

    @staticmethod
    def _patched() -> list[tuple[Any, str]]:
        return [(builtins, "open"), (os, "open"), (os, "stat"), (os, "lstat"), (os, "listdir"), (os, "scandir")]

    def _slow(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self._delay:
                time.sleep(self._delay)
            return real(*arguments, **options)

        return call


def load(manifest: str, cache: str) -> SpeechDataset:
    config = DataConfig(train=manifest, validation=manifest, cache=cache, min_seconds=0.05)
    store = Store({"audio": Tiny()}, config, Transforms(AugmentConfig(), None, 0))  # type: ignore[dict-item]
    return load_dataset(manifest, config, store, lambda text: [1], title="read", reading=Reading("audio"))


def main() -> None:
    manifest, cache, *fill = sys.argv[1:]
    torch.set_num_threads(1)
    began = time.perf_counter()
    if fill:
        load(manifest, cache)
        print(json.dumps({"seconds": time.perf_counter() - began}))
        return
    with Looks(float(os.environ.get("BENCH_DELAY", "0"))) as looks:
        data = load(manifest, cache)
        seconds, count = time.perf_counter() - began, looks.count
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:READS].tolist()
    began = time.perf_counter()
    for index in order:
        data[index]
    rate = len(order) / (time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "looks": count, "reads a second": rate}))


if __name__ == "__main__":
    main()
