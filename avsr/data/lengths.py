"""Lengths of the utterances of a dataset in encoder frames: from the index of their manifest, if they were measured for
it, else by reading every clip, or from features."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from avsr.data.clip import refuse_mismatch
from avsr.data.features import FeatureStore
from avsr.data.index import Index
from avsr.data.manifest import Utterance
from avsr.data.measured import SHARE, Measured, lasting_many
from avsr.data.measuring import measure, measure_row, measured, state_of
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_FRAME
from avsr.data.transforms import Version
from avsr.data.utterances import Utterances
from avsr.errors import ClipError, UserError
from avsr.runtime.share import Share

Numbers = np.ndarray[Any, Any]
Found = tuple[dict[str, Numbers], dict[int, str]]


def measure_missing(index: Index | None, manifest: str, store: FeatureStore, workers: int) -> None:
    """Measures the clips of a manifest with an index if nothing else reads them before training. Collective."""
    if not store.reads_before or store.keeps:
        return
    together = dist.is_initialized() and dist.get_world_size() > 1
    share = Share(dist.get_rank() + 1, dist.get_world_size()) if together else None
    places = [str(index.folder) if index is not None and os.access(index.folder, os.W_OK) else ""]
    if together:  # the index may be in the cache of one host, or read-only on another
        places *= dist.get_world_size()
        dist.all_gather_object(places, places[0])
    if not places[0] or len(set(places)) > 1:
        return  # every rank reads the clips of its own share
    for signal in sorted(store.needs):
        if measured(index, [signal]) is None:
            measure(Path(manifest), signal, workers=max(workers, 1), share=share)
    if together:
        dist.barrier()


def frames_of(
    mine: Utterances, index: Index | None, store: FeatureStore, versions: list[Version], bar: tuple[str, bool]
) -> Found:
    """Encoder frames by stream, (N,) int64 each, and by place the reasons of refusals.

    Args:
        mine: N utterances; what a cache of features lacks of them is encoded.
        index: of their manifest.
        store: of their features.
        versions: that are read.
        bar: the title of the progress bar, and whether it is shown.
    """
    if not store.reads_before:
        return _encoded(store, *lasting_many(mine.numbers("duration"))), {}
    tables = measured(index, sorted(store.needs))
    if tables is None or index is None:
        unusable = store.prepare(mine, title=bar[0], versions=versions, shown=bar[1])
        return _looked_up(mine, store, versions[0], unusable)
    frames, bad = _measured(mine, tables, store)
    if store.keeps:
        held = known(index, store, versions)[mine.rows]
        held[list(bad)] = True  # or of no interest
        rest = np.flatnonzero(~held)
        unusable = store.prepare(mine.select(rest), title=bar[0], versions=versions, shown=bar[1])
        store.measured.clear()
        for place in rest.tolist() if unusable else ():
            if (name := mine[place].id) in unusable:
                bad[place] = unusable[name]
    return frames, bad


def known(index: Index, store: FeatureStore, versions: list[Version]) -> Numbers:
    """(rows of the index,) bool: which of them the cache of ``store`` certainly holds."""
    state = state_of(index)
    return store.complete(state, versions).rows(len(index.table)) if state else np.zeros(len(index.table), dtype=bool)


def keep_known(rows: Numbers, index: Index | None, store: FeatureStore, versions: list[Version]) -> None:
    """Keeps for the next start that the cache of ``store`` holds these ``rows`` of the index; by one rank."""
    state = state_of(index)
    if index is None or not store.keeps or not state:
        return
    held = store.complete(state, versions)
    there = held.rows(len(index.table))
    there[rows] = True
    held.keep(there)


def _looked_up(mine: Utterances, store: FeatureStore, version: Version, unusable: dict[str, str]) -> Found:
    """Of utterances that were prepared; all versions have the same length."""
    frames = {name: np.zeros(len(mine), dtype=np.int64) for name in store.active}
    bad: dict[int, str] = {}
    for place, utterance in enumerate(mine):
        if utterance.id in unusable:
            bad[place] = unusable[utterance.id]
            continue
        try:
            counts = store.frames(utterance, version)
        except ClipError as error:
            bad[place] = str(error)
            continue
        for name, count in counts.items():
            frames[name][place] = count
        try:
            store.measure(utterance, counts)
        except UserError as error:
            bad[place] = str(error)
    store.measured.clear()  # nobody asks again, and a corpus has many
    return frames, bad


def _measured(mine: Utterances, tables: dict[str, pa.Table], store: FeatureStore) -> Found:
    bad: dict[int, str] = {}
    rows = pa.array(mine.rows)
    found = {signal: table.take(rows) for signal, table in tables.items()}
    lengths = {signal: np.asarray(part.column("length")).copy() for signal, part in found.items()}
    for signal, part in found.items():
        for place in np.flatnonzero(lengths[signal] <= 0).tolist():
            utterance = mine[place]
            row = measure_row(utterance, signal, part.slice(place, 1).to_pylist()[0])  # it may have been repaired
            lengths[signal][place] = row["length"]
            if row["length"] <= 0:
                bad.setdefault(place, f"{utterance.where}: {row['reason'] or f'{utterance.id!r} has no {signal}'}")
    none = np.zeros(len(mine), dtype=np.int64)
    samples, pictures = (lengths.get(signal, none).clip(min=0) for signal in ("audio", "video"))
    if len(found) == 2:
        apart = np.abs(samples / SAMPLE_RATE - pictures / FRAMES_PER_SECOND) > store.max_mismatch
        for place in np.flatnonzero(apart).tolist():
            counts = int(samples[place]), int(pictures[place])
            _refuse(bad, place, partial(refuse_mismatch, *counts, store.max_mismatch), mine)
        pictures = np.minimum(pictures, -(-samples // SAMPLES_PER_FRAME))
        samples = pictures * SAMPLES_PER_FRAME
    seconds = np.maximum(samples / SAMPLE_RATE, pictures / FRAMES_PER_SECOND)
    declared = mine.numbers("duration")
    low, high = store.limits
    doubtful = np.abs(seconds - declared) > np.maximum(store.max_mismatch, SHARE * declared)
    for place in np.flatnonzero(doubtful | (seconds < low) | (seconds > high)).tolist():
        _refuse(bad, place, partial(store.refuse_length, seconds=float(seconds[place])), mine)
    return _encoded(store, samples, pictures), bad


def _refuse(bad: dict[int, str], place: int, check: Callable[[Utterance], None], mine: Utterances) -> None:
    if place in bad:
        return
    try:
        check(mine[place])
    except UserError as error:
        bad[place] = str(error)


def _encoded(store: FeatureStore, samples: Numbers, pictures: Numbers) -> dict[str, Numbers]:
    """(N,) int64 frames by stream that the encoders make of clips of so many ``samples`` (N,) at 16 kHz and
    ``pictures`` (N,) at 25 fps."""
    kinds, which = np.unique(np.stack([samples, pictures], axis=1), axis=0, return_inverse=True)
    out = {}
    for name in store.active:
        counts = [store.encoders[name].frames(*Measured(*kind)) for kind in kinds.tolist()]  # far fewer than clips
        out[name] = np.array(counts, dtype=np.int64)[which.ravel()]
    return out
