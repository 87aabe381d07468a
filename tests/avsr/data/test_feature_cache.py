"""Shards of features: equal to single files, whatever is killed, damaged or done twice."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from avsr.data import feature_cache
from avsr.data.feature_cache import FeatureCache

WIDTH = 8


def key_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()[:34]


def features_of(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    return random.standard_normal((random.integers(1, 9), WIDTH)).astype(np.float16)


class Opened:
    """A cache as a new start opens it, and what it says of damage."""

    def __init__(self, folder: Path) -> None:
        self.said: list[tuple[Path, str]] = []
        self.cache = FeatureCache(folder, WIDTH, lambda path, problem: self.said.append((path, problem)))
        self.cache.refresh()

    def fill(self, numbers: range) -> Opened:
        for number in numbers:
            self.cache.add(key_of(number), features_of(number))
        self.cache.flush()
        return self

    def right(self, numbers: Sequence[int]) -> list[int]:
        """The clips that are there; all of them as they were made."""
        found = []
        there = self.cache.find([key_of(number) for number in numbers])
        for number, known in zip(numbers, there, strict=True):
            held = self.cache.read(key_of(number))
            if held is not None:
                assert known and held.dtype == np.float16 and held.flags.writeable
                assert np.array_equal(held, features_of(number)) and len(held) == self.cache.frames(key_of(number))
                found.append(number)
        return found


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shards/*.safetensors"))


def test_clips_are_as_in_single_files_at_once_and_at_the_next_start(tmp_path: Path) -> None:
    first = Opened(tmp_path).fill(range(700))
    for number in range(700, 720):  # as before there were shards
        path = tmp_path / key_of(number)[:2] / f"{key_of(number)[2:]}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, features_of(number))
    first.cache.keep(key_of(720), features_of(720))
    assert len(shards(tmp_path)) == 2  # of at most 512
    for opened in (first, Opened(tmp_path), Opened(tmp_path)):
        assert opened.right(range(800)) == list(range(721)) and opened.said == []
        assert not opened.cache.find([key_of(799)])[0] and opened.cache.frames(key_of(799)) == 0


def test_what_is_added_is_there_before_its_shard_is_written(tmp_path: Path) -> None:
    cache = Opened(tmp_path).cache
    cache.add(key_of(0), features_of(0))
    assert list(cache.find([key_of(0), key_of(1)])) == [True, False] and shards(tmp_path) == []


@pytest.mark.parametrize(("limit", "most", "expected"), [("_CLIPS", 2, 4), ("_BYTES", 1, 7), ("_SECONDS", 0.0, 7)])
def test_a_shard_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, most: float, expected: int
) -> None:
    monkeypatch.setattr(feature_cache, limit, most)
    Opened(tmp_path).fill(range(7))
    assert len(shards(tmp_path)) == expected and Opened(tmp_path).right(range(7)) == list(range(7))


def test_a_start_opens_no_shard(tmp_path: Path) -> None:
    Opened(tmp_path).fill(range(1100)).cache.refresh()
    for shard in shards(tmp_path):
        shard.unlink()
        shard.mkdir()  # no reader would take it for a shard
    start = Opened(tmp_path)
    assert all(start.cache.find([key_of(n) for n in range(1100)]))
    assert [start.cache.frames(key_of(n)) for n in range(1100)] == [len(features_of(n)) for n in range(1100)]
    assert start.said == []


def handles(folder: Path) -> list[str]:
    """Those of files in ``folder`` that this process holds open."""
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return [link.name for link in links if link.is_symlink() and str(folder) in os.readlink(link)]


def test_no_more_shards_are_open_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_CLIPS", 2)
    monkeypatch.setattr(feature_cache, "_OPEN", 3)
    opened = Opened(tmp_path).fill(range(16))
    for numbers in (range(16), range(15, -1, -1), range(0, 16, 3)):
        assert opened.right(numbers) == list(numbers) and len(handles(tmp_path)) == 3
    del opened
    gc.collect()
    assert handles(tmp_path) == []


def fork(run: Callable[[], bool]) -> int:
    """Starts a process, whose status is 0 if ``run`` returns True."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = 0 if run() else 1
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_forks_read_the_same_shards(tmp_path: Path) -> None:
    """As loader processes do: the files that they share are open since before the fork."""
    opened = Opened(tmp_path).fill(range(600))
    assert len(opened.right(range(600))) == 600

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(600).tolist()
        return opened.right(order) == order and not opened.said

    children = [fork(lambda seed=seed: read(seed)) for seed in range(4)]  # type: ignore[misc]
    assert [status_of(pid) for pid in children] == [0] * 4
    for handle in handles(tmp_path):  # a position would be shared: reads that move it would meet sooner or later
        assert "pos:\t0\n" in Path(f"/proc/self/fdinfo/{handle}").read_text()


