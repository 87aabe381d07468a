"""A manifest as a dataset: checked before training, with features and token ids."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed as dist
from torch.utils.data import Dataset

from avsr.config import TASKS, DataConfig
from avsr.data.batches import Example, Lost
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.index import Index, open_manifest
from avsr.data.lengths import frames_of, keep_known, measure_missing
from avsr.data.manifest import Utterance, write_manifest
from avsr.data.measuring import stamps
from avsr.data.stopwatch import stage
from avsr.data.tokens import count_tokens
from avsr.data.transforms import PLAIN, Version
from avsr.data.utterances import Utterances
from avsr.errors import ClipError, UserError, visible
from avsr.runtime.rows import read_rows

logger = logging.getLogger("avsr")
REJECTED = "rejected.jsonl"  # in the folder of a run
_SHOWN = 5  # bad lines named in one message


Numbers = np.ndarray[Any, Any]


class Sizes(NamedTuple):
    """The utterances of a dataset in order: their ids (N,), and encoder frames over all streams (N,) int64."""

    ids: pa.ChunkedArray
    frames: Numbers


class Checked(NamedTuple):
    """What one rank found out about its share of a manifest, by place in the share."""

    bad: dict[int, str]  # reasons of refusals
    frames: Numbers  # (N,) int64 encoder frames over all streams
    failure: str = ""  # the error that ended the check on this rank


@dataclass(frozen=True)
class Reading:
    """How the utterances of a manifest are read: as ``version`` for ``task``; or in training as augmented version
    number ``draw``, for a task drawn with the weights ``tasks``."""

    task: str
    version: Version = PLAIN
    tasks: Mapping[str, float] = field(default_factory=dict)
    versions: int = 0  # number of augmented versions; 0 = no limit
    augmented: bool = False
    seed: int = 0
    lossy: bool = False  # a clip that can no longer be read gives a Lost instead of an error

    def all_versions(self) -> list[Version]:
        """All versions that a cache has to hold, at least one."""
        return [Version(draw=n) for n in range(self.versions or 1)] if self.augmented else [self.version]

    def pick(self, utterance: Utterance, draw: int | None) -> tuple[Version, str]:
        if draw is None:
            return self.version, self.task
        version = self.version
        if self.augmented:
            version = Version(draw=draw % self.versions if self.versions else draw)
        if not self.tasks:
            return version, self.task
        rng = random.Random(f"{self.seed} {utterance.id} {draw} task")
        return version, rng.choices(list(self.tasks), list(self.tasks.values()))[0]


class SpeechDataset(Dataset[Example]):
    """Examples of a manifest's utterances, by index or by (index, draw).

    It holds numbers and a table that is mapped, so that loader processes share its memory. ``sizes`` are (N,) int64
    encoder frames over all streams; ``bad`` holds the reason of every refusal by id. A resumed run keeps the utterances
    it began with, also those in ``bad``: they are always lost.
    """

    def __init__(
        self,
        utterances: Utterances,
        sizes: Numbers,
        bad: Mapping[str, str],
        store: FeatureStore,
        tokenize: Callable[[str], list[int]],
        reading: Reading,
    ) -> None:
        self.utterances = utterances
        self.sizes = sizes
        self.bad = dict(bad)
        self.reading = reading
        self._store = store
        self._tokenize = tokenize

    @property
    def frames(self) -> Sizes:
        return Sizes(self.utterances.column("id"), self.sizes)

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def skipped(self) -> int:
        return len(self.bad)

    @property
    def cached(self) -> list[str]:
        """The streams of its task that are read as features of a cache, without their encoder."""
        return [stream for stream in TASKS[self.reading.task] if stream not in self._store.inside]

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        """An :class:`Example`, or possibly a :class:`Lost` when ``reading.lossy``."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        with stage("row"):
            utterance = self.utterances[index]
        version, task = self.reading.pick(utterance, draw)
        if utterance.id in self.bad:
            return Lost(utterance, task, self.bad[utterance.id])
        try:
            features = self._store.load(utterance, version, TASKS[task])
        except ClipError as error:
            if not self.reading.lossy:
                raise
            return Lost(utterance, task, str(error))
        finally:
            self._store.measured.pop(utterance.id, None)  # or a loader process would keep those of the whole corpus
        with stage("tokens"):
            return Example(utterance, features, self._tokenize(utterance.text), task)


Refuse = Callable[[dict[str, int], int], str]


