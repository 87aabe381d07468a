"""What a training manifest shares with those that judge the training, and clips that a manifest holds twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avsr.config import DataConfig
from avsr.data.foreign import resolve
from avsr.data.index import open_manifest
from avsr.data.marks import CLIPS
from avsr.data.utterances import Utterances, twice
from avsr.errors import UserError, visible


def overlaps(train: Utterances, others: Mapping[str, Utterances]) -> list[str]:
    """A line for each kind of overlap that exists.

    Clips are the same if their files are, or their ``sha256``, and the parts of them that ``offset`` names; texts if
    they differ in case and white space alone. Texts may well occur twice in honest corpora; a model can still have
    learned them by heart.

    Args:
        train: of the training manifest.
        others: of other manifests by name.
    """
    lines = []
    for name, rows in {"data.train": train, **others}.items():
        count, first, second = rows.twice or twice(rows)
        if count:
            pair = f"{visible(first)} and {visible(second)}"
            lines.append(f"{name}: {count} of {len(rows)} clips are there under two ids, as {pair}")
    for name, rows in others.items():
        for kind, columns in (("clips", CLIPS), ("texts", ("text_mark",))):
            places = np.flatnonzero(np.any([_shared(rows, train, column, columns) for column in columns], axis=0))
            if len(places):
                where = rows.where(int(places[0]))
                lines.append(f"{name}: {len(places)} of {len(rows)} {kind} are also in data.train, first at {where}")
    return lines


def judges(data: DataConfig) -> dict[str, Utterances]:
    """The utterances of the test manifests by key; a manifest that cannot be read yet is left out, since training does
    not need it."""
    found = {}
    for name, manifest in data.test.items():
        try:
            path, absolute = resolve(manifest, data, alone=True)
            rows = open_manifest(path, absolute=absolute).utterances
        except UserError:
            continue
        found[f"data.test.{name}"] = rows[: data.limit or None]
    return found


def _shared(rows: Utterances, train: Utterances, column: str, columns: Sequence[str]) -> np.ndarray[Any, Any]:
    """(N,) whether the mark of each row in ``column`` is in one of the ``columns`` of ``train``, which is larger."""
    marks = rows.numbers(column)
    wanted = np.unique(marks[marks != 0])
    if not len(wanted):
        return np.zeros(len(rows), dtype=bool)
    there = []
    for other in columns:
        theirs = train.numbers(other)
        places = np.searchsorted(wanted, theirs).clip(max=len(wanted) - 1)
        there.append(theirs[wanted[places] == theirs])
    return np.isin(marks, np.concatenate(there))
