"""A manifest made ready: checked up front, with features and token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch.utils.data import Dataset

from avsr.config import DataConfig
from avsr.data.batches import Example
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError

logger = logging.getLogger("avsr")
_SHOWN = 5  # bad lines named in one message


class SpeechDataset(Dataset[Example]):
    """Examples of a manifest's usable utterances. ``sizes`` are encoder frames, ``skipped`` counts refusals."""

    def __init__(self, utterances: Sequence[Utterance], store: FeatureStore, tokenize: Callable[[str], list[int]]):
        self.utterances = list(utterances)
        self.sizes = tuple(store.frames(utterance) for utterance in self.utterances)
        self.skipped = 0
        self._store = store
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Example:
        utterance = self.utterances[index]
        return Example(utterance, {"audio": self._store.load(utterance)}, self._tokenize(utterance.text))


def load_dataset(
    manifest: str,
    config: DataConfig,
    store: FeatureStore,
    tokenize: Callable[[str], list[int]],
    *,
    title: str,
    refuse: Callable[[int, int], str] = lambda frames, tokens: "",
) -> SpeechDataset:
    """Reads, checks and (with a cache) encodes a manifest; ranks share the work.

    Args:
        manifest: path of a manifest.
        config: limits, and what to do about bad utterances.
        store: features.
        tokenize: text to token ids.
        title: of the progress bar.
        refuse: given numbers of encoder frames and text tokens, says why such an utterance cannot be used, or "".

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
    found = store.prepare(mine, title=title, shown=rank == 0)
    for utterance in mine:
        reason = "" if utterance.id in found else refuse(store.frames(utterance), tokens[utterance.id])
        if reason:
            found[utterance.id] = f"{utterance.where}: {utterance.audio} {reason}"
    for part in _gather(found, world):
        bad.update(part)
    if bad:
        _report(bad, manifest, len(utterances) + len(lines), skip=config.on_bad == "skip")
    dataset = SpeechDataset([u for u in utterances if u.id not in bad], store, tokenize)
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


def _gather(found: dict[str, str], world: int) -> list[dict[str, str]]:
    if world == 1:
        return [found]
    parts: list[dict[str, str]] = [{} for _ in range(world)]
    dist.all_gather_object(parts, found)
    return parts
