"""A manifest made ready: checked up front, with features and token ids."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.utils.data import Dataset

from avsr.config import TASKS, DataConfig
from avsr.data.batches import Example
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.transforms import PLAIN, View
from avsr.errors import UserError

logger = logging.getLogger("avsr")
Found = tuple[dict[str, str], dict[str, tuple[int, int]], str]  # refusals and sizes by id, what ended the reading
_SHOWN = 5  # bad lines named in one message


@dataclass(frozen=True)
class Reading:
    """How the utterances of a manifest are read: as ``view`` for ``task``, or, in training, as version ``draw`` with a
    task drawn from the weights ``tasks``."""

    task: str
    view: View = PLAIN
    tasks: Mapping[str, float] = field(default_factory=dict)
    views: int = 0  # number of training versions; 0 = no limit
    augmented: bool = False
    seed: int = 0

    def all_views(self) -> list[View]:
        """What a cache has to hold, at least one."""
        return [View(draw=n) for n in range(self.views or 1)] if self.augmented else [self.view]

    def pick(self, utterance: Utterance, draw: int | None) -> tuple[View, str]:
        if draw is None:
            return self.view, self.task
        view = self.view
        if self.augmented:
            view = View(draw=draw % self.views if self.views else draw)
        if not self.tasks:
            return view, self.task
        rng = random.Random(f"{self.seed} {utterance.id} {draw} task")
        return view, rng.choices(list(self.tasks), list(self.tasks.values()))[0]


class SpeechDataset(Dataset[Example]):
    """Examples of a manifest's usable utterances, by index or by (index, draw).

    ``sizes`` are encoder frames over all streams, ``skipped`` counts refusals.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        store: FeatureStore,
        tokenize: Callable[[str], list[int]],
        reading: Reading,
    ) -> None:
        self.utterances = list(utterances)
        view = reading.all_views()[0]  # a view changes no length
        self.sizes = tuple(sum(store.frames(utterance, view).values()) for utterance in self.utterances)
        self.skipped = 0
        self.reading = reading
        self._store = store
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, key: int | tuple[int, int]) -> Example:
        index, draw = key if isinstance(key, tuple) else (key, None)
        utterance = self.utterances[index]
        view, task = self.reading.pick(utterance, draw)
        features = self._store.load(utterance, view, TASKS[task])
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
) -> SpeechDataset:
    """Reads, checks and (with a cache) encodes a manifest; ranks share the work.

    Args:
        manifest: path of a manifest.
        config: limits, and what to do about bad utterances.
        store: features.
        tokenize: text to token ids.
        title: of the progress bar.
        reading: as what the utterances are read.
        refuse: given encoder frames by stream and the number of text tokens, says why such an utterance cannot be
            used, or "".

    Raises:
        UserError: an utterance cannot be used and ``data.on_bad`` is "refuse"; or none can.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lines: list[str] = []
    utterances = read_manifest(manifest, on_bad=lines.append)
    bad = {f"bad line {number}": line for number, line in enumerate(lines)}
    if config.limit:
        utterances = utterances[: config.limit]
    tokens = {utterance.id: len(tokenize(utterance.text)) for utterance in utterances}
    for utterance in utterances:
        if tokens[utterance.id] > config.max_text_tokens:
            bad[utterance.id] = (
                f"{utterance.where}: the transcript has {tokens[utterance.id]} tokens, allowed are "
                f"data.max_text_tokens = {config.max_text_tokens}"
            )
    mine = [u for u in utterances if u.id not in bad][rank::world]
    views = reading.all_views()
    failure = ""
    try:
        found = store.prepare(mine, title=title, views=views, shown=rank == 0)
    except UserError as error:  # a full disk; the other ranks wait for this one's answer
        found, mine, failure = {}, [], str(error)
    for utterance in mine:
        reason = "" if utterance.id in found else refuse(store.frames(utterance, views[0]), tokens[utterance.id])
        if reason:
            found[utterance.id] = f"{utterance.where}: {utterance.audio or utterance.video} {reason}"
    # only of this manifest: another one may use the same ids
    own = {u.id: store.sizes[u.id] for u in mine if u.id in store.sizes}
    parts = _gather((found, own, failure), world)
    for _, _, reason in parts:
        if reason:
            raise UserError(reason)
    for refused, sizes, _ in parts:
        bad.update(refused)
        store.sizes.update(sizes)
    if bad:
        _report(bad, manifest, len(utterances) + len(lines), skip=config.on_bad == "skip")
    dataset = SpeechDataset([u for u in utterances if u.id not in bad], store, tokenize, reading)
    dataset.skipped = len(bad)
    if not len(dataset):
        raise UserError(f"{manifest}: no utterance can be used")
    return dataset


def _report(bad: dict[str, str], manifest: str, total: int, *, skip: bool) -> None:
    listed = "\n  ".join(list(bad.values())[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    if not skip:
        raise UserError(
            f"{manifest}: {len(bad)} of {total} utterances cannot be used (data.on_bad=skip leaves them out):\n  "
            f"{listed}{more}"
        )
    logger.warning("%s: skipped %d utterances:\n  %s%s", manifest, len(bad), listed, more)


def _gather(own: Found, world: int) -> list[Found]:
    if world == 1:
        return [own]
    parts: list[Found] = [own] * world
    dist.all_gather_object(parts, own)
    return parts
