"""YAML as a config may have it: of bounded size, and text wherever the schema says so.

YAML would read a folder called 007 as a number, a prompt "no" as false, and end the path "/data/my #1 run" at the "#".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from avsr.errors import PASSWORD, UserError

DEEPEST = 32  # levels; ours have 5
_MOST_LETTERS = 2**20
_MOST_VALUES = 10_000  # aliases of aliases count with all that they stand for
_TAG = "tag:yaml.org,2002:"
_TEXT = {"str": False, "str | None": True}  # types of keys that hold text, and whether null is allowed
_TEXTS = ("list[str]", "dict[str, str]")


def parse(text: str, where: str, types: Mapping[str, str]) -> str:
    """YAML of the same content, in which the values of all keys that hold text are quoted.

    Args:
        text: YAML, with keys and values at the top.
        where: for messages.
        types: the type of every key by its dotted name.

    Raises:
        UserError: values nested too deeply, too many of them, or one of OmegaConf's resolvers.
        YAMLError: it is not YAML.
    """
    _check(text, where)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    _quote_texts(node, "", types)
    return _written(node)


def parse_override(key: str, value: str, types: Mapping[str, str]) -> str:
    """YAML of ``key=value``. The value is literal where the key holds text, otherwise it is YAML; "null" is null where
    the key may be null, and so is an empty value.

    Raises:
        UserError, YAMLError: as :func:`parse`.
    """
    where = repr(f"{key}={value}")
    table = key.rpartition(".")[0]
    kind = types.get(key) or ("str" if types.get(table) == "dict[str, str]" else "")
    if kind in _TEXT and value:
        node: Any = ScalarNode(f"{_TAG}null" if value == "null" else f"{_TAG}str", value)
        check_leaves(value, "override", key)
        _refuse_resolver(value, where)
    else:
        _check(value, where)
        node = yaml.compose(value, Loader=yaml.SafeLoader) or ScalarNode(f"{_TAG}null", "")
    for part in reversed(key.split(".")):
        node = MappingNode(f"{_TAG}map", [(_quoted(part), node)])
    _quote_texts(node, "", types)
    return _written(node)


def nested(key: str, value: Any) -> dict[str, Any]:
    """``value`` under its dotted ``key``, as nested dicts."""
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def check_leaves(value: Any, where: str, key: str = "") -> None:
    """Refuses numbers beyond 64 bits, and strings that the run's files cannot or must not contain."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            check_leaves(name, where, key)
            check_leaves(inner, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            check_leaves(inner, where, key)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: {key}: a number of {value.bit_length()} bits")
    elif isinstance(value, str):
        if not all(c.isprintable() or ord(c) > 0x9F or c in "\n\t" for c in value) or _has_surrogate(value):
            raise UserError(f"{where}: {key}: {value!r} has characters that are not text")
        if PASSWORD.search(value):
            raise UserError(f"{where}: {key}: {value} has a password, which would be saved in the run's folder")


def _has_surrogate(text: str) -> bool:
    return text != text.encode("utf-8", "replace").decode()


def _check(text: str, where: str) -> None:
    """Refuses what no config needs: values nested so deeply that reading them fails, aliases that multiply, and
    OmegaConf's resolvers, one of which would write environment variables, such as a hub token, into a run's config."""
    if len(text) > _MOST_LETTERS:
        raise UserError(f"{where[:200]}: {len(text)} letters, more than a config has")
    anchors: dict[str, tuple[int, int]] = {}  # number of values and depth of what aliases stand for
    open_: list[tuple[str, int, int]] = [("", 0, 0)]

    def close(anchor: str | None, values: int, depth: int) -> None:
        if anchor:
            anchors[anchor] = values, depth
        above, number, deepest = open_[-1]
        open_[-1] = above, number + values, max(deepest, depth + 1)
        if len(open_) + depth > DEEPEST + 1:
            raise UserError(f"{where[:200]}: values nested more than {DEEPEST} deep")
        if open_[-1][1] > _MOST_VALUES:
            raise UserError(f"{where[:200]}: more than {_MOST_VALUES} values, more than a config has")

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        match event:
            case yaml.CollectionStartEvent():
                open_.append((event.anchor or "", 1, 0))
                if len(open_) > DEEPEST + 1:
                    raise UserError(f"{where[:200]}: values nested more than {DEEPEST} deep")
            case yaml.CollectionEndEvent():
                close(*open_.pop())
            case yaml.ScalarEvent():
                _refuse_resolver(event.value, where)
                close(event.anchor, 1, 0)
            case yaml.AliasEvent():
                if event.anchor not in anchors:
                    raise UserError(f"{where[:200]}: *{event.anchor} refers to nothing, or to itself")
                close(None, *anchors[event.anchor])


def _refuse_resolver(value: str, where: str) -> None:
    if ":" in value.partition("${")[2]:
        raise UserError(f"{where}: {value!r} is refused: only values of other keys can be inserted, as ${{KEY}}")


def _quote_texts(node: Any, prefix: str, types: Mapping[str, str]) -> None:
    if isinstance(node, SequenceNode):  # of mappings to merge
        for inner in node.value:
            _quote_texts(inner, prefix, types)
    if not isinstance(node, MappingNode):
        return
    for place, (name, value) in enumerate(node.value):
        key = f"{prefix}.{name.value}" if prefix else str(name.value)
        kind = types.get(key, "")
        if name.tag == f"{_TAG}merge":
            _quote_texts(value, prefix, types)
        elif kind in _TEXT:
            node.value[place] = name, _text(value, nullable=_TEXT[kind])
        elif kind in _TEXTS and isinstance(value, SequenceNode):
            value.value[:] = [_text(inner) for inner in value.value]
        elif kind in _TEXTS and isinstance(value, MappingNode):
            value.value[:] = [(_text(inner), _text(given)) for inner, given in value.value]
        else:
            _quote_texts(value, key, types)


def _text(node: Any, *, nullable: bool = False) -> Any:
    if not isinstance(node, ScalarNode) or node.tag.removeprefix(_TAG) not in _PLAIN:
        return node
    null = node.tag == f"{_TAG}null" and (nullable or node.value in ("", "~"))
    return node if null else _quoted(node.value)


_PLAIN = ("str", "null", "bool", "int", "float", "timestamp", "value")  # what an unquoted text may be taken for


def _quoted(text: str) -> ScalarNode:
    return ScalarNode(f"{_TAG}str", text, style='"')


def _written(node: Any) -> str:
    return "" if node is None else str(yaml.serialize(node, Dumper=yaml.SafeDumper, width=2 * _MOST_LETTERS))
