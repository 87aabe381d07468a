"""What a run has done so far, for the next one to continue: ``OUT/prepare.json`` and ``OUT/progress.jsonl``.

A shard reads these, and adds to its own file instead.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from avsr.data.mouth.cut import FORMAT
from avsr.runtime.folders import write_durably
from avsr.runtime.rows import Row, Rows, read_rows
from avsr.runtime.share import Share, gather, take_over
from avsr.tools.corpora.prepare.clips import CLIPS, Made
from avsr.tools.corpora.source import Refusal, is_safe_id
from avsr.tools.corpora.state import contents, read_state, refuse_differences, refuse_foreign

STATE, PROGRESS = "prepare.json", "progress.jsonl"


@dataclass(frozen=True)
class Entry:
    """What became of one video file.

    ``asked`` says which clips were wanted of which file, ``tried`` with what options and landmarks. While both are the
    same, another try gives the same refusals.
    """

    asked: str
    tried: str
    made: tuple[Made, ...]
    refused: tuple[Refusal, ...]


class Journal:
    """The entries by the videos' ids, kept in ``progress.jsonl``, one line per video, or in the file of a shard.

    Args:
        out: the folder of the corpus.
        described: what must not change from one run to the next.
        share: of the videos, if this is the journal of a shard.

    Attributes:
        shared: without a share: the rows of the shards' files, which are among the entries.

    Raises:
        UserError: the folder holds something else, another corpus, or cannot be written, or the shards' files do not
            fit together.
    """

    def __init__(self, out: Path, described: dict[str, Any], share: Share | None = None) -> None:
        self._entries: dict[str, Entry] = {}
        self.shared: dict[Share, list[Row]] = {}
        made_by = _open_folder(out, described)
        if share is None:
            self._rows = Rows(out / PROGRESS, _key)
            self.shared = gather(out, _key, made_by)
        else:
            for row in read_rows(out / PROGRESS, _key):
                self._remember(row)
            self._rows = Rows(out / share.file, _key, made_by)
        for row in (*self._rows.held.values(), *(row for part in self.shared.values() for row in part)):
            self._remember(row)

    def take_over(self) -> None:
        """Moves what the shards have done to ``progress.jsonl``."""
        take_over(self._rows, self.shared)

    def _remember(self, row: Row) -> None:
        try:
            made = tuple(Made(**clip) for clip in row["made"])
            refused = tuple(Refusal(**refusal) for refusal in row["refused"])
            entry = Entry(row["asked"], row["tried"], made, refused)
            if all(_is_like(item, cls) for items, cls in ((made, Made), (refused, Refusal)) for item in items):
                self._entries[row["source"]] = entry
        except (KeyError, TypeError):
            return  # its clips are made again

    def entry(self, source: str) -> Entry:
        """The entry of a video file; an empty one if there is none."""
        return self._entries.get(source, Entry("", "", (), ()))

    def add(self, source: str, entry: Entry) -> None:
        """Records what became of a video file."""
        self._entries[source] = entry
        self._rows.add({"source": source, **asdict(entry)})


def _key(row: Row) -> str:
    return str(row["source"])


def _is_like(item: Any, cls: type) -> bool:
    """Whether the fields read from a file are of their types, and an id can be a path."""
    kinds = {"str": str, "int": int}
    typed = all(type(getattr(item, field.name)) is kinds[str(field.type)] for field in fields(cls))
    return typed and (cls is not Made or is_safe_id(item.id))


def _open_folder(out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Returns what the entries depend on."""
    wanted = {"format": FORMAT, **described}
    names = contents(out)
    held = read_state(out / STATE, "prepare", lambda found: {name: found[name] for name in wanted})
    if held is not None:
        refuse_differences(out, held, wanted)
    else:
        refuse_foreign(out, names)
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / STATE, (json.dumps(wanted, indent=2) + "\n").encode())
    (out / CLIPS).mkdir(exist_ok=True)
    return wanted
