"""Feature caches of any content: what is read from them was put there, or is computed again."""

from __future__ import annotations

import json
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import strategies as st

from avsr.data.feature_cache import FeatureCache

pytestmark = pytest.mark.integration

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)
WIDTH = 4
CLIPS = {f"{n:032x}00": np.full((n + 1, WIDTH), n + 1, np.float16) for n in range(2)}


def check(folder: Path) -> None:
    """Of a clip that is there, all is there: the checksums are the ones of the features."""
    cache = FeatureCache(folder, WIDTH, lambda path, problem: None)
    cache.refresh()
    for key, features in CLIPS.items():
        held = cache.read(key)
        if held is not None:
            assert held.tobytes() == features.tobytes() and bool(cache.find([key])[0]) and cache.frames(key)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache = FeatureCache(tmp_path, WIDTH, lambda path, problem: None)
    for key, features in CLIPS.items():
        cache.add(key, features)
    cache.flush()
    cache.refresh()
    return tmp_path


@few_and_many
@pytest.mark.parametrize("marked", [False, True])
def test_shards(count: int, filled: Path, marked: bool) -> None:
    (shard,) = (filled / "shards").iterdir()
    whole, index = shard.read_bytes(), filled / "index.safetensors"
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:size])
    if marked:
        Path(f"{shard}.0.damaged").touch()

    def read(content: bytes) -> None:
        shard.write_bytes(content)
        index.unlink(missing_ok=True)
        check(filled)

    def headed(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + whole[size:]

    cases = st.one_of(tools.json_file(header).map(headed), tools.damaged(whole, size))
    one = dict([next(iter(header.items()))])
    tools.fuzz(count, cases, read, () if marked else map(headed, tools.each_changed(one)))


@few_and_many
def test_indexes(count: int, filled: Path) -> None:
    index = filled / "index.safetensors"
    whole = index.read_bytes()
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:size])

    def headed(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + whole[size:]

    always = map(headed, tools.each_changed(header))
    cases = st.one_of(tools.json_file(header).map(headed), tools.damaged(whole, size))
    tools.fuzz_file(count, index, cases, lambda: check(filled), always)