def load_dataset(
    manifest: str,
    config: DataConfig,
    store: FeatureStore,
    tokenize: Callable[[str], list[int]],
    *,
    title: str,
    reading: Reading,
    refuse: Refuse = lambda frames, tokens: "",
    began: Sizes | None = None,
    rejected: Path | None = None,
) -> SpeechDataset:
    """Reads, checks and (with a cache) encodes a manifest; ranks share the work.

    Args:
        manifest: path of a manifest, or a dataset (:func:`~avsr.data.foreign.resolve`).
        config: limits, and what to do about bad utterances.
        store: source of the features.
        tokenize: text to token ids.
        title: of the progress bar.
        reading: how the utterances are read.
        refuse: given encoder frames by stream and the number of text tokens, says why such an utterance cannot be
            used, or "".
        began: ``frames`` of the dataset that the run began with. The result then has the same utterances and sizes in
            the same order, whatever has happened to their clips since.
        rejected: with ``data.on_bad`` "skip", a file of JSON lines (manifest, id, reason) in which those of this
            manifest are replaced by the utterances that are left out now.

    Raises:
        UserError: an utterance cannot be used and ``data.on_bad`` is "refuse"; or more than ``data.max_bad`` of them
            cannot, or none can; or the manifest lacks one of ``began``.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    path, absolute = resolve(manifest, config)
    found = open_manifest(path, absolute=absolute)
    utterances = found.utterances[: config.limit or None]
    if began is not None:
        utterances = _again(utterances, began, manifest)
    tokens = count_tokens(utterances, found.index, tokenize, shown=rank == 0)
    refused = {
        place: f"{utterances.where(place)}: the transcript has {tokens[place]} tokens, allowed are "
        f"data.max_text_tokens = {config.max_text_tokens}"
        for place in np.nonzero(tokens > config.max_text_tokens)[0].tolist()
    }
    left = np.setdiff1d(np.arange(len(utterances)), list(refused))
    mine = left[rank::world]
    if not config.limit:  # of the first few, others need not be measured
        measure_missing(found.index, str(path), store, config.workers)
    store.refresh()
    utterances.know(stamps(found.index))
    own = _check(utterances.select(mine), tokens[mine], found.index, store, reading, (title, rank == 0), refuse)
    frames = np.zeros(len(utterances), dtype=np.int64)
    for share, part in enumerate(_gather(own, world)):
        if part.failure:
            raise UserError(part.failure)
        places = left[share::world]
        frames[places] = part.frames
        refused |= {int(places[place]): reason for place, reason in part.bad.items()}
    store.refresh()  # with what the other ranks have encoded
    bad = {f"bad line {number}": line for number, line in enumerate(found.bad)}
    bad |= {utterances[place].id: refused[place] for place in sorted(refused)}
    if rejected is not None and rank == 0 and config.on_bad == "skip":
        _keep_rejected(rejected, manifest, bad)
    if bad:
        _report(bad, manifest, len(utterances) + len(found.bad), config, rejected)
    usable = np.setdiff1d(np.arange(len(utterances)), list(refused))
    if not len(usable):
        raise UserError(f"{manifest}: no utterance can be used")
    if rank == 0:
        keep_known(utterances.rows[usable], found.index, store, reading.all_versions())
    if began is not None:
        return SpeechDataset(utterances, began.frames, bad, store, tokenize, reading)
    kept = utterances if len(usable) == len(utterances) else utterances.select(usable)
    return SpeechDataset(kept, frames[usable], bad, store, tokenize, reading)


def _again(utterances: Utterances, began: Sizes, manifest: str) -> Utterances:
    """The utterances that a run began with, in its order."""
    ids = utterances.column("id")
    if ids.equals(began.ids):
        return utterances
    places = pc.index_in(began.ids, value_set=ids.combine_chunks())
    gone = began.ids.filter(pc.is_null(places))
    if len(gone):
        first = ", ".join(map(visible, gone[:_SHOWN].to_pylist()))
        raise UserError(
            f"resume: {manifest} lacks {len(gone)} utterances that the run began with ({first}); "
            "restore its lines, or begin a new run with run="
        )
    if len(ids) > len(began.ids):
        extra = len(ids) - len(began.ids)
        logger.warning("%s: %d utterances are left out, since the run began without them", manifest, extra)
    return utterances.select(np.asarray(places.to_numpy(), dtype=np.int64))


def _check(
    mine: Utterances,
    tokens: Numbers,
    index: Index | None,
    store: FeatureStore,
    reading: Reading,
    bar: tuple[str, bool],
    refuse: Refuse,
) -> Checked:
    """This rank's share. ``bar`` is the title of the progress bar, and whether it is shown."""
    try:
        counts, bad = frames_of(mine, index, store, reading.all_versions(), bar)
    except UserError as error:
        return Checked({}, np.zeros(len(mine), dtype=np.int64), str(error))
    usable = np.setdiff1d(np.arange(len(mine)), list(bad))
    names = list(counts)
    columns = np.stack([*(counts[name][usable] for name in names), tokens[usable]], axis=1)
    kinds, which = np.unique(columns, axis=0, return_inverse=True)
    for kind, numbers in enumerate(kinds.tolist()):  # far fewer than utterances
        if reason := refuse(dict(zip(names, numbers, strict=False)), numbers[-1]):
            for place in usable[which.ravel() == kind].tolist():
                utterance = mine[place]
                bad[place] = f"{utterance.where}: {utterance.audio or utterance.video} {reason}"
    return Checked(bad, np.stack(list(counts.values())).sum(axis=0))


def _keep_rejected(path: Path, manifest: str, bad: dict[str, str]) -> None:
    try:
        others = [row for row in read_rows(path, lambda row: row["manifest"]) if row["manifest"] != manifest]
        write_manifest(path, [*others, *({"manifest": manifest, "id": id, "reason": bad[id]} for id in bad)])
    except (OSError, UserError) as error:
        logger.warning("%s: cannot keep the list of what is left out: %s", path, error)


def _report(bad: dict[str, str], manifest: str, total: int, config: DataConfig, rejected: Path | None) -> None:
    listed = "\n  ".join(map(visible, list(bad.values())[:_SHOWN]))
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if config.on_bad != "skip":
        raise UserError(
            f"{manifest}: {len(bad)} of {total} utterances cannot be used (data.on_bad=skip leaves them out):\n  "
            f"{listed}{more}"
        )
    more += f"\n  all are in {rejected}" if rejected is not None else ""
    if len(bad) > config.max_bad * total:
        raise UserError(
            f"{manifest}: {len(bad)} of {total} utterances cannot be used, more than data.max_bad = {config.max_bad:g} "
            f"of them:\n  {listed}{more}"
        )
    logger.warning("%s: skipped %d of %d utterances:\n  %s%s", manifest, len(bad), total, listed, more)


def _gather(own: Checked, world: int) -> list[Checked]:
    parts = [own] * world
    if world == 1:
        return parts
    dist.all_gather_object(parts, own)
    return parts