def test_a_killed_process_loses_the_shard_that_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        done.append(new)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert status_of(fork(lambda: bool(Opened(tmp_path).fill(range(2000))))) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.part"))) == 1
    again = Opened(tmp_path)
    assert again.right(range(2000)) == list(range(1024)) and again.said == []
    again.fill(range(1024, 2000))
    assert list(tmp_path.rglob("*.part")) == []
    assert Opened(tmp_path).right(range(2000)) == list(range(2000))


def test_processes_fill_one_cache(tmp_path: Path) -> None:
    def fill(numbers: range) -> bool:
        opened = Opened(tmp_path).fill(numbers)
        opened.cache.refresh()
        return opened.right(numbers) == list(numbers) and not opened.said

    parts = [range(1000), range(600, 1600), range(1000)]
    children = [fork(lambda part=part: fill(part)) for part in parts]  # type: ignore[misc]
    assert [status_of(pid) for pid in children] == [0] * 3
    last = Opened(tmp_path)
    assert last.right(range(1700)) == list(range(1600)) and last.said == []
    assert list(tmp_path.rglob("*.part")) == []


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_width(path: Path) -> None:
    other = FeatureCache(path.parent / "other", WIDTH // 2, lambda *_: None)
    for number in range(20):
        other.add(key_of(number), features_of(number)[:, : WIDTH // 2].copy())
    other.flush()
    (made,) = shards(path.parent / "other")
    path.write_bytes(made.read_bytes())


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [flipped, truncated, zeroed, emptied, of_another_width, a_folder, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", ["there", "gone", "damaged"])
@pytest.mark.parametrize("running", [False, True])
def test_damage_is_found_healed_and_gone_at_the_next_start(
    tmp_path: Path, damage: Callable[[Path], None], index: str, running: bool
) -> None:
    Opened(tmp_path).fill(range(20)).cache.refresh()
    (bad,) = shards(tmp_path)
    Opened(tmp_path).fill(range(20, 40)).cache.refresh()
    reader = Opened(tmp_path)
    damage(bad)
    if index != "there":
        (flipped if index == "damaged" else Path.unlink)(tmp_path / "index.safetensors")
    if not running:
        reader = Opened(tmp_path)
    left = reader.right(range(40))
    assert left[-20:] == list(range(20, 40)) and len(left) < 40
    assert all(path in (bad, tmp_path / "index.safetensors") for path, _ in reader.said)
    assert reader.said or (damage is Path.unlink and index == "gone")  # nothing is left that knew of it
    if damage == flipped:
        assert len(left) == 39
    if running:  # by a reader, one by one
        for number in set(range(40)) - set(left):
            reader.cache.keep(key_of(number), features_of(number))
        assert reader.right(range(40)) == list(range(40))
    start = Opened(tmp_path)  # knows what cannot be read without reading it again
    lacking = np.flatnonzero(~start.cache.find([key_of(number) for number in range(40)])).tolist()
    assert lacking == ([] if running else sorted(set(range(40)) - set(left)))
    for number in lacking:
        start.cache.add(key_of(number), features_of(number))
    start.cache.flush()
    assert start.right(range(40)) == list(range(40))
    last = Opened(tmp_path)
    assert last.right(range(40)) == list(range(40)) and last.said == []


def test_a_second_damage_of_a_shard_is_found_too(tmp_path: Path) -> None:
    Opened(tmp_path).fill(range(20)).cache.refresh()
    (shard,) = shards(tmp_path)
    for place in (-3, -200):
        data = bytearray(shard.read_bytes())
        data[place] ^= 1
        shard.write_bytes(data)
        (lost,) = set(range(20)) - set(Opened(tmp_path).right(range(20)))
        start = Opened(tmp_path)
        assert not start.cache.find([key_of(lost)])[0]
        start.fill(range(lost, lost + 1))
    assert Opened(tmp_path).right(range(20)) == list(range(20))


def test_the_header_of_a_shard_is_that_of_safetensors(tmp_path: Path) -> None:
    Opened(tmp_path).fill(range(5))
    (shard,) = shards(tmp_path)
    held = {name.partition(".")[0]: value for name, value in load_file(str(shard)).items()}
    assert held.keys() == {key_of(n)[:32] for n in range(5)}
    assert all(np.array_equal(held[key_of(n)[:32]], features_of(n)) for n in range(5))
