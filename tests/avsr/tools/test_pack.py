"""Packing: the same clips in a few tars, whatever they were in before, to the byte the same after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from avsr.cli import main
from avsr.data.clip import load_clip
from avsr.data.manifest import read_manifest, write_manifest
from avsr.data.members import read_text, sha256_of
from avsr.errors import UserError
from avsr.runtime.folders import sha256
from avsr.runtime.share import Share
from avsr.tools import pack as module
from avsr.tools.pack import Packed, pack


@pytest.fixture
def manifest(make_corpus: Callable[..., Path], tmp_path: Path) -> Path:
    """Seven clips, sound and mouths beside each other, under ids that no tar should take as they are; two more lines
    are parts of the first file."""
    path = make_corpus(tmp_path / "corpus", 7, 0.4, video="beside")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = ["a/b", "a/b.c", "../x", "/y", "é z", "a//b", "." * 3]
    for row, name in zip(rows, ids, strict=True):
        row |= {"id": name, "sha256": sha256(path.parent / row["audio"]), "note": {"kept": [1, None]}}
    times = path.parent / "times.json"
    times.write_text('{"words": []}')
    rows[3]["times"] = times.name
    for number in range(2):
        part = {"audio": rows[0]["audio"], "offset": 0.1, "duration": 0.2, "text": "part"}
        rows.append({"id": f"part {number}", **part})
    write_manifest(path, rows)
    return path


def held(folder: Path) -> dict[str, bytes]:
    """The result."""
    return {path.name: path.read_bytes() for kind in ("tar", "jsonl") for path in folder.glob(f"*.{kind}")}


def test_packed_clips_are_the_same(manifest: Path, tmp_path: Path) -> None:
    assert pack(manifest, tmp_path / "out", clips=3) == Packed(lines=9, shards=3, written=3)
    new, old = read_manifest(tmp_path / "out/manifest.jsonl"), read_manifest(manifest)
    plain = {"id", "text", "duration", "speaker", "offset", "sha256"}
    for row, other in zip(new, old, strict=True):
        assert {key: getattr(row, key) for key in plain} == {key: getattr(other, key) for key in plain}
        for kind in "audio", "video", "times":
            path, expected = getattr(row, kind), getattr(other, kind)
            assert (path is None) == (expected is None)
            assert path is None or sha256_of(path) == sha256(expected) and ".tar/" in str(path)
        needs = {"audio", "video"} if other.video else {"audio"}
        clip, wanted = load_clip(row, needs, 0.2), load_clip(other, needs, 0.2)
        assert clip.measured == wanted.measured and clip.wave is not None and wanted.wave is not None
        assert clip.wave.equal(wanted.wave)
    assert new[7].audio == new[0].audio  # once for all of its parts
    assert new[3].times and read_text(new[3].times) == '{"words": []}'
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert lines[1]["note"] == {"kept": [1, None]}


def test_shards_are_webdatasets_with_a_deterministic_header(manifest: Path, tmp_path: Path) -> None:
    pack(manifest, tmp_path / "out", clips=3)
    samples: dict[str, set[str]] = {}
    for number in range(3):
        with tarfile.open(tmp_path / f"out/manifest-{number:06d}.tar") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                key, _, ending = base.partition(".")
                samples.setdefault(f"{folder}/{key}", set()).add(ending)
                assert (info.mtime, info.uid, info.gid, info.uname, info.mode) == (0, 0, 0, "", 0o644)
                assert not os.path.isabs(info.name) and ".." not in info.name
    assert len(samples) == 7 and all({"wav", "mp4", "json"} <= endings for endings in samples.values())


def test_shards_are_full_where_asked(manifest: Path, tmp_path: Path) -> None:
    assert pack(manifest, tmp_path / "one").shards == 1
    size = os.path.getsize(tmp_path / "one/manifest-000000.tar")
    assert pack(manifest, tmp_path / "two", size=0.6 * size / 1e9).shards == 2
    assert max(path.stat().st_size for path in (tmp_path / "two").glob("*.tar")) <= 0.6 * size + 10_240
    assert pack(manifest, tmp_path / "many", size=1e-9).shards == 7  # a clip larger than a shard has one of its own


def test_packed_clips_can_be_packed(manifest: Path, tmp_path: Path) -> None:
    pack(manifest, tmp_path / "a", clips=2)
    (tmp_path / "a/manifest.jsonl").rename(tmp_path / "a/other.jsonl")
    with pytest.raises(UserError, match="other.jsonl is the manifest itself"):
        pack(tmp_path / "a/other.jsonl", tmp_path / "a")
    pack(tmp_path / "a/other.jsonl", tmp_path / "b", clips=3)
    for row, other in zip(read_manifest(tmp_path / "b/other.jsonl"), read_manifest(manifest), strict=True):
        assert row.audio and other.audio and sha256_of(row.audio) == sha256(other.audio)
    absolute = [{**row, "audio": str(tmp_path / "a" / row["audio"])} for row in _lines(tmp_path / "a/other.jsonl")]
    (tmp_path / "elsewhere").mkdir()
    far = tmp_path / "elsewhere/manifest.jsonl"
    write_manifest(far, [{**row, "video": None, "times": None} for row in absolute])
    with pytest.raises(UserError, match="would be replaced: choose another folder"):
        pack(far, tmp_path / "a", absolute=True)
    with pytest.raises(UserError, match="leads outside"):
        pack(far, tmp_path / "c")


def test_a_stopped_packing_goes_on(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(manifest, tmp_path / "whole", clips=2)
    out, add, calls = tmp_path / "out", module._add, 0

    def full(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 8:  # in the second shard
            raise OSError(28, os.strerror(28))
        return add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_add", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device; whole shards are kept"):
            pack(manifest, out, clips=2)
    assert {path.name for path in out.glob("*.tar")} == {"manifest-000000.tar"} and not list(out.glob("*.part"))
    first = (out / "manifest-000000.tar").stat().st_mtime_ns
    assert pack(manifest, out, clips=2).written == 3
    assert (out / "manifest-000000.tar").stat().st_mtime_ns == first and held(out) == held(tmp_path / "whole")
    assert pack(manifest, out, clips=2).written == 0
    (out / "manifest-000001.tar").write_bytes(b"x")
    (out / "manifest.jsonl").unlink()
    assert pack(manifest, out, clips=2).written == 1 and held(out) == held(tmp_path / "whole")


def test_other_clips_or_options_pack_again(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    pack(manifest, out, clips=2)
    assert pack(manifest, out, clips=7).written == 1
    assert "holds 3 more shards of an earlier packing, first manifest-000001.tar" in caplog.text
    rows = _lines(manifest)
    del rows[2]["sha256"]
    write_manifest(manifest, rows)
    assert pack(manifest, out, clips=7).written == 1
    clip = manifest.parent / rows[2]["audio"]
    soundfile.write(str(clip), soundfile.read(clip)[0][::-1], 16_000)
    assert pack(manifest, out, clips=7).written == 1
    row = read_manifest(out / "manifest.jsonl")[2]
    assert row.audio and sha256_of(row.audio) == sha256(clip)


def test_what_cannot_be_packed_is_named(manifest: Path, tmp_path: Path) -> None:
    for options in {"size": 0}, {"size": float("nan")}, {"clips": -1}:
        with pytest.raises(UserError, match="expected --size above 0"):
            pack(manifest, tmp_path / "out", **options)
    rows = _lines(manifest)
    write_manifest(manifest, [*rows[:2], {**rows[2], "sha256": hashlib.sha256(b"").hexdigest()}])
    with pytest.raises(UserError, match=r"manifest\.jsonl:3: .*is not the file that the manifest was made of"):
        pack(manifest, tmp_path / "out")
    (manifest.parent / rows[1]["audio"]).unlink()
    with pytest.raises(UserError, match=r"manifest\.jsonl:2: .*u001\.wav cannot be read: No such file"):
        pack(manifest, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_the_command(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pack", str(manifest), str(tmp_path / "out"), "--clips", "4"])
    assert capsys.readouterr().out == "      9  manifest.jsonl\n      2  shards, 2 of them written now\n"


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shares_and_their_merge_are_one_packing(manifest: Path, tmp_path: Path) -> None:
    pack(manifest, tmp_path / "whole", clips=2)
    out = tmp_path / "shared"
    with pytest.raises(UserError, match="no shards that could be merged"):
        pack(manifest, out, clips=2, merge=True)
    pack(manifest, out, clips=2, share=Share(3, 3))
    pack(manifest, out, clips=2, share=Share(1, 3))
    with pytest.raises(UserError, match=r"1 of 3 shards .*--shard 2/3"):
        pack(manifest, out, clips=2, merge=True)
    assert not list(out.glob("*.jsonl")) or not (out / f"{manifest.stem}.jsonl").exists()
    pack(manifest, out, clips=2, share=Share(2, 3))
    assert pack(manifest, out, clips=2, merge=True).written == 0
    content = {
        folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".jsonl")}
        for folder in (out, tmp_path / "whole")
    }
    assert content[out] == content[tmp_path / "whole"] and len(content[out]) > 3
    assert pack(manifest, out, clips=2).written == 0
    with pytest.raises(UserError, match="other options or by another version"):
        pack(manifest, out, clips=2, share=Share(1, 2))
        pack(manifest, out, clips=4, merge=True)
