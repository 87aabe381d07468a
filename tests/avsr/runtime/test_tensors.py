"""Safetensors files: whole or not there, and as readable as the files beside them."""

from __future__ import annotations

import itertools
import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avsr.errors import UserError
from avsr.models.sources import convert_once
from avsr.runtime.tensors import refuse_nonfinite, save_file

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (1023,), (7, 129)])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    good = {
        "ends": torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype),  # their squares are not
        "none": torch.zeros(0, dtype=dtype),
        "whole": torch.tensor([2**40, -1]),
        "meta": torch.empty(3, device="meta"),
    }
    refuse_nonfinite(good.items(), "file")
    count = math.prod(shape)
    for place, value in itertools.product({0, count // 2, count - 1}, (math.nan, math.inf, -math.inf)):
        bad = torch.ones(count)
        bad[place] = value
        with pytest.raises(UserError, match=r"^file: bad has values that are not finite"):
            refuse_nonfinite({**good, "bad": bad.to(dtype).reshape(shape)}.items(), "file")


def test_a_conversion_whose_weights_are_cut_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(folder: Path) -> None:
        save_file(TENSORS, folder / "model.safetensors")
        (folder / "done").touch()

    target = convert_once(tmp_path / "source", tmp_path / "target", "done", write)
    whole = (target / "model.safetensors").read_bytes()
    for content in (b"", whole[:-1], bytes(len(whole))):
        (target / "model.safetensors").write_bytes(content)
        caplog.clear()
        assert convert_once(tmp_path / "source", target, "done", write) == target
        assert (target / "model.safetensors").read_bytes() == whole and f"{target} is damaged" in caplog.text
    assert os.listdir(tmp_path) == ["target"]
