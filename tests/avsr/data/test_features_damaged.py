"""Damage in the feature cache, and a cache that cannot be written."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avsr.config import DataConfig
from avsr.data import features as features_module
from avsr.data.dataset import Reading, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance
from avsr.data.members import stamp
from avsr.errors import ClipError
from avsr.runtime import folders


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def array(features: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, features)
    return content.getvalue()


GOOD = np.ones((30, 32), np.float16)  # as a file of the first utterance could be
DAMAGED = {
    "empty": b"",
    "cut in its header": b"\x93NUMPY\x01\x00",
    "cut": array(GOOD)[:-7],
    "zeros": bytes(len(array(GOOD))),
    "zeros after the header": array(0 * GOOD),
    "not of numpy": b"not numpy at all",
    "an archive": b"PK\x03\x04 and no more",
    "a header that is no Python": array(GOOD).replace(b"}", b"("),
    "another width": array(GOOD[:, :31]),
    "another type": array(GOOD.astype(np.float32)),
    "another shape": array(GOOD.reshape(-1)),
    "no frames": array(GOOD[:0]),
    "NaN": array(np.where(np.arange(32) == 5, np.nan, GOOD).astype(np.float16)),
    "infinite": array(GOOD * np.float16(np.inf)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("start", [True, False], ids=["at the start", "while training"])
def test_a_damaged_cache_file_is_computed_again_and_said_once(
    store: Callable[..., FeatureStore],
    corpus: list[Utterance],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
    start: bool,
) -> None:
    """A file with one clip, as all of an older cache are."""
    made, two = store(), [corpus[0], corpus[4]]  # of one length
    good = [made.sound(u) for u in two]
    paths = files(tmp_path / "cache")
    whole = [path.stat().st_size for path in paths]
    for path in paths:
        path.write_bytes(content)
    again = store()
    if start:
        assert again.prepare(two, title="x", shown=False) == {}
        assert files(tmp_path / "cache") == paths
        assert [again.count(u) for u in two] == [len(features) for features in good]
    for utterance, features in zip(two, good, strict=True):
        torch.testing.assert_close(again.sound(utterance), features, rtol=0, atol=4e-3)
        assert again.count(utterance) == len(features)
    assert [path.stat().st_size for path in paths] == whole
    assert [m for m in caplog.messages if "damaged" in m and str(tmp_path / "cache") in m] == caplog.messages[:1]


def half_zeroed(cache: Path) -> Path:
    (shard,) = cache.rglob("*/shards/*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[: -len(data) // 2] + bytes(len(data) // 2))
    return shard


def test_a_damaged_shard_is_said_once_and_healed(
    store: Callable[..., FeatureStore],
    corpus: list[Utterance],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = store()
    made.prepare(corpus, title="x", shown=False)
    good = [made.sound(u) for u in corpus]
    half_zeroed(tmp_path / "cache")
    reader = store()
    healed = [reader.sound(u) for u in corpus]
    assert all((one - two).abs().max() < 4e-3 for one, two in zip(healed, good, strict=True))  # in other batches
    assert len(caplog.messages) == 1 and "damaged" in caplog.text
    last = store()
    last.forbid_encoding(monkeypatch)
    last.refresh()
    assert last.prepare(corpus, title="x", shown=False) == {} and len(caplog.messages) == 1
    assert all(torch.equal(last.sound(u), features) for u, features in zip(corpus, healed, strict=True))


def test_a_loader_process_leaves_damage_to_the_next_start(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the encoders are on a GPU, which a fork cannot use."""
    made = store()
    made.prepare(corpus, title="x", shown=False)
    good = {u.id: made.sound(u) for u in corpus}
    shard = half_zeroed(tmp_path / "cache")
    lost = []
    with monkeypatch.context() as patch:
        patch.setattr(features_module, "get_worker_info", object)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for utterance in corpus:
            try:
                assert torch.equal(made.sound(utterance), good[utterance.id])
            except ClipError as error:
                assert str(error).startswith(f"{utterance.where}: {shard} is damaged") and "next start" in str(error)
                lost.append(utterance)
    assert 0 < len(lost) < len(corpus)
    start, encoded = store(), []
    real = start.encoders["audio"].run
    monkeypatch.setattr(start.encoders["audio"], "run", lambda rows: (encoded.extend(rows), real(rows))[1])
    start.refresh()
    assert start.prepare(corpus, title="x", shown=False) == {} and len(encoded) == len(lost)
    assert all((start.sound(u) - good[u.id]).abs().max() < 4e-3 for u in corpus) and len(encoded) == len(lost)


def test_known_stamps_are_not_asked_for(
    store: Callable[..., FeatureStore], corpus: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store()
    made.prepare(corpus, title="x", shown=False)
    good = [made.sound(u) for u in corpus]
    known = [replace(u, stamps=(stamp(u.audio), None)) for u in corpus]
    corpus[0].audio.unlink()
    start = store()
    start.forbid_encoding(monkeypatch)
    corpus = [known[0], corpus[1], *known[2:]]
    assert start.prepare(corpus, title="x", shown=False) == {}
    assert [start.count(u) for u in corpus] == [len(features) for features in good]
    assert all(torch.equal(start.sound(u), features) for u, features in zip(corpus, good, strict=True))
    corpus[2] = replace(corpus[2], stamps=("1 1", None))  # of another file
    with pytest.raises(AssertionError, match="encoded again"):
        start.prepare(corpus, title="x", shown=False)


def test_a_complete_cache_may_be_read_only(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store()
    made.prepare(corpus, title="x", shown=False)
    before = files(tmp_path / "cache")

    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for holder, name in ((os, "mkdir"), (folders, "_write_flushed"), (Path, "touch"), (Path, "unlink")):
        monkeypatch.setattr(holder, name, refused)
    start = store()
    start.refresh()
    assert start.prepare(corpus, title="x", shown=False) == {}
    assert all(torch.equal(start.sound(u), made.sound(u)) for u in corpus)
    assert files(tmp_path / "cache") == before


def test_a_damaged_cache_file_of_a_clip_that_is_bad_or_gone_is_a_bad_utterance(
    store: Callable[..., FeatureStore], corpus: list[Utterance], tmp_path: Path
) -> None:
    made, (one, two) = store(), corpus[:2]
    made.prepare([one, two], title="x", shown=False)
    for path in files(tmp_path / "cache"):
        path.write_bytes(b"damaged")
    stat = one.audio.stat()
    one.audio.write_bytes(bytes(stat.st_size))  # its name, size and time are still those of the cache
    os.utime(one.audio, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    two.audio.unlink()
    for utterance in (one, two):
        with pytest.raises(ClipError, match=rf"{utterance.where}: .*{utterance.audio.name}"):
            made.sound(utterance)
    data = DataConfig(train="t", validation="v", cache=str(tmp_path / "cache"), on_bad="skip", max_bad=1.0)
    found = load_dataset(str(tmp_path / "corpus/manifest.jsonl"), data, made, list, title="x", reading=Reading("audio"))
    assert set(found.bad) == {one.id, two.id} and len(found) == len(corpus) - 2
