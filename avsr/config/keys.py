"""Keys of a configuration: each dataclass field holds its default, its allowed values and its help in one place.

``key`` and ``group`` declare them, ``check`` enforces them, :mod:`avsr.config.reference` prints them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from avsr.errors import UserError

MISSING: Any = "???"  # as in OmegaConf: must be given


@dataclass(frozen=True)
class Rule:
    """The values that a key may have. NaN satisfies no bound."""

    help: str = ""
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    path: bool = False  # of a file or folder: a leading ~ is the user's home

    def allows(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def expected(self, name: str = "x") -> str:
        """The allowed values in words, or "" when every value of the type is allowed."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        if self.above == -math.inf and self.below == math.inf:
            return "a finite number"
        low, high = self.at_least, self.at_most
        left = f"{self.above:g} < " if self.above is not None else f"{low:g} <= " if low is not None else ""
        right = f" < {self.below:g}" if self.below is not None else f" <= {high:g}" if high is not None else ""
        if left and right:
            return f"{left}{name}{right}"
        if left:
            return f"at least {low}" if self.above is None else f"more than {self.above:g}"
        return f"at most {high}" if high is not None else f"less than {self.below:g}" if right else ""


def key(default: Any, help: str = "", **bounds: Any) -> Any:
    """A dataclass field for one key.

    Args:
        default: its default; a list or dict is copied for every instance. ``MISSING`` when it must be given.
        help: what it does, as a phrase without a period; "" where the docstring of the class says it.
        bounds: the other fields of :class:`Rule`.
    """
    metadata = {"rule": Rule(help, **bounds)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(make: Callable[[], Any], choices: Mapping[str, tuple[Any, ...]] | None = None) -> Any:
    """A dataclass field for a group of keys, which the docstring of its class explains.

    Args:
        make: the group's class, or a function that returns it with other defaults.
        choices: by the dotted name of a key within the group: the choices it has here, instead of those of its class.
    """
    return field(default_factory=make, metadata={"choices": dict(choices or {})})


@dataclass(frozen=True)
class Key:
    """One key of a schema with its dotted ``name`` and its value."""

    name: str
    type: str
    value: Any
    rule: Rule

    @property
    def section(self) -> str:
        return self.name.partition(".")[0] if "." in self.name else ""

    @property
    def default(self) -> str:
        if self.value == MISSING:
            return "required"
        if isinstance(self.value, bool) or self.value is None:
            return {True: "true", False: "false", None: "null"}[self.value]
        if isinstance(self.value, list):
            return f"[{', '.join(map(str, self.value))}]"
        return f"{self.value:g}" if isinstance(self.value, float) else str(self.value) or "''"

    @property
    def help(self) -> str:
        """What the key does, and its choices or bounds."""
        expected = self.rule.expected()
        return f"{self.rule.help} ({expected})" if expected else self.rule.help


def keys(config: Any, prefix: str = "", choices: Mapping[str, tuple[Any, ...]] | None = None) -> Iterator[Key]:
    """Every key of nested dataclasses with its current value; fields without metadata allow everything.

    Args:
        config: an instance.
        prefix: of the dotted names.
        choices: as in :func:`group`.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        own = {**item.metadata.get("choices", {}), **_below(item.name, choices or {})}
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{name}.", own)
        else:
            rule = item.metadata.get("rule", Rule())
            if choices and item.name in choices:
                rule = dataclasses.replace(rule, choices=choices[item.name])
            yield Key(name, str(item.type), value, rule)


def check(config: Any) -> None:
    """Checks every key of nested dataclasses by itself.

    Raises:
        UserError: a value is not allowed; names the key, what is allowed and the value.
    """
    for item in keys(config):
        if not item.rule.allows(item.value):
            shown = repr(item.value) if item.rule.choices else item.value
            raise UserError(f"{item.name}: expected {item.rule.expected(item.name.split('.')[-1])}, got {shown}")


def expand_paths(config: Any) -> None:
    """Replaces a leading ``~`` or ``~user`` in all paths of nested dataclasses."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            expand_paths(value)
        elif item.metadata.get("rule", Rule()).path:
            setattr(config, item.name, _expanded(value))


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(inner) for name, inner in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def _below(name: str, choices: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {inner.removeprefix(f"{name}."): given for inner, given in choices.items() if inner.startswith(f"{name}.")}
