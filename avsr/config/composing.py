"""YAML files that compose, ``key=value`` overrides, and unknown keys refused, for any dataclass as schema.

A file may name others in its ``defaults`` list (paths below ``configs/`` without the suffix); later ones win over
earlier ones, then the file itself, then the overrides. A table with free names, such as ``data.test``, replaces that of
an earlier file, and so does an override of it; one of a name in it (``data.test.NAME=...``) changes that alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from avsr.config.keys import expand_paths, keys
from avsr.config.reading import DEEPEST, check_leaves, nested, parse, parse_override
from avsr.errors import UserError

_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

_log = logging.getLogger("avsr")
Schema = TypeVar("Schema")


def configs_folder() -> Path:
    """``configs/`` inside the package when installed from a wheel, next to it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UserError(f"the configs folder is missing next to and inside {package}; reinstall the package")


def compose(name: str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Reads a file with its defaults, applies the overrides and returns them as a ``schema``.

    Args:
        name: a YAML file, or the name of one below ``configs/`` or ``configs/recipe/`` without its suffix; several
            joined by "+", of which later ones win.
        overrides: such as ``training.steps=50``. The value of a key that holds text is taken as it is, others are YAML.
        schema: a dataclass whose fields all have defaults; ``MISSING`` ones must be given.

    Raises:
        UserError: missing or broken file, unknown key (with the nearest valid one), a value of the wrong type.
    """
    parts = [_compose(path, (), schema) for path in _find_all(name)]
    with _as_user_error(name):
        merged: Any = _merge(parts, schema)
    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not key:
            raise UserError(f"expected key=value, got {text!r}")
        for old, new in _moved(schema).items():
            if f"{key}.".startswith(f"{old}."):
                key = new + key.removeprefix(old)
                _log.warning("%s: this key is now called %s", text, key)
        if re.split(r"[.\[]", key, maxsplit=DEEPEST)[DEEPEST:]:
            raise UserError(f"{text[:80]!r}...: the key has more than {DEEPEST} parts")
        _refuse_unknown(nested(key, value), text, schema())
        with _as_user_error(repr(text)):
            given = OmegaConf.load(io.StringIO(parse_override(key, value, _types(schema))))
            check_leaves(OmegaConf.to_container(given), "override")
            whole = key in _tables(schema)
            merged = _merge([merged, given], schema) if whole else OmegaConf.merge(merged, given)
    return _typed(merged, name, schema)


def leaves(config: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field of nested dataclasses."""
    return ((item.name, item.value) for item in keys(config))


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """``key: ours != theirs`` for every leaf in which two dataclasses differ."""
    lines = []
    for item in dataclasses.fields(ours):
        mine, other = getattr(ours, item.name), getattr(theirs, item.name)
        key = prefix + item.name
        if dataclasses.is_dataclass(mine):
            lines += differences(mine, other, key + ".")
        elif mine != other:
            lines.append(f"{key}: {mine!r} != {other!r}")
    return lines


def _find_all(names: str) -> list[Path]:
    return [Path(names)] if os.path.isfile(names) else [_find(name) for name in names.split("+")]


def _find(name: str) -> Path:
    root = configs_folder()
    candidates = [Path(name), root / f"{name}.yaml", root / "recipe" / f"{name}.yaml"]
    for path in candidates:
        if os.path.isfile(path):  # False for a name of 300 letters, where Path.is_file raises
            return path
    known = sorted(path.stem for path in (root / "recipe").glob("*.yaml"))
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; recipes: {', '.join(known)}"
    raise UserError(f"there is no config {name!r} (a YAML file or a recipe's name){hint}")


def _compose(path: Path, above: tuple[Path, ...], schema: type[Any]) -> DictConfig:
    if path in above:
        raise UserError(f"{path}: its defaults lead back to itself")
    with _as_user_error(f"{path}: not a readable YAML file"):
        own = OmegaConf.load(io.StringIO(parse(path.read_text(encoding="utf-8-sig"), str(path), _types(schema))))
        if not isinstance(own, DictConfig):
            raise UserError(f"{path}: expected keys and values at the top")
        defaults = own.pop("defaults", None) or []
        if not isinstance(defaults, ListConfig) and defaults or not all(isinstance(name, str) for name in defaults):
            raise UserError(f"{path}: defaults: expected a list of names below configs/, got {defaults!r}")
        tree: Any = OmegaConf.to_container(own)
        check_leaves(tree, str(path))
        if _migrate(tree, _moved(schema), path):
            own = OmegaConf.create(dict(tree))
    _refuse_unknown(tree, str(path), schema())
    parts: list[Any] = []
    for default in defaults:
        part = configs_folder() / f"{default}.yaml"
        if not os.path.isfile(part):
            raise UserError(f"{path}: there is no {part} (from its defaults list)")
        parts.append(_compose(part, (*above, path), schema))
    with _as_user_error(str(path)):
        return _merge([*parts, own], schema)


@contextmanager
def _as_user_error(where: str) -> Iterator[None]:
    """Turns what YAML and OmegaConf raise for unreadable values into a ``UserError``; PyYAML's constructors raise
    almost anything."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, *_UNREADABLE) as error:
        raise UserError(f"{where}: {_one_line(error)}") from error


def _tables(schema: type[Any]) -> list[str]:
    """The keys that hold a table with free names."""
    return [name for name, value in leaves(schema()) if isinstance(value, dict)]


def _merge(parts: Sequence[Any], schema: type[Any]) -> DictConfig:
    tables = _tables(schema)
    merged = OmegaConf.create()
    for part in parts:
        for name in tables:
            later = OmegaConf.select(part, name)
            if later is not None and OmegaConf.select(merged, name) is not None:
                OmegaConf.update(merged, name, later, merge=False)
        merged = OmegaConf.merge(merged, part)  # type: ignore[assignment]
    return merged


def _typed(merged: Any, name: str, schema: type[Schema]) -> Schema:
    for key, default in leaves(schema()):
        with _as_user_error(name):
            given = OmegaConf.select(merged, key) if isinstance(default, dict) else None
        if given is not None and not isinstance(given, DictConfig):
            raise UserError(f"{name}: {key}: expected names with values ({key}.NAME=VALUE), got {given!r}")
    with _as_user_error(name):
        full = OmegaConf.merge(OmegaConf.structured(schema), merged)
        missing = sorted(OmegaConf.missing_keys(full))
        if missing:
            raise UserError(f"{name}: no value for {', '.join(missing)}")
        config = OmegaConf.to_object(full)
    assert isinstance(config, schema)
    expand_paths(config)
    return config


def _moved(schema: type[Any]) -> dict[str, str]:
    return getattr(schema, "moved", {})


def _migrate(tree: Any, moved: Mapping[str, str], path: Path) -> bool:
    """Renames what earlier versions called otherwise; returns whether there was anything."""
    found = False
    for old, new in moved.items():
        *above, last = old.split(".")
        holder = tree
        for part in above:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            continue
        found, value = True, holder.pop(last)
        *above, last = new.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise UserError(f"{path}: {old} is now called {new}, which the file has as well")
        place[last] = value
        _log.warning("%s: %s is now called %s", path, old, new)
    return found


def _types(schema: type[Any]) -> dict[str, str]:
    return {item.name: item.type for item in keys(schema())}


def _refuse_unknown(tree: Any, where: str, schema: Any, prefix: str = "", every: Sequence[str] = ()) -> None:
    every = every or [name for name, _ in leaves(schema)]
    known = {item.name: getattr(schema, item.name) for item in dataclasses.fields(schema)}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if key not in known:
            inside = [f"{prefix}{key}.{name}" for name in value] if isinstance(value, Mapping) else []
            initials = [k for k in known if "".join(word[0] for word in k.split("_")) == str(key)]  # lr
            near = [prefix + k for k in initials]
            near = near or difflib.get_close_matches(inside[0] if len(inside) == 1 else f"{prefix}{key}", every, 1, 0.5)
            near = near or [prefix + k for k in difflib.get_close_matches(str(key), known, 1, 0.5)]
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {prefix + str(key)!r}{hint}")
        if dataclasses.is_dataclass(known[key]):
            if value is not None and not isinstance(value, Mapping):
                raise UserError(f"{where}: {prefix}{key} is a group of keys, got {value!r}")
            _refuse_unknown(value, where, known[key], f"{prefix}{key}.", every)


def _one_line(error: Exception) -> str:
    if isinstance(error, YAMLError):  # its position is in further lines
        return " ".join(str(error).split())
    key = getattr(error, "full_key", None) or ""
    return (f"{key}: " if key else "") + (str(error).strip().splitlines() or [type(error).__name__])[0]
