"""Options as ``key=value`` strings, read into a flat dataclass whose defaults give the types."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from avsr.errors import UserError


def read_options(options: Any, overrides: Sequence[str], names: Sequence[str], command: str) -> None:
    """Sets fields of the dataclass ``options`` (bool, int, float or str); a leading ``~`` of a text is the user's home.

    Args:
        options: holds the defaults.
        overrides: such as ``seed=3``.
        names: the fields that may be set.
        command: of which these are the options, for messages.

    Raises:
        UserError: unknown key, with the nearest valid one, or a value of another type.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"expected key=value, got {override!r}; the keys are {', '.join(names)}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            listed = ", ".join(names)
            raise UserError(f"unknown option {key!r}: did you mean {near!r}? The options of {command} are {listed}")
        setattr(options, key, _read(key, value, type(getattr(options, key))))


def check_ranges(options: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises a ``UserError`` that names the option, its range and its value if one is out of range."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(f"option {name}: expected {low} to {high}, got {value}")


def _read(key: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"option {key}: expected true or false, got {value!r}")
        return value.lower() == "true"
    if kind is str:
        return os.path.expanduser(value)
    try:
        return kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"option {key}: expected {wanted}, got {value!r}") from None
