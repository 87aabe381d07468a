"""The file in a made corpus that says what it is, so that no other one is made in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from avsr.errors import UserError
from avsr.runtime.locks import LOCK

_ADVICE = "choose another folder or delete this one"

State = TypeVar("State")


def read_state(path: Path, command: str, parse: Callable[[Any], State]) -> State | None:
    """What ``parse`` makes of the JSON file ``path``; None where there is none.

    Raises:
        UserError: its folder is a file, or ``command`` did not write the file.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: choose another one")
    if not path.is_file():
        return None
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path} is not of a corpus made by {command}: {_ADVICE}") from None


def refuse_differences(out: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ``UserError`` if the corpus in ``out`` differs from the wanted one, which names everything that does."""
    different = [
        f"{name} is {held.get(name)!r} there, not {value!r}"
        for name, value in wanted.items()
        if held.get(name) != value
    ]
    if different:
        raise UserError(f"{out} holds another corpus ({'; '.join(different)}): {_ADVICE}")


def contents(out: Path) -> list[str]:
    """The names in ``out``, without locks and what is being written: of another shard, which begins with the file for
    :func:`read_state`. So list them before reading that, and refuse them if there is none."""
    names = sorted(os.listdir(out)) if out.is_dir() else []
    return [name for name in names if not (name.endswith(".part") or name.startswith(".") and name.endswith(LOCK))]


def refuse_foreign(out: Path, names: list[str]) -> None:
    """Raises a ``UserError`` if ``names``, the :func:`contents` of ``out``, are any."""
    if names:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"{out} holds something else ({listed}): {_ADVICE}")
