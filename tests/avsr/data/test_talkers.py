"""The pool of voices: chosen and read once, the same in every process, made again when it is damaged."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from avsr.config import NoiseConfig
from avsr.data import talkers
from avsr.data.audio import load_audio
from avsr.data.manifest import Utterance, read_manifest, write_manifest
from avsr.data.noise import Babble
from avsr.data.talkers import open_talkers, source_of


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(talkers, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def manifest(cache: Path, make_corpus: Callable[..., Path], tmp_path: Path) -> str:
    """Nine clips: one each of s0 and s1, seven of s2."""
    path = make_corpus(tmp_path / "corpus", seconds=[0.3 + 0.1 * n for n in range(9)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_manifest(path, [{**row, "speaker": f"s{min(n, 2)}"} for n, row in enumerate(rows)])
    return str(path)


def waves(manifest: str, **options: int) -> dict[str, torch.Tensor]:
    found = open_talkers(manifest, options.get("most", 0), False)
    return {found.sources[n]: wave for n in range(len(found)) if (wave := found.wave(n)) is not None}


def test_all_are_what_their_files_hold(manifest: str) -> None:
    rows = read_manifest(manifest)
    for _ in range(2):  # read, and from the cache
        found = waves(manifest)
        assert found.keys() == {source_of(row) for row in rows}
        for row in rows:
            assert row.audio is not None
            torch.testing.assert_close(found[source_of(row)], load_audio(row.audio), rtol=0, atol=0)


def test_the_second_time_neither_manifest_nor_clips_are_read(manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    babble = Babble(NoiseConfig(talkers=2), manifest)
    noise = babble.draw(5000, read_manifest(manifest)[0], random.Random(1))

    def no(*arguments: object, **options: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr(talkers, "open_manifest", no)
    monkeypatch.setattr(talkers, "load_clip", no)
    again = Babble(NoiseConfig(talkers=2), manifest)
    clip = Utterance(id="u000", audio=Path(manifest).parent / "u000.wav", text="x", duration=0.3, speaker="s0")
    assert torch.equal(again.draw(5000, clip, random.Random(1)), noise) and again.identity == babble.identity


@pytest.mark.parametrize("most", [1, 3, 5, 8])
def test_a_pool_has_as_many_speakers_as_it_can(manifest: str, most: int) -> None:
    found = open_talkers(manifest, most, False)
    assert len(found) == most and found.total == 9 and len(set(found.sources)) == most
    assert len(Counter(found.speakers)) == min(most, 3) and found.speakers == sorted(found.speakers)
    assert Babble(NoiseConfig(pool=most), manifest).identity != Babble(NoiseConfig(pool=0), manifest).identity
    assert Babble(NoiseConfig(pool=9), manifest).identity == Babble(NoiseConfig(pool=500), manifest).identity


def _sources(manifest: str) -> list[str]:
    return open_talkers(manifest, 4, False).sources


def test_every_process_has_the_same_pool(manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _sources(manifest)
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "other"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_sources, (manifest,))
    assert here == there


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "waves.npy").write_bytes((folder / "waves.npy").read_bytes()[:-4000]),
        lambda folder: (folder / "waves.npy").write_bytes(b""),
        lambda folder: (folder / "waves.npy").unlink(),
        lambda folder: np.save(folder / "waves.npy", np.zeros(7, np.float32)),
        lambda folder: np.save(folder / "waves.npy", np.load(folder / "waves.npy").astype(np.float64)),
        lambda folder: (folder / "talkers.json").write_text("{"),
        lambda folder: (folder / "talkers.json").write_text('{"speakers": 1}'),
        lambda folder: (folder / "talkers.json").write_text(
            (folder / "talkers.json").read_text().replace('"s0", ', "")
        ),
    ],
)
def test_a_damaged_pool_is_made_again(manifest: str, cache: Path, damage: Callable[[Path], object]) -> None:
    before = waves(manifest)
    (folder,) = (cache / "talkers").iterdir()
    damage(folder)
    after = waves(manifest)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in (cache / "talkers").iterdir()] == [folder.name]
    assert open_talkers(manifest, 0, False).waves.flags.writeable is False  # mapped


def test_without_a_cache_it_works_from_memory(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(talkers, "cache_folder", lambda: tmp_path / "file")
    assert len(waves(manifest)) == 9 and "the talkers of the babble are not kept: Not a directory" in caplog.text


def test_another_manifest_of_this_name_has_other_talkers(manifest: str) -> None:
    waves(manifest)
    path = Path(manifest)
    path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
    assert len(waves(manifest)) == 4
