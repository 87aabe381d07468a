"""Prints the keys of a schema: ``--help-keys`` of the commands, and ``configs/README.md``.

``python -m avsr.config.reference > configs/README.md`` updates that file.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from avsr.config.composing import configs_folder
from avsr.config.keys import Key, keys
from avsr.config.schema import Config

_COLUMNS = 150  # of ``help_text``
_WIDEST = (40, 16, 24)  # columns of a name, a type and a default; a longer one moves the help to the next line

_HEAD = """\
# Configs

<!-- Written by: python -m avsr.config.reference > configs/README.md -->

A config is a small YAML file with a `defaults` list of other files, named by their path below `configs/` without
`.yaml`. Later defaults win over earlier ones, then come the keys of the file itself, then the command line:

    avsr train asr_16 training.steps=100 run=runs/short
    avsr train asr_16+data/lrs2+llm/llama_3_2_1b run=runs/lrs2

- A config on the command line is a YAML file, or the name of one below `configs/` or `configs/recipe/`. "+" joins
  several, of which later ones win.
- `key=value` overrides one key. Values are YAML (`null`, `true`, `[1, 2]`, `.inf`), but text is taken as it is: after
  `run=` follows the name of the folder without quotes, whatever is in it. A value may refer to another key:
  `log.wandb='${run}'`. In files, too, unquoted text stays text (`run: 007`), and `~` is expanded in every path.
- A table with free names (`data.test`, `training.tasks`) replaces an earlier one, in an override too;
  `data.test.NAME=PATH` changes one name of it.
- Unknown keys and bad values are refused; the message names the nearest key or the allowed values.
- The run folder keeps the resolved config as `config.yaml`, which is a config as well.
- `avsr train --help-keys` prints the keys in a terminal.

To add a recipe, write `recipe/NAME.yaml` with a `defaults` list, `run`, and the few keys in which it differs. Its first
comment line says what it trains (it becomes a line of the table below), the next ones give the launch command and the
hardware.

## Recipes

"""


def sections(schema: type[Any]) -> dict[str, tuple[str, list[Key]]]:
    """Help and keys of every section: the groups of the schema, and "" for its keys outside of any group."""
    config = schema()
    found: dict[str, tuple[str, list[Key]]] = {}
    helps = _attributes(schema)
    for item in keys(config):
        about = _docstring(type(getattr(config, item.section))) if item.section else ""
        if not item.rule.help and item.name in helps:
            item = dataclasses.replace(item, rule=dataclasses.replace(item.rule, help=helps[item.name]))
        found.setdefault(item.section, (about, []))[1].append(item)
    return found


def help_text(schema: type[Any]) -> str:
    """All keys of a schema by section in aligned plain text: name, type, default, help."""
    found = sections(schema)
    rows = {item.name: (item.name, item.type, item.default) for _, items in found.values() for item in items}
    columns = zip(zip(*rows.values(), strict=True), _WIDEST, strict=True)
    widths = [min(max(map(len, column)), widest) for column, widest in columns]
    indent = " " * (sum(widths) + 2 * len(widths))
    lines: list[str] = []
    for name, (about, items) in found.items():
        lines += ["", *textwrap.wrap(f"{name or 'general'}{': ' if about else ''}{about.replace('``', '')}", _COLUMNS)]
        for item in items:
            cells = "".join(f"{cell:<{width}}  " for cell, width in zip(rows[item.name], widths, strict=True))
            help = textwrap.wrap(item.help, _COLUMNS - len(indent), break_on_hyphens=False)
            first = cells if len(cells) > len(indent) or not help else cells + help.pop(0)
            lines += [line.rstrip() for line in (first, *(indent + part for part in help))]
    return "\n".join(lines[1:])


def markdown() -> str:
    """The text of ``configs/README.md``."""
    lines = [_HEAD + "| recipe | what it trains |", "|---|---|"]
    for path in sorted((configs_folder() / "recipe").glob("*.yaml")):
        lines.append(f"| `{path.stem}` | {_first_comment(path)} |")
    lines += ["", "## Keys"]
    for name, (about, items) in sections(Config).items():
        lines += ["", f"### {name or 'General'}", *([about.replace("``", "`")] if about else []), ""]
        lines += ["| key | type | default | help |", "|---|---|---|---|"]
        for item in items:
            cells = f"`{item.name}`", f"`{item.type}`", f"`{item.default}`", item.help
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def _docstring(kind: type[Any]) -> str:
    """The first paragraph of a class's docstring on one line; "" for the one that ``dataclass`` generates."""
    text = inspect.getdoc(kind) or ""
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.partition("\n\n")[0].split())


def _attributes(kind: type[Any]) -> dict[str, str]:
    """Help of the fields of a schema without metadata: the ``Attributes:`` of its docstring."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    return {name: " ".join(help.split()).removesuffix(".") for name, help in found}


if __name__ == "__main__":
    print(markdown())
