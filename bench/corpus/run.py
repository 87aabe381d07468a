"""Measures what large corpora cost, in processes of their own, and writes rows, table and figure.

``python -m bench.run data``: all of it, about 15 minutes on two cores and 3 GB of disk. ``--tree FOLDER`` measures the
sources of another version.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from bench.runner import ledger
from bench.runner.ledger import ROOT, append, device_name

RESULTS = ROOT / "bench" / "results" / "corpus.csv"
FIELDS = ["date", "commit", "device", "line", "rows", "seconds", "cpu", "mb", "note"]
SIZES = (100, 10_000, 100_000, 1_000_000, 1_700_000)
LINES = ("read", "start", "order", "loader")
RANKS = 8
WORDS = 2000
CLIPS = 100_000  # of the cache
DELAY = 0.001  # seconds of an open or stat of a slow file system


def rows(count: int) -> Iterator[str]:
    """Lines of a manifest like those of ``avsr prepare vox2``; their files do not exist."""
    rng = random.Random(0)
    words = [
        f"{rng.choice('bdfgklmnprstvz')}{rng.choice('aeiou')}{rng.choice('bdfgklmnprstvz')}{n}" for n in range(WORDS)
    ]
    for number in range(count):
        speaker = f"id{number % 6000:05d}"
        name = f"{speaker}/{number:08x}"
        yield (
            json.dumps(
                {
                    "id": name,
                    "audio": f"clips/{name}.wav",
                    "video": f"clips/{name}.mp4",
                    "duration": round(rng.uniform(1, 6.5), 2),
                    "text": " ".join(rng.choices(words, k=rng.randrange(3, 20))),
                    "speaker": speaker,
                    "sha256": f"{rng.getrandbits(256):064x}",
                }
            )
            + "\n"
        )


def make_manifests(folder: Path, sizes: Sequence[int]) -> dict[int, Path]:
    found = {}
    for count in sizes:
        found[count] = folder / f"rows{count}.jsonl"
        with found[count].open("w") as file:
            file.writelines(rows(count))
        with (folder / f"rows{count}.small.jsonl").open("w") as file:  # a validation set
            file.writelines(rows(100))
    return found


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 8,000 tokens, of the manifests' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    texts = [json.loads(line)["text"] for line in rows(5000)]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8000, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def make_clips(folder: Path, count: int) -> Path:
    """A manifest of ``count`` sounds of 0.3 s."""
    wave = np.random.default_rng(0).normal(scale=0.1, size=4800).astype(np.float32)
    content = io.BytesIO()
    soundfile.write(content, wave, 16_000, format="FLAC")
    lines = []
    for number in range(count):
        path = folder / "clips" / f"{number // 1000:03d}" / f"{number:06d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
        row = {"id": path.stem, "audio": str(path.relative_to(folder)), "duration": 0.3, "text": "x"}
        lines.append(json.dumps(row) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines))
    return folder / "clips.jsonl"


class Runner:
    """Runs ``bench.corpus.child`` on the sources of a tree."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        paths = [str(tree / "kernels"), str(tree), str(ROOT)]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.environment |= {"BENCH_TOKENIZER": str(folder / "tokenizer"), "AVSR_CACHE": str(folder / "cache")}

    @property
    def indexed(self) -> bool:
        """Whether the sources make an index of a manifest."""
        return (self.tree / "avsr" / "data" / "index.py").is_file()

    def start(self, line: str, manifest: Path, wait: bool = False) -> subprocess.Popen[str]:
        # by its path: the tree may have no such module, and its own `avsr` must come first
        command = [sys.executable, str(ROOT / "bench" / "corpus" / "child.py"), line, str(manifest)]
        environment = {**self.environment, **({"BENCH_WAIT": "1"} if wait else {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]

    def once(self, line: str, manifest: Path) -> dict[str, Any]:
        out, error = (process := self.start(line, manifest)).communicate()
        if process.returncode:
            raise RuntimeError(f"{line} of {manifest}: {error}")
        return dict(json.loads(out))

    def cached(self, manifest: Path, *fill: str, delay: float = 0.0) -> dict[str, float]:
        """``bench.corpus.cached``."""
        command = [
            sys.executable,
            str(ROOT / "bench" / "corpus" / "cached.py"),
            str(manifest),
            str(self.folder / "features"),
        ]
        environment = {**self.environment, "BENCH_DELAY": str(delay)}
        done = subprocess.run([*command, *fill], env=environment, text=True, capture_output=True, check=True)
        return dict(json.loads(done.stdout))

    def index(self, manifest: Path) -> None:
        """``avsr index``, where the tree has it."""
        if self.indexed:
            command = [sys.executable, "-m", "avsr.cli", "index", str(manifest)]
            subprocess.run(command, env=self.environment, cwd=self.folder, check=True, capture_output=True)

    def together(self, manifest: Path) -> dict[str, float]:
        """``RANKS`` processes at once: seconds until all have started, and their memory together."""
        from bench.corpus.child import memory

        crew = [self.start("start", manifest, wait=True) for _ in range(RANKS)]
        found = [json.loads(process.stdout.readline()) for process in crew]  # type: ignore[union-attr]
        total = sum(memory(process.pid) for process in crew)
        for process in crew:
            process.communicate("")
        return {"seconds": max(f["seconds"] for f in found), "cpu": sum(f["cpu"] for f in found), "mb": total}


def measure(runner: Runner, manifests: dict[int, Path], sizes: Sequence[int]) -> Iterator[dict[str, object]]:
    for count in sizes:
        if runner.indexed:
            yield {"line": "first start", "rows": count, **runner.once("start", manifests[count])}
        for line in LINES:
            yield {"line": line, "rows": count, **runner.once(line, manifests[count])}
    for count in (sizes[0], sizes[-1]) if runner.indexed else ():  # 40 GB of memory without an index
        yield {"line": f"{RANKS} ranks", "rows": count, **runner.together(manifests[count])}


def measure_cache(runner: Runner, manifest: Path, count: int) -> Iterator[dict[str, object]]:
    began = time.perf_counter()
    runner.index(manifest)
    if runner.indexed:
        yield {"line": "measure all clips", "rows": count, "seconds": time.perf_counter() - began}
    yield {"line": "fill the cache", "rows": count, **runner.cached(manifest, "fill")}
    files = sum(len(names) for _, _, names in os.walk(runner.folder / "features"))
    yield {"line": "files of the cache", "rows": count, "note": files}
    for line, delay in (("cached start", 0.0), ("cached start, slow", DELAY)):
        found = runner.cached(manifest, delay=delay)
        note = f"{found['looks']:.0f} opens and stats; {found['reads a second']:.0f} reads a second"
        yield {"line": line, "rows": count, "seconds": found["seconds"], "note": note}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.run data", description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the sources to measure (default: these)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="rows of the manifests")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of the feature cache; 0 = none")
    parser.add_argument("--dry", action="store_true", help="print, but keep nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-corpus-") as name:
        folder = Path(name)
        print("making manifests", flush=True)
        manifests = make_manifests(folder, options.sizes)
        make_tokenizer(folder / "tokenizer")
        origin = {"date": datetime.date.today().isoformat(), "commit": ledger.commit(options.tree)}
        origin["device"] = device_name(torch.device("cpu"))
        runner = Runner(options.tree, folder)
        parts = [measure(runner, manifests, options.sizes)]
        if options.clips:
            parts.insert(0, measure_cache(runner, make_clips(folder, options.clips), options.clips))
        for row in chain.from_iterable(parts):
            shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k in FIELDS}
            print("  ".join(f"{value:>12}" for value in shown.values()), flush=True)
            if not options.dry:
                append([{**origin, **shown}], RESULTS, FIELDS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
