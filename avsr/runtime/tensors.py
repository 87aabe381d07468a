"""Writes safetensors files as other files are written, and refuses those whose values are not finite."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from avsr.errors import UserError, at
from avsr.runtime.folders import flush, part_of

NOT_FINITE = "has values that are not finite: the file is damaged, or of a training that diverged"


def save_file(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, readable by those who can read the files beside it: the library itself
    makes files that their owner alone can read.

    Args:
        tensors: by name, on CPU and contiguous.
        path: an earlier file is replaced.
        metadata: of the header.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing was.
    """
    path = Path(path)
    part = part_of(path)
    try:
        safetensors.torch.save_file(dict(tensors), str(part), metadata=metadata)
        like_new(part)
        flush(part)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_file(path: Path, key: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; ``key`` is of the config, for messages.

    Raises:
        UserError: the file is missing or damaged, or a value is not finite; the message names the first such tensor.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{at(key)}{path} is no readable safetensors file: {error}") from error
    refuse_nonfinite(tensors.items(), f"{at(key)}{path}")
    return tensors


def refuse_nonfinite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises a ``UserError`` that names the first of ``tensors`` (name, tensor) with a value that is NaN or infinite.
    Takes 0.05 s for 135 million values on one thread of a CPU. Tensors without values here are not judged: those of the
    meta device, and parameters that ZeRO-3 has partitioned."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        wide = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
        if not bool(torch.stack(wide.aminmax()).isfinite().all()):
            raise UserError(f"{where}: {name} {NOT_FINITE}")


def like_new(path: Path) -> None:
    """Gives a file the permissions that a new one beside it has."""
    probe = path.with_name(f"{path.name}.mode")
    try:
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)
