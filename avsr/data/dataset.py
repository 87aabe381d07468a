"""A manifest as a dataset: checked before training, with features and token ids."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils.data import Dataset

from avsr.config import TASKS, DataConfig
from avsr.data.batches import Example, Lost
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.manifest import Utterance, read_manifest, write_manifest
from avsr.data.measured import Measured
from avsr.data.transforms import PLAIN, Version
from avsr.errors import ClipError, UserError, visible
from avsr.runtime.rows import read_rows

logger = logging.getLogger("avsr")
REJECTED = "rejected.jsonl"  # in the folder of a run
_SHOWN = 5  # bad lines named in one message


class Checked(NamedTuple):
    """What one rank found out about its share of a manifest, by utterance id."""

    bad: dict[str, str]  # reasons of refusals
    measured: dict[str, Measured]
    frames: dict[str, int]  # encoder frames over all streams
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

    ``frames`` holds encoder frames over all streams by id, ``sizes`` the same in order; ``bad`` holds the reason of
    every refusal by id. A resumed run keeps the utterances it began with, also those in ``bad``: they are always lost.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        frames: Mapping[str, int],
        bad: Mapping[str, str],
        store: FeatureStore,
        tokenize: Callable[[str], list[int]],
        reading: Reading,
    ) -> None:
        self.utterances = list(utterances)
        self.frames = {utterance.id: frames[utterance.id] for utterance in self.utterances}
        self.sizes = tuple(self.frames.values())
        self.bad = dict(bad)
        self.reading = reading
        self._store = store
        self._tokenize = tokenize

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
    began: Mapping[str, int] | None = None,
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
    lines: list[str] = []
    path, absolute = resolve(manifest, config)
    utterances = read_manifest(path, on_bad=lines.append, absolute=absolute)[: config.limit or None]
    bad = {f"bad line {number}": line for number, line in enumerate(lines)}
    if began is not None:
        utterances = _again(utterances, began, manifest)
    tokens = {utterance.id: len(tokenize(utterance.text)) for utterance in utterances}
    for utterance in utterances:
        if tokens[utterance.id] > config.max_text_tokens:
            bad[utterance.id] = (
                f"{utterance.where}: the transcript has {tokens[utterance.id]} tokens, allowed are "
                f"data.max_text_tokens = {config.max_text_tokens}"
            )
    mine = [u for u in utterances if u.id not in bad][rank::world]
    own = _check(mine, store, reading, (title, rank == 0), lambda u, f: refuse(f, tokens[u.id]))
    frames: dict[str, int] = {}
    for part in _gather(own, world):
        if part.failure:
            raise UserError(part.failure)
        bad.update(part.bad)
        store.measured.update(part.measured)
        frames.update(part.frames)
    if rejected is not None and rank == 0 and config.on_bad == "skip":
        _keep_rejected(rejected, manifest, bad)
    if bad:
        _report(bad, manifest, len(utterances) + len(lines), config, rejected)
    usable = [u for u in utterances if u.id not in bad]
    if not usable:
        raise UserError(f"{manifest}: no utterance can be used")
    kept, sizes = (usable, frames) if began is None else (utterances, began)
    return SpeechDataset(kept, sizes, bad, store, tokenize, reading)


def _again(utterances: list[Utterance], began: Mapping[str, int], manifest: str) -> list[Utterance]:
    """The utterances that a run began with, in its order."""
    by_id = {utterance.id: utterance for utterance in utterances}
    gone = [name for name in began if name not in by_id]
    if gone:
        first = ", ".join(map(visible, gone[:_SHOWN]))
        raise UserError(
            f"resume: {manifest} lacks {len(gone)} utterances that the run began with ({first}); "
            "restore its lines, or begin a new run with run="
        )
    if len(by_id) > len(began):
        extra = len(by_id) - len(began)
        logger.warning("%s: %d utterances are left out, since the run began without them", manifest, extra)
    return [by_id[name] for name in began]


def _check(
    mine: Sequence[Utterance],
    store: FeatureStore,
    reading: Reading,
    bar: tuple[str, bool],
    refuse: Callable[[Utterance, dict[str, int]], str],
) -> Checked:
    """This rank's share. ``bar`` is the title of the progress bar, and whether it is shown."""
    versions = reading.all_versions()
    frames: dict[str, int] = {}
    try:
        bad = store.prepare(mine, title=bar[0], versions=versions, shown=bar[1])
        for utterance in mine:
            if utterance.id in bad:
                continue
            try:
                counts = store.frames(utterance, versions[0])  # all versions have the same length
            except ClipError as error:
                bad[utterance.id] = str(error)
                continue
            frames[utterance.id] = sum(counts.values())
            try:
                store.measure(utterance, counts)
            except UserError as error:
                bad[utterance.id] = str(error)
                continue
            if reason := refuse(utterance, counts):
                bad[utterance.id] = f"{utterance.where}: {utterance.audio or utterance.video} {reason}"
    except UserError as error:  # such as a full disk; the other ranks wait for this one's answer
        return Checked({}, {}, {}, str(error))
    # of this manifest only: another one may use the same ids
    return Checked(bad, {u.id: store.measured[u.id] for u in mine if u.id in store.measured}, frames)


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
