"""Clips inside tar and Arrow files: the same signals as of files of their own, found by an index that can be wrong."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
import torch

from avsr.data import members, tars
from avsr.data.audio import load_audio
from avsr.data.clip import load_clip
from avsr.data.cut import Cut
from avsr.data.manifest import read_manifest, write_manifest
from avsr.data.measured import refuse_other_content
from avsr.data.members import is_file, located, open_media, read_text, sha256_of, stamp, suffix_of
from avsr.data.video import read_video, read_video_sound
from avsr.errors import UserError
from avsr.runtime.folders import sha256

TONE = (0.4 * np.sin(np.arange(48_000) / 9)).astype(np.float32)


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    yield
    tars._opened.cache_clear()


@pytest.fixture(params=[2**20, 0], ids=["at once", "in parts"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_WHOLE", request.param)


def tar_of(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def arrow_of(path: Path, cells: list[object], kind: pyarrow.DataType | None = None, rows: int = 2) -> Path:
    """A file of the column "audio", in batches of so many rows."""
    kind = kind or pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("audio", kind)])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(cells), rows):
            column = pyarrow.array(cells[first : first + rows], kind)
            writer.write_batch(pyarrow.record_batch([column], schema=schema))
    return path


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_sound_in_containers_is_that_of_the_file(name: str, both_ways: None, tmp_path: Path) -> None:
    file = tmp_path / name
    soundfile.write(str(file), TONE, 22_050)
    content = file.read_bytes()
    tar_of(tmp_path / "x.tar", {"other.wav": b"no sound", f"s/{name}": content})
    arrow_of(tmp_path / "x.arrow", [None, {"bytes": b"", "path": None}, {"bytes": content, "path": f"far/{name}"}])
    for cut in (None, Cut(1.1, 0.5)):
        expected = load_audio(file, cut=cut)
        assert len(expected) > 5000
        for inside in f"x.tar/s/{name}", "x.arrow/2/audio":
            torch.testing.assert_close(load_audio(tmp_path / inside, cut=cut), expected, rtol=0, atol=0)
            assert sha256_of(tmp_path / inside) == sha256(file) and suffix_of(tmp_path / inside) == file.suffix


def test_clips_of_a_manifest_in_a_tar(make_corpus: Callable[..., Path], both_ways: None, tmp_path: Path) -> None:
    plain = read_manifest(make_corpus(tmp_path / "plain", 3, video="with sound"))
    files = {row.video.name: row.video.read_bytes() for row in plain if row.video}
    tar_of(tmp_path / "a.tar", files)
    lines = [
        {"id": row.id, "video": f"a.tar/{row.video.name}", "text": "x", "duration": 0.6, "sha256": sha256(row.video)}
        for row in plain
        if row.video
    ]
    write_manifest(tmp_path / "m.jsonl", lines)
    for row, other in zip(read_manifest(tmp_path / "m.jsonl"), plain, strict=True):
        refuse_other_content(row, {"audio", "video"})
        clip, expected = (load_clip(each, {"audio", "video"}, 0.2) for each in (row, other))
        for found, wanted in ((clip.wave, expected.wave), (clip.mouth, expected.mouth)):
            assert found is not None and wanted is not None and torch.equal(found, wanted)
    write_manifest(tmp_path / "m.jsonl", [{**lines[0], "sha256": "0" * 64}])
    with pytest.raises(UserError, match="is not the file that the manifest was made of"):
        refuse_other_content(read_manifest(tmp_path / "m.jsonl")[0], {"audio", "video"})


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_what_tarfile_extracts(format: int, both_ways: None, tmp_path: Path) -> None:
    names = ["./a/b.flac", "long/" * 60 + "c.wav", "ü ñ.ogg", "twice", "empty", "twice", "/absolute/d"]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty" else 700 * number + 3
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
        for kind, name in ((tarfile.LNKTYPE, "hard"), (tarfile.SYMTYPE, "soft"), (tarfile.DIRTYPE, "folder")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "./a/b.flac"
            tar.addfile(info)
    with tarfile.open(path) as tar:
        for name in (*names, "hard"):
            expected = tar.extractfile(name)
            assert expected is not None
            with open_media(path / name.lstrip("/.")) as file:
                assert file.read() == expected.read()
    for name in ("soft", "folder", "a", "a/b.fla", "b.flac", ""):
        assert not is_file(path / name) or name == ""
    with pytest.raises(UserError, match=r"^there is no file .*x\.tar/a$"):
        load_audio(path / "a")


def test_a_stream_seeks_like_a_file(both_ways: None, tmp_path: Path) -> None:
    content = os.urandom(5000)
    tar_of(tmp_path / "x.tar", {"before": b"x" * 1000, "a": content, "after": b"y" * 1000})
    arrow_of(tmp_path / "x.arrow", [{"bytes": content, "path": "a"}])
    for inside in "x.tar/a", "x.arrow/0/audio":
        with open_media(tmp_path / inside) as file:
            for offset, whence, count in ((4990, 0, 100), (-10, 2, 5), (-7, 1, 3), (0, 2, 1), (6000, 0, 9), (0, 0, -1)):
                oracle = io.BytesIO(content)
                oracle.seek(file.tell())
                assert file.seek(offset, whence) == oracle.seek(offset, whence)
                assert file.read(count) == oracle.read(count)


def test_the_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "x.tar", {"a": b"first", "b": b"second"})
    assert read_text(path / "b") == "second" and (tmp_path / "x.tar.index").is_file()
    before = stamp(path / "a")
    tars._opened.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tars, "scan", lambda path: pytest.fail("it is scanned again"))
        assert (read_text(path / "a"), stamp(path / "a")) == ("first", before)
    tar_of(path, {"b": b"other", "a": b"third"})  # replaced, of the same size
    os.utime(path, ns=(0, 10**18))
    assert read_text(path / "a") == "third" and stamp(path / "a") != before


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {f"m{n}": b"%d" % n for n in range(20)})
    assert read_text(path / "m7") == "7"
    index = tmp_path / "x.tar.index"
    whole = index.read_bytes()
    random = np.random.default_rng(0)
    damaged = [b"", whole[:-1], whole[:100], b"x" * len(whole), np.random.default_rng(0).bytes(500)]
    for place in random.integers(0, len(whole), 60):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(random.integers(8))]) + whole[place + 1 :])
    for content in damaged:
        index.write_bytes(content)
        tars._opened.cache_clear()
        assert [read_text(path / f"m{n}") for n in (0, 7, 19)] == ["0", "7", "19"]


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tars, "write_flushed", full)
    assert read_text(tar_of(tmp_path / "x.tar", {"a": b"first"}) / "a") == "first"
    assert not (tmp_path / "x.tar.index").exists()


def test_a_truncated_tar_is_named_and_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "shard.tar", {"a": b"x" * 2000, "b": b"y" * 3000})
    whole = path.read_bytes()
    ends = [0, 1, 511, 512, 2000, 2560, 2561, 3072, 5000, 6144]  # 6144: all members, no end mark
    for count, end in enumerate(ends):
        path.write_bytes(whole[:end])
        os.utime(path, ns=(0, count))
        with pytest.raises(UserError, match=r"shard\.tar is truncated, damaged or not a plain tar"):
            load_audio(path / "a")
    path.write_bytes(whole[:512] + b"z" * 512 + whole[1024:])  # the content is not the container's business
    assert open_media(path / "a").read()[:512] == b"z" * 512
    path.write_bytes(whole[:2560] + b"z" * 512 + whole[3072:])
    os.utime(path, ns=(0, 99))
    with pytest.raises(UserError, match="no member and no end mark at byte 2560"):
        is_file(path / "a")
    monkeypatch.setattr(tars, "scan", lambda path: pytest.fail("it is scanned again"))
    with pytest.raises(UserError, match="no member and no end mark at byte 2560"):
        is_file(path / "b")


def test_compressed_and_sparse_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UserError, match="a compressed one has to be unpacked"):
        is_file(tmp_path / "x.tar/a")
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("holes")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
        info.pax_headers |= {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"}
        tar.addfile(info)
    with pytest.raises(UserError, match=r"y\.tar: its member holes is sparse"):
        is_file(tmp_path / "y.tar/a")


def test_a_folder_may_be_called_like_a_container(tmp_path: Path) -> None:
    folder = tmp_path / "corpus.tar" / "b.arrow"
    folder.mkdir(parents=True)
    tar_of(folder / "c.tar", {"d.arrow/0/audio": b"inside"})
    (folder / "a").write_text("outside")
    assert read_text(folder / "a") == "outside" and located(folder / "a") == folder / "a"
    assert read_text(folder / "c.tar" / "d.arrow/0/audio") == "inside"
    assert not is_file(folder / "missing.tar/a")


def test_threads_and_forks_share_a_tar(tmp_path: Path) -> None:
    contents = {f"m{n}": os.urandom(3000) for n in range(200)}
    path = tar_of(tmp_path / "x.tar", contents)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            found = threads.map(lambda name: (name, open_media(path / name).read()), contents)
            assert dict(found) == contents
    child = os.fork()
    if not child:
        os._exit(0 if open_media(path / "m3").read() == contents["m3"] else 1)
    assert os.waitpid(child, 0)[1] == 0 and open_media(path / "m4").read() == contents["m4"]


def test_a_playlist_in_a_tar_opens_nothing(make_corpus: Callable[..., Path], tmp_path: Path) -> None:
    video = read_manifest(make_corpus(tmp_path / "c", 1, video="with sound"))[0].video
    assert video is not None
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n",
        "b.ffconcat": f"ffconcat version 1.0\nfile '{video}'\n",
    }
    path = tar_of(tmp_path / "x.tar", {name: text.encode() for name, text in lists.items()})
    for name in lists:
        for read in read_video, read_video_sound:
            with pytest.raises(UserError, match="is not a readable video file: it is of the format (hls|concat)"):
                read(path / name)


def test_an_arrow_row_may_name_a_file(tmp_path: Path) -> None:
    (tmp_path / "near.txt").write_text("near")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/away.txt").write_text("away")
    cells = [
        {"bytes": None, "path": "near.txt"},
        {"bytes": None, "path": str(tmp_path / "far/away.txt")},
        {"bytes": b"own", "path": None},
        {"bytes": None, "path": "gone.txt"},
        {"bytes": None, "path": None},
    ]
    path = arrow_of(tmp_path / "x.arrow", cells)
    assert [read_text(path / f"{row}/audio") for row in range(3)] == ["near", "away", "own"]
    assert located(path / "0/audio") == tmp_path / "near.txt" and suffix_of(path / "2/audio") == ""
    for missing in ("3/audio", "4/audio", "5/audio", "-1/audio", "0/text", "x/audio", "0", "9" * 30 + "/audio"):
        assert not is_file(path / missing)
    with pytest.raises(OSError):
        stamp(path / "3/audio")


@pytest.mark.parametrize(
    "kind, cell",
    [
        (pyarrow.list_(pyarrow.float32()), [0.1, 0.2]),
        (pyarrow.struct([("array", pyarrow.list_(pyarrow.float32())), ("sampling_rate", pyarrow.int64())]), None),
        (pyarrow.string(), "a.wav"),
    ],
)
def test_an_arrow_column_of_another_type_is_refused(kind: pyarrow.DataType, cell: object, tmp_path: Path) -> None:
    path = arrow_of(tmp_path / "x.arrow", [cell], kind)
    with pytest.raises(UserError, match=r"x\.arrow: the column 'audio' is of the type .*; expected the bytes"):
        is_file(path / "0/audio")


def test_a_truncated_arrow_file_is_named(tmp_path: Path) -> None:
    path = arrow_of(tmp_path / "x.arrow", [{"bytes": b"x" * 900, "path": "a"}] * 4)
    whole = path.read_bytes()
    for count, end in enumerate((0, 3, 100, 1000, 2500)):
        path.write_bytes(whole[:end])
        os.utime(path, ns=(0, count))
        with pytest.raises(UserError, match=r"x\.arrow is damaged, or not an Arrow file"):
            is_file(path / "3/audio")
