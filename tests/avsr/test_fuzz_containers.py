"""Tar files, their indices and Arrow files with damaged bytes: read, or refused with a message."""

from __future__ import annotations

import io
import os
import runpy
import tarfile
from itertools import count as numbers
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest

from avsr.config import DataConfig
from avsr.data import foreign
from avsr.data.manifest import read_manifest
from avsr.data.members import is_file, open_media, read_text
from avsr.data.tars import INDEX

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)
times = numbers(1)  # every case is a file of its own to the caches


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(0, next(times)))


@few_and_many
def test_tars(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "long/" * 40 + "b.txt", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"words"))
    whole = path.read_bytes()
    with_size = [whole[:124] + size + whole[136:] for size in (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0")]

    def check(content: bytes) -> None:
        Path(f"{path}{INDEX}").unlink(missing_ok=True)
        replace(path, content)
        if is_file(path / "a.txt"):
            assert len(read_text(path / "a.txt")) < len(content)

    tools.fuzz(count, tools.damaged(whole, 2048), check, with_size)


@few_and_many
def test_indices(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"words"))
    content = path.read_bytes()
    assert is_file(path / "a.txt")
    index = Path(f"{path}{INDEX}")

    def check(damaged: bytes) -> None:
        replace(path, content)
        index.write_bytes(damaged)
        assert read_text(path / "a.txt") == "words"

    tools.fuzz(count, tools.damaged(index.read_bytes(), 128), check)


@few_and_many
def test_arrow_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": b"words", "path": "a.txt"}, None, {"bytes": b"more", "path": None}]
    schema = pyarrow.schema([("audio", kind)])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for _ in range(2):
            writer.write_batch(pyarrow.record_batch([pyarrow.array(cells, kind)], schema=schema))
    whole = path.read_bytes()

    def check(content: bytes) -> None:
        replace(path, content)
        for row in range(6):
            if is_file(path / f"{row}/audio"):
                with open_media(path / f"{row}/audio") as file:
                    assert len(file.read()) <= len(content)

    each = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(0, len(whole), 3)]
    tools.fuzz(count, tools.damaged(whole, len(whole)), check, each)


@few_and_many
def test_datasets_of_others(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a folder of save_to_disk says of itself, and the .json of a sample of WebDataset."""
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "saved").mkdir()
    state = tmp_path / "saved/state.json"

    def check_state() -> None:
        foreign._made.cache_clear()
        foreign.resolve(str(state.parent), DataConfig())

    tools.fuzz_json(count, state, {"_data_files": [{"filename": "x.arrow"}], "_indices_files": None}, check_state)
    fields = {"text": "words", "duration": 0.5, "speaker": "s", "id": 3}
    sample = tmp_path / "sample.json"

    def check_sample() -> None:
        foreign._made.cache_clear()
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in (("a.wav", b"sound"), ("a.json", sample.read_bytes())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        os.utime(tmp_path / "x.tar", ns=(0, next(times)))
        path, absolute = foreign.resolve(f"wds:{tmp_path}/x.tar", DataConfig())
        read_manifest(path, absolute=absolute)

    tools.fuzz_json(count, sample, fields, check_sample)
