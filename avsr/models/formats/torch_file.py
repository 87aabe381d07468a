"""Files of ``torch.save``, read without running any code that they name."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avsr.errors import UserError


def load_torch_file(
    path: Path, stand_ins: Mapping[str, type] | None = None, explain: Callable[[str], str] = lambda name: ""
) -> Any:
    """The content of a file, on the CPU; tensors of a zipped one stay on disk until they are used.

    Args:
        path: the file, a pickle with tensors. torch's restricted unpickler knows tensors and plain containers.
        stand_ins: replacements for further classes, by their full names.
        explain: given the name of a refused class, the end of the message.

    Raises:
        UserError: the file holds any other class (the message names it), is damaged or was not written by
            ``torch.save``, or has tensors with less storage than their shapes need.
    """
    known: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        zipped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(known):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        # torch's message is not quoted: it advises weights_only=False, which would run code from the file
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None:
            raise UserError(f"{path}: not a readable checkpoint: damaged, or not a file of torch.save") from error
        raise UserError(
            f"{path}: refused, the file holds the foreign class {foreign[1]}, and loading it would run code that is "
            f"not ours{explain(foreign[1])}"
        ) from error
    _refuse_unbacked(content, path)
    return content


def _refuse_unbacked(content: Any, path: Path) -> None:
    """Refuses tensors with less storage than their shape needs (expanded views, sparse and meta tensors): copying one
    could exhaust the memory."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(
                    f"{path}: refused, it holds a tensor of the shape {list(value.shape)} without its values"
                )
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value, *value.values()] if isinstance(value, Mapping) else value
