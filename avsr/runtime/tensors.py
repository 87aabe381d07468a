"""Writes safetensors files as other files are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from avsr.runtime.folders import part_of


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
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def like_new(path: Path) -> None:
    """Gives a file the permissions that a new one beside it has."""
    probe = path.with_name(f"{path.name}.mode")
    try:
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)
