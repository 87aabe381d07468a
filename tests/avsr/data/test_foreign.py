"""Datasets of others: the same clips, texts and durations as in a manifest of one's own, one line for what fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from avsr.config import DataConfig
from avsr.config.schema import ColumnsConfig
from avsr.data import foreign
from avsr.data.arrows import open_rows
from avsr.data.clip import load_clip
from avsr.data.foreign import resolve
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError
from avsr.tools.pack import pack


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    foreign._made.cache_clear()
    datasets.disable_progress_bars()


@pytest.fixture
def own(make_corpus: Callable[..., Path], tmp_path: Path) -> list[Utterance]:
    return read_manifest(make_corpus(tmp_path / "corpus", seconds=[0.3 + 0.1 * n for n in range(7)]))


def table(own: list[Utterance], **more: Any) -> datasets.Dataset:
    """As Audio() stores it: every second clip as a path, the others as bytes."""
    cells = [
        {"bytes": None, "path": str(row.audio)} if n % 2 else {"bytes": row.audio.read_bytes(), "path": row.audio.name}
        for n, row in enumerate(own)
        if row.audio
    ]
    columns = {"text": [row.text for row in own], "speaker": [row.speaker for row in own], "audio": cells}
    return datasets.Dataset.from_dict({**columns, **more})


def rows_of(spec: str, **columns: Any) -> list[Utterance]:
    path, absolute = resolve(spec, DataConfig(columns=ColumnsConfig(**columns)))
    return read_manifest(path, absolute=absolute)


def same(rows: list[Utterance], own: list[Utterance]) -> None:
    assert len(rows) == len(own)
    for row, other in zip(rows, own, strict=True):
        assert (row.text, row.speaker) == (other.text, other.speaker)
        assert row.duration == pytest.approx(other.duration, abs=1e-3)
        clip, expected = load_clip(row, {"audio"}, 0.0).wave, load_clip(other, {"audio"}, 0.0).wave
        assert clip is not None and expected is not None and clip.equal(expected)


def test_a_manifest_is_what_it_is() -> None:
    assert resolve("any/where.jsonl", DataConfig()) == ("any/where.jsonl", False)
    assert resolve("any/where.jsonl", DataConfig(allow_absolute=True)) == ("any/where.jsonl", True)


def test_a_saved_dataset(own: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 2)
    table(own).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert max(len(open_rows(path).batches) for path in (tmp_path / "saved").glob("*.arrow")) > 1
    rows = rows_of(str(tmp_path / "saved"))
    same(rows, own)
    assert [row.id for row in rows] == [str(n) for n in range(7)]
    foreign._made.cache_clear()  # another process: neither clips nor tables are read again
    with monkeypatch.context() as patch:
        patch.setattr(foreign, "arrow_rows", lambda *_: pytest.fail("it is read again"))
        assert [replace(row, where="") for row in rows_of(str(tmp_path / "saved"))] == [
            replace(row, where="") for row in rows
        ]
    foreign._made.cache_clear()
    table(own[::-1]).save_to_disk(str(tmp_path / "saved"), num_shards=2)  # another dataset in its place
    same(rows_of(str(tmp_path / "saved")), own[::-1])


def test_columns_by_other_names(own: list[Utterance], tmp_path: Path) -> None:
    more = {"duration": [row.duration for row in own], "key": [f"k{n}" for n in range(7)], "who": list(range(7))}
    named = table(own, **more).rename_columns({"text": "sentence", "audio": "sound"})
    named.save_to_disk(str(tmp_path / "saved"))
    rows = rows_of(str(tmp_path / "saved"), text="sentence", audio="sound", id="key", speaker="who")
    same([replace(row, speaker=other.speaker) for row, other in zip(rows, own, strict=True)], own)
    assert [(row.id, row.speaker) for row in rows] == [(f"k{n}", str(n)) for n in range(7)]
    for columns, message in (
        ({}, "has no column 'text'; data.columns.text names one of sentence, speaker, sound, duration, key, who"),
        ({"text": "sentence"}, "has no column 'audio'; data.columns.audio names one of"),
        ({"text": "sentence", "audio": "sound", "speaker": "person"}, "has no column 'person'; data.columns.speaker"),
        ({"text": "who", "audio": "sound"}, "the column 'who' is of the type int64, which data.columns.text cannot be"),
        ({"text": "sentence", "audio": "key"}, "the column 'key' is of the type string; expected the bytes of sound"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of(str(tmp_path / "saved"), **columns)


def test_a_dataset_that_is_loaded(own: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    table(own).to_parquet(str(folder / "train.parquet"))
    table(own[:2]).to_parquet(str(folder / "test.parquet"))
    same(rows_of(f"hf:{folder},train"), own)
    same(rows_of(f"hf:{folder},,test"), own[:2])
    same(rows_of(f"hf:{folder},default,train[2:5]"), own[2:5])
    same(rows_of(f"hf:{folder},test+train[:1]"), [*own[:2], own[0]])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf:named holds the splits train, test: name one, hf:named,train"):
        rows_of("hf:named")
    for spec, message in (
        ("hf:named,no", 'hf:named,no cannot be loaded: ValueError: Unknown split "no"'),
        ("hf:named,other,train", "hf:named,other,train cannot be loaded: ValueError: BuilderConfig 'other' not found"),
        ("hf:nobody/nothing", "hf:nobody/nothing cannot be loaded: .*(offline|cannot be accessed|reach)"),
        ("hf:", "expected hf:NAME, hf:NAME,SPLIT or hf:NAME,CONFIG,SPLIT"),
        ("hf:a,b,c,d", "expected hf:NAME, hf:NAME,SPLIT or hf:NAME,CONFIG,SPLIT"),
        ("hf:named,train[:0]", "corresponds to no data"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            rows_of(spec)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is not loaded"):
        resolve("hf:named,train", DataConfig(), load=False)


def test_a_part_that_another_rank_saves_meanwhile(own: list[Utterance], tmp_path: Path) -> None:
    found = table(own[:2])

    class Slow:
        def save_to_disk(self, place: str) -> None:
            found.save_to_disk(place)
            found.save_to_disk(str(tmp_path / "rows"))

    (file,) = foreign._kept(Slow(), tmp_path / "rows")
    assert file.parent == tmp_path / "rows" and len(open_rows(file)) == 2
    assert not list(tmp_path.glob("*.part"))


def test_folders_that_are_no_dataset(own: list[Utterance], tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": table(own), "test": table(own)})
    splits.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"both holds the splits train, test: name one, .*both/train"):
        rows_of(str(tmp_path / "both"))
    same(rows_of(str(tmp_path / "both/test")), own)
    table([]).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="empty holds no row"):
        rows_of(str(tmp_path / "empty"))
    for state in ("", "[]", '{"_data_files": [{}]}', '{"_data_files": 3}', "\udcff"):
        (tmp_path / "empty/state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match="empty is not a dataset as save_to_disk writes it"):
            rows_of(str(tmp_path / "empty"))
    (tmp_path / "empty/state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(UserError, match="old version of datasets"):
        rows_of(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="cannot read the manifest"):
        rows_of(str(tmp_path))
    arrow = next((tmp_path / "both/train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"both/train/.*\.arrow is damaged"):
        rows_of(str(tmp_path / "both/train"))


def shard(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_others(own: list[Utterance], tmp_path: Path) -> None:
    contents = [row.audio.read_bytes() for row in own if row.audio]
    for number in range(2):
        samples: dict[str, bytes] = {}
        for n in range(number, 7, 2):
            fields = {"speaker": own[n].speaker, "said": own[n].text.upper(), "duration": own[n].duration}
            samples |= {f"a/{n}.cls": b"7", f"a/{n}.wav": contents[n], f"a/{n}.txt": f"{own[n].text}\n".encode()}
            samples[f"a/{n}.json"] = json.dumps(fields).encode()
        shard(tmp_path / f"x-{number:03d}.tar", samples)
    expected = own[::2] + own[1::2]
    for pattern in ("x-*.tar", "x-{000..001}.tar", "x-00[01].tar"):
        rows = rows_of(f"wds:{tmp_path}/{pattern}")
        same(rows, expected)
    assert [row.id for row in rows] == ["a/0", "a/2", "a/4", "a/6", "a/1", "a/3", "a/5"]
    assert rows_of(f"wds:{tmp_path}/x-000.tar", text="said")[1].text == own[2].text.upper()


def test_packed_shards_are_tars_of_others(make_corpus: Callable[..., Path], tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "corpus", 4, 0.4, video="beside")
    pack(manifest, tmp_path / "packed", clips=3)
    rows, own = rows_of(f"wds:{tmp_path}/packed/*.tar", id="id"), read_manifest(manifest)
    same(rows, own)
    assert [(row.id, row.duration) for row in rows] == [(row.id, row.duration) for row in own]
    for row, other in zip(rows, own, strict=True):
        clip, expected = load_clip(row, {"video"}, 0.0).mouth, load_clip(other, {"video"}, 0.0).mouth
        assert clip is not None and expected is not None and clip.equal(expected)


def test_tars_that_are_none(own: list[Utterance], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = own[0].audio.read_bytes() if own[0].audio else b""
    shard(tmp_path / "silent.tar", {"a.txt": b"hello", "a.png": b""})
    shard(tmp_path / "mute.tar", {"a.wav": sound, "a.json": b'{"words": "x"}'})
    shard(tmp_path / "torn.tar", {"a.wav": sound, "a.json": b'{"text": '})
    shard(tmp_path / "empty.tar", {})
    shard(tmp_path / "bad.tar", {"a.wav": sound, "a.txt": b"one", "b.wav": b"no sound", "b.txt": b"two"})
    shard(tmp_path / "bae.tar", {"a.wav": sound, "a.txt": b"three"})
    (tmp_path / "x.zip").touch()
    for pattern, message in (
        ("silent.tar", "no sample has a sound or video; the suffixes of the first: that of a are txt, png"),
        ("mute.tar", r"no sample has a text \(KEY.txt, or data.columns.text in KEY.json\)"),
        ("torn.tar", r"torn\.tar/a\.json is not JSON"),
        ("empty.tar", "holds no row"),
        ("none-*.tar", "no file has such a name"),
        ("none-{0..3}.tar", "expected files NAME.tar, and .*none-0.tar is none"),
        ("x.zip", "expected files NAME.tar"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of(f"wds:{tmp_path}/{pattern}")
    path, absolute = resolve(f"wds:{tmp_path}/ba?.tar", DataConfig())
    refused: list[str] = []
    rows = read_manifest(path, absolute=absolute, on_bad=refused.append)
    assert [(row.id, row.text) for row in rows] == [("a", "one"), ("bae/a", "three")]
    assert len(refused) == 1 and "1 clips without a duration cannot be measured, first" in caplog.text


@pytest.mark.slow
def test_many_clips_are_measured_by_processes(
    own: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(own).save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(foreign, "_FEW", 0)
    monkeypatch.setattr(foreign, "_GROUP", 3)
    same(rows_of(str(tmp_path / "saved")), own)


def test_a_cache_that_takes_no_files(own: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(own).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*AVSR_CACHE names the cache"):
        rows_of(str(tmp_path / "saved"))


RANK = """
import json, sys, time
import torch.distributed as dist
from avsr.config import DataConfig
from avsr.data import foreign

rank, folder, write, made = int(sys.argv[1]), sys.argv[2], foreign.write_manifest, []
foreign.write_manifest = lambda *arguments: (time.sleep(1), made.append(rank), write(*arguments))
dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
if rank == 0:  # as for the overlaps of test sets, of which the other ranks know nothing
    foreign.resolve(f"{folder}/other", DataConfig(), alone=True)
paths = [foreign.resolve(f"{folder}/saved", DataConfig())[0] for _ in range(2)]
print(json.dumps([len(made), paths]))
"""


@pytest.mark.integration
def test_the_first_rank_makes_the_manifest(own: list[Utterance], tmp_path: Path) -> None:
    for name in "saved", "other":
        table(own).save_to_disk(str(tmp_path / name))
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in ranks]
    assert [made for made, _ in found] == [2, 0] and found[0][1] == found[1][1]
    assert len(read_manifest(found[0][1][0], absolute=True)) == 7
