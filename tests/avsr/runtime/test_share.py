"""Shares of a command's work: who has what, who may run at once, and what becomes of their files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from avsr.errors import UserError
from avsr.runtime import share as share_module
from avsr.runtime.locks import LOCK, STALE, Holder, hold, process_start
from avsr.runtime.rows import Row, Rows
from avsr.runtime.share import Share, claim_share, claim_whole, gather, owner, take_over

MADE_BY = {"format": "one", "seed": 3}
ALL = [Share(index, 3) for index in (1, 2, 3)]
KEYS = [f"set/speaker{index % 7}/{index:05d}" for index in range(3000)] + ["", "ü", "\udcff"]


def key(row: Row) -> str:
    return str(row["id"])


def write(out: Path, share: Share, *ids: str) -> None:
    rows = Rows(out / share.file, key, MADE_BY)
    for name in ids:
        rows.add({"id": name, "by": str(share)})


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_item_is_of_one_share_whatever_the_others_are(count: int) -> None:
    shares = [Share(index, count) for index in range(1, count + 1)]
    owners = {name: [share.index for share in shares if share.has(name)] for name in KEYS}
    assert all(found == [owner(name, count)] for name, found in owners.items())
    sizes = Counter(found[0] for found in owners.values())
    expected = len(KEYS) / count
    assert max(abs(sizes[share.index] - expected) for share in shares) < 5 * expected**0.5  # five sigma
    items = random.Random(0).sample(range(100), 50)
    assert sorted(item for share in shares for item in share.of(items)) == sorted(items)
    assert len({len(share.of(items)) for share in shares}) <= 2


def test_a_share_has_the_same_items_on_every_host() -> None:
    """Also with another seed of Python's hashes; the numbers are from what sha256sum prints."""
    assert [owner(name, 16) for name in ("a", "b", "trainval/A/00001")] == [11, 11, 1]


def test_it_is_read_as_it_is_written() -> None:
    assert Share.parse("3/16") == Share(3, 16) and str(Share(3, 16)) == "3/16"
    assert Share(3, 16).file == "shard-3-of-16.jsonl"


def plant(folder: Path, name: str, holder: Holder, silent: float = 0.0) -> None:
    """A lock of ``holder``, who last gave a sign of life ``silent`` seconds ago."""
    file = folder / name / holder.name
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() - silent,) * 2)


def test_the_dead_keep_nobody_out(tmp_path: Path) -> None:
    """One of this host that has ended, and one of another host that has been silent for long."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = replace(Holder.own(), pid=process.pid, born=process_start(process.pid))
    process.kill()
    process.wait()
    silent = replace(dead, host="elsewhere")
    for holder, seconds in ((dead, 0.0), (silent, STALE + 5)):
        plant(tmp_path, LOCK, holder, seconds)
        plant(tmp_path, f".{ALL[0].file}{LOCK}", holder, seconds)
        with claim_share(tmp_path, ALL[1]):
            assert (tmp_path / LOCK / holder.name).exists()  # it is the whole's, not this one's
        with claim_whole(tmp_path):
            pass
        assert not list(tmp_path.iterdir())
    plant(tmp_path, LOCK, silent, STALE / 2)
    with pytest.raises(UserError, match=r"is in use by process \d+ on elsewhere"), claim_share(tmp_path, ALL[1]):
        pass


def test_those_who_may_run_at_once_and_those_who_may_not(tmp_path: Path) -> None:
    with claim_share(tmp_path, ALL[0]), claim_share(tmp_path, ALL[1]):
        for other in (ALL[0], Share(3, 4)):
            with pytest.raises(UserError, match="is in use by process"), claim_share(tmp_path, other):
                pass
        with pytest.raises(UserError, match=r"shard-1-of-3\.jsonl is in use by process"), claim_whole(tmp_path):
            pass
    with claim_whole(tmp_path):
        for refused in (claim_share(tmp_path, ALL[2]), claim_whole(tmp_path)):
            with pytest.raises(UserError, match=rf"{tmp_path} is in use by process"), refused:
                pass
    with hold(tmp_path, "metrics.json"), claim_whole(tmp_path):
        pass  # another output of the folder
    assert not list(tmp_path.iterdir())


def test_what_shards_have_done_is_taken_over_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop between the copy and the deletion leaves both; the later row of one key counts."""
    for share, names in zip(ALL, (["a", "b", "a"], [], ["c"]), strict=True):
        write(tmp_path, share, *names)
    with (tmp_path / ALL[0].file).open("a") as file:
        file.write('\n5\n[]\n"made_by"\n{"id": ')
    done = Rows(tmp_path / "progress.jsonl", key)
    done.add({"id": "b", "by": "an earlier run"})
    with monkeypatch.context() as patch:
        patch.setattr(share_module, "flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            take_over(done, gather(tmp_path, key, MADE_BY))
    assert "is no row, left out (4 in all)" in caplog.text
    done = Rows(tmp_path / "progress.jsonl", key)
    take_over(done, gather(tmp_path, key, MADE_BY))
    assert [path.name for path in tmp_path.iterdir()] == ["progress.jsonl"]
    assert Rows(done.path, key).held == done.held
    assert {name: row["by"] for name, row in done.held.items()} == {"a": "1/3", "b": "1/3", "c": "3/3"}


def test_a_file_without_its_header_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ALL[0], "a")
    with pytest.raises(UserError, match=r"shard-1-of-3\.jsonl was made with other options .* --shard 1/3 again"):
        gather(tmp_path, key, MADE_BY | {"seed": 4})
    _, row = (tmp_path / ALL[0].file).read_text().splitlines(keepends=True)
    (tmp_path / ALL[0].file).write_text(row)
    with pytest.raises(UserError, match="was made with other options"):
        gather(tmp_path, key, MADE_BY)
