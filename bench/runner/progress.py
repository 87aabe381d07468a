"""What a run in parts has done: a folder with its logs, rows and ``run.json``, in which a later call goes on."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from bench.runner import ledger, rehearsal
from bench.runner.processes import Ended

KEPT = ledger.ROOT / "runs" / "bench"
STATE = "run.json"


def identity() -> dict[str, str]:
    """What runs must have in common for one to go on where the other stopped."""
    found = ledger.origin(torch.device("cuda" if torch.cuda.is_available() and not rehearsal.ON else "cpu"))
    digest = hashlib.sha256()  # a copy of the tree may be without its history
    for path in sorted(
        path for top in ("bench", "kernels", "avsr", "tests/flashsink") for path in (ledger.ROOT / top).rglob("*.py")
    ):
        digest.update(path.read_bytes())
    return {key: value for key, value in found.items() if key != "date"} | {
        "sources": digest.hexdigest()[:16],
        "rehearsal": str(rehearsal.ON),
    }


class Progress:
    """The processes of a run that have ended by themselves.

    Attributes:
        folder: where logs and results are written.
        ended: exit codes by name.
    """

    def __init__(self, folder: Path, own: dict[str, str], ended: dict[str, int]) -> None:
        self.folder, self.ended, self._own = folder, ended, own
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, ended: dict[str, Ended]) -> None:
        """Those that were stopped are to run again."""
        self.ended |= {name: one.code for name, one in ended.items() if one.code is not None}
        part = self.folder / f"{STATE}.part"
        part.write_text(json.dumps({"identity": self._own, "ended": self.ended}, indent=1), encoding="utf-8")
        part.replace(self.folder / STATE)
        if self.folder.parent != KEPT and not rehearsal.ON:  # a later call may get another $OUT
            shutil.copytree(self.folder, KEPT / self.folder.name, dirs_exist_ok=True)

    def results(self, names: list[str]) -> dict[str, Ended]:
        """The outcome and log of those of ``names`` that have ended, in this call or an earlier one."""
        return {
            name: Ended(self.ended[name], "", (self.folder / f"{name}.log").read_text("utf-8", "replace"))
            for name in names
            if name in self.ended
        }


def resume(fresh: bool) -> Progress:
    """The newest run of this identity in ``$OUT`` or ``runs/bench``, or a new one."""
    place, own = Path(os.environ.get("OUT") or KEPT), identity()
    earlier = [] if fresh else [*KEPT.glob(f"*/{STATE}"), *place.glob(f"*/{STATE}")]
    for path in sorted(earlier, key=lambda path: path.parent.name, reverse=True):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["identity"] == own:
                folder = place / path.parent.name
                if folder != path.parent:
                    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
                return Progress(folder, own, dict(state["ended"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return Progress(place / datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), own, {})
