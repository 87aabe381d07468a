"""Packages of Debian and the files in them with damaged bytes: read, or refused with a message."""

from __future__ import annotations

import io
import lzma
import runpy
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from avsr.tools.corpora.debian import packages
from avsr.tools.corpora.debian.asterisk import read_asterisk
from avsr.tools.corpora.debian.corpus import _clips
from avsr.tools.corpora.debian.drascula import read_drascula
from avsr.tools.corpora.debian.queen import read_queen
from avsr.tools.corpora.debian.sound import Unusable, decode
from avsr.tools.corpora.debian.spoken import Spoken

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "tools/tiny_debs.py")))
few_and_many = pytest.mark.parametrize("count", tools.CASES)


@few_and_many
def test_packages(count: int, tmp_path: Path) -> None:
    """The ar archive, and the tar file in it."""
    path = tmp_path / "x.deb"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {"scummvm/drascula/en/1.ALS": b"one", **tiny.licence("drascula")}.items():
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size, info.pax_headers = len(content), {"comment": "é"}
            archive.addfile(info, io.BytesIO(content))

    def read() -> None:
        files, _ = packages.read_package(packages.DRASCULA, path)
        assert sum(map(len, files.values())) <= packages.MOST_BYTES

    def check(content: bytes) -> None:
        tiny.pack(path, {"data.tar.xz": lzma.compress(content, preset=0)})
        read()

    tools.fuzz(count, tools.damaged(inner.getvalue(), 2048), check)
    tiny.pack(path, {"data.tar.xz": lzma.compress(inner.getvalue(), preset=0)})
    tools.fuzz_file(count, path, tools.damaged(path.read_bytes(), 240), read)


@few_and_many
def test_containers_of_the_queen(count: int) -> None:
    short = {name: content if name.endswith(("DOG", "JAS")) else b"sound" for name, content in tiny.QUEEN_FILES.items()}
    whole = tiny.container(short)
    tools.fuzz(count, tools.damaged(whole, 400), lambda data: list(_clips(read_queen(data), [])))


@few_and_many
def test_texts_of_drascula(count: int) -> None:
    whole = tiny.texts_of_drascula([*tiny.DRASCULA_LINES, *([["SO WHAT"]] * 8)])
    sounds = {f"{name}.ALS": b"sound" for name in tiny.DRASCULA_SOUNDS}
    read = lambda data: list(_clips(read_drascula({**sounds, "drascula.dat": data}), []))  # noqa: E731
    tools.fuzz(count, tools.damaged(whole, 120), read)


@few_and_many
def test_lists_of_prompts(count: int) -> None:
    listed = "; list\na: Press 1 (or #) [tone].\nb/c: it's 5 p.m.\nd: <x> caf\u00e9\n".encode()
    sounds = dict.fromkeys(("a", "b/c", "d"), b"sound")
    read = lambda data: list(_clips(read_asterisk(data.decode("utf-8", "replace"), sounds), []))  # noqa: E731
    tools.fuzz(count, tools.damaged(listed), read)


@few_and_many
@pytest.mark.parametrize("kind", ["mp3", "g722"])
def test_sounds(count: int, kind: str) -> None:
    whole = getattr(tiny, kind)(500)

    def check(sound: bytes) -> None:
        try:
            assert decode(Spoken("x", "r", "t", sound, kind)).ndim == 1
        except Unusable as unusable:
            assert unusable.kind in ("damaged", "length", "silent")

    tools.fuzz(count, tools.damaged(whole, 400), check)
