"""The voices of babble from a manifest: some of its utterances, decoded once into a file of the cache and mapped from
there by all processes of a machine, whatever the size of the corpus."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsr.data.clip import load_clip
from avsr.data.index import open_manifest
from avsr.data.manifest import Utterance
from avsr.errors import UserError, visible
from avsr.runtime.folders import cache_folder, flush, part_of, remove
from avsr.runtime.progress import ProgressBar
from avsr.runtime.ranks import after_the_first_rank

logger = logging.getLogger("avsr")
_WAVES, _ROWS = "waves.npy", "talkers.json"
_VERSION = 1  # of what is in the folder


@dataclass(frozen=True)
class Talkers:
    """Utterances in the order of their speakers' names.

    Attributes:
        speakers: their speakers.
        sources: their files and parts of files, as :func:`source_of` names them.
        ends: where each ends in ``waves``, beginning at the end of the one before; empty if it cannot be used.
        waves: (samples,) float32 at 16 kHz of all of them.
        total: number of utterances in the manifest.
    """

    speakers: list[str]
    sources: list[str]
    ends: list[int]
    waves: np.ndarray[Any, Any]
    total: int

    def __len__(self) -> int:
        return len(self.speakers)

    def wave(self, index: int) -> Tensor | None:
        """(samples,) float32, or None if it cannot be used."""
        begin = self.ends[index - 1] if index else 0
        held = np.array(self.waves[begin : self.ends[index]])
        return torch.from_numpy(held) if len(held) else None


def source_of(utterance: Utterance) -> str:
    """Names what an utterance holds."""
    part = "" if utterance.offset is None else f" {utterance.offset}"
    return f"{utterance.audio or utterance.video}{part}"


def open_talkers(manifest: str, most: int, absolute: bool) -> Talkers:
    """The talkers of a manifest: at most ``most`` of its utterances, 0 = all. They depend on nothing else, so that all
    runs have the same.

    In a training, rank 0 reads them before the others do.

    Args:
        manifest: path of a manifest.
        most: number of utterances.
        absolute: as of :func:`~avsr.data.manifest.read_manifest`.

    Raises:
        UserError: the manifest cannot be read.
    """
    try:
        stat = os.stat(manifest)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {manifest}: {error}") from error
    state = f"{_VERSION} {os.path.abspath(manifest)} {stat.st_size} {stat.st_mtime_ns} {most} {absolute}"
    folder = cache_folder() / "talkers" / hashlib.sha256(state.encode()).hexdigest()[:32]
    with after_the_first_rank():
        held = _read(folder)
        if held is not None:
            return held
        return _make(folder, *_choose(manifest, most, absolute))


def _choose(manifest: str, most: int, absolute: bool) -> tuple[list[Utterance], int]:
    """Of as many speakers as possible; an utterance without a name counts as a speaker of its own."""
    rows = open_manifest(manifest, absolute=absolute).utterances
    speakers = rows.column("speaker").to_pylist()
    chosen = list(range(len(rows)))
    if 0 < most < len(rows):
        random.Random("talkers").shuffle(chosen)
        seen: Counter[str] = Counter()
        turns = []
        for place in chosen:
            turns.append(seen[speakers[place]])
            seen[speakers[place]] += bool(speakers[place])
        chosen = [chosen[index] for index in np.argsort(turns, kind="stable")[:most]]
    return [rows[place] for place in sorted(chosen, key=lambda place: speakers[place])], len(rows)


def _make(folder: Path, utterances: list[Utterance], total: int) -> Talkers:
    waves: list[np.ndarray[Any, Any]] = [np.zeros(0, np.float32)]
    ends: list[int] = []
    with ProgressBar("read talkers", len(utterances)) as bar:
        for utterance in utterances:
            waves.append(_usable(utterance))
            ends.append((ends[-1] if ends else 0) + len(waves[-1]))
            bar.advance()
    speakers, sources = [u.speaker for u in utterances], [source_of(u) for u in utterances]
    talkers = Talkers(speakers, sources, ends, np.concatenate(waves), total)
    try:
        _keep(folder, talkers)
    except OSError as error:
        logger.warning("%s: the talkers of the babble are not kept: %s", folder, error.strerror or error)
    return _read(folder) or talkers


def _usable(utterance: Utterance) -> np.ndarray[Any, Any]:
    try:
        wave = load_clip(utterance, frozenset({"audio"}), 0.0).wave
        assert wave is not None
        return np.asarray(wave.numpy(), dtype=np.float32)
    except UserError as error:
        logger.warning("%s: left out of the babble", visible(str(error)))
        return np.zeros(0, np.float32)


def _keep(folder: Path, talkers: Talkers) -> None:
    part = part_of(folder)
    try:
        part.mkdir(parents=True)
        np.save(part / _WAVES, talkers.waves)
        rows = {name: getattr(talkers, name) for name in ("speakers", "sources", "ends", "total")}
        (part / _ROWS).write_text(json.dumps(rows), encoding="utf-8")
        for path in (part / _WAVES, part / _ROWS):
            flush(path)
        remove(folder)  # damaged, or made by another process just now; who has mapped it keeps it
        os.replace(part, folder)
    finally:
        remove(part)


def _read(folder: Path) -> Talkers | None:
    """None if they are not there, or damaged."""
    try:
        rows = json.loads((folder / _ROWS).read_text(encoding="utf-8"))
        found = Talkers(**rows, waves=np.load(folder / _WAVES, mmap_mode="r", allow_pickle=False))
        if found.waves.dtype != np.float32 or found.waves.ndim != 1 or len(found.waves) != (found.ends or [0])[-1]:
            raise ValueError("the two files do not fit together")
        if not len(found.speakers) == len(found.sources) == len(found.ends) or sorted(found.ends) != found.ends:
            raise ValueError("rows are missing")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, EOFError, RecursionError) as error:
        logger.warning("%s is damaged and is made again: %s", folder, visible(str(error)))
        return None
