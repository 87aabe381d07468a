"""What a run has done so far, for the next one to continue: ``OUT/prepare.json`` and ``OUT/progress.jsonl``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from avsr.data.mouth.cut import FORMAT
from avsr.runtime.folders import write_durably
from avsr.runtime.rows import Row, Rows
from avsr.tools.corpora.prepare.clips import CLIPS, Made
from avsr.tools.corpora.source import Refusal, is_safe_id
from avsr.tools.corpora.state import read_state, refuse_differences, refuse_foreign

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
    """The entries by the videos' ids, kept in ``progress.jsonl``, one line per video.

    Args:
        out: the folder of the corpus.
        described: what must not change from one run to the next.

    Raises:
        UserError: the folder holds something else, another corpus, or cannot be written.
    """

    def __init__(self, out: Path, described: dict[str, Any]) -> None:
        self._entries: dict[str, Entry] = {}
        _open_folder(out, described)
        self._rows = Rows(out / PROGRESS, lambda row: str(row["source"]))
        for row in self._rows.held.values():
            self._remember(row)

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


def _is_like(item: Any, cls: type) -> bool:
    """Whether the fields read from a file are of their types, and an id can be a path."""
    kinds = {"str": str, "int": int}
    typed = all(type(getattr(item, field.name)) is kinds[str(field.type)] for field in fields(cls))
    return typed and (cls is not Made or is_safe_id(item.id))


def _open_folder(out: Path, described: dict[str, Any]) -> None:
    wanted = {"format": FORMAT, **described}
    held = read_state(out / STATE, "prepare", lambda found: {name: found[name] for name in wanted})
    if held is not None:
        refuse_differences(out, held, wanted)
        return
    refuse_foreign(out)
    (out / CLIPS).mkdir(parents=True, exist_ok=True)
    write_durably(out / STATE, (json.dumps(wanted, indent=2) + "\n").encode())
