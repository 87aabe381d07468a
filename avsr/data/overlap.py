"""What a training manifest shares with those that judge the training, and clips that a manifest holds twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from avsr.config import DataConfig
from avsr.data.foreign import resolve
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError, visible


def overlaps(train: Sequence[Utterance], others: Mapping[str, Sequence[Utterance]]) -> list[str]:
    """A line for each kind of overlap that exists.

    Clips are the same if their files are, or their ``sha256``, and the parts of them that ``offset`` names; texts if
    they differ in case and white space alone. Texts may well occur twice in honest corpora; a model can still have
    learned them by heart.

    Args:
        train: of the training manifest.
        others: utterances of other manifests by name.
    """
    lines = []
    for name, rows in {"data.train": train, **others}.items():
        if twice := _twice(rows):
            first = " and ".join(visible(u.id) for u in twice[0])
            lines.append(f"{name}: {len(twice)} of {len(rows)} clips are there under two ids, as {first}")
    clips = {mark for utterance in train for mark in _marks(utterance)}
    texts = {_plain(utterance.text) for utterance in train}
    for name, rows in others.items():
        for what, shared in (
            ("clips", [u for u in rows if not clips.isdisjoint(_marks(u))]),
            ("texts", [u for u in rows if _plain(u.text) in texts]),
        ):
            if shared:
                place = shared[0].where or visible(shared[0].id)
                lines.append(f"{name}: {len(shared)} of {len(rows)} {what} are also in data.train, first at {place}")
    return lines


def judges(data: DataConfig) -> dict[str, list[Utterance]]:
    """The utterances of the test manifests by key; a manifest that cannot be read yet is left out, since training does
    not need it."""
    found = {}
    for name, manifest in data.test.items():
        try:
            path, absolute = resolve(manifest, data, alone=True)
            rows = read_manifest(path, on_bad=lambda line: None, absolute=absolute)
        except UserError:
            continue
        found[f"data.test.{name}"] = rows[: data.limit or None]
    return found


def _twice(rows: Sequence[Utterance]) -> list[tuple[Utterance, Utterance]]:
    seen: dict[str, Utterance] = {}
    pairs = []
    for utterance in rows:
        marks = list(_marks(utterance))
        if other := next((seen[mark] for mark in marks if mark in seen), None):
            pairs.append((other, utterance))
        seen.update(dict.fromkeys(marks, utterance))
    return pairs


def _marks(utterance: Utterance) -> Iterator[str]:
    part = "" if utterance.cut is None else f" {utterance.cut}"
    if utterance.sha256:
        yield f"sha256 {utterance.sha256.lower()}{part}"
    for path in (utterance.audio, utterance.video):
        if path is not None:
            yield f"{path}{part}"


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
