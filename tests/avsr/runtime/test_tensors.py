"""Safetensors files: whole or not there, and as readable as the files beside them."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avsr.models.sources import convert_once
from avsr.runtime.tensors import save_file

TENSORS = {"a": torch.arange(1000.0)}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def others(request: pytest.FixtureRequest) -> Iterator[int]:
    """The permissions of a new file under some umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_as_readable_as_others(tmp_path: Path, others: int) -> None:
    path = tmp_path / "x.safetensors"
    for _ in range(2):  # a new one, and in the place of another
        save_file(TENSORS, path, metadata={"step": "1"})
        assert mode(path) == others
    assert torch.equal(load_file(path)["a"], TENSORS["a"])
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_so_is_what_other_libraries_convert(tmp_path: Path, others: int) -> None:
    def write(folder: Path) -> None:
        for name in ("model.safetensors", "done"):
            (folder / name).touch(mode=0o600)

    target = convert_once(tmp_path / "source", tmp_path / "target", "done", write)
    assert {path.name: mode(path) for path in target.iterdir()} == {"model.safetensors": others, "done": others}


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match="x.safetensors"):
            save_file(TENSORS, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_file(path)["a"].tolist() == [1, 1] and os.listdir(tmp_path) == ["x.safetensors"]
