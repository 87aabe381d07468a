"""The readers of corpora, each on a small tree in its format."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avsr.errors import UserError
from avsr.tools.corpora.lrs import read_lrs2, read_lrs3
from avsr.tools.corpora.muavic import read_muavic
from avsr.tools.corpora.source import Refusal, Source, is_safe_id
from avsr.tools.corpora.transcripts import Word, clean_text, cut_words, read_transcript
from avsr.tools.corpora.videos import read_videos
from avsr.tools.corpora.voxceleb import read_labels, read_vox2, vox_key


def put(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def script(*words: tuple[str, float, float], text: str = "") -> str:
    spoken = text or " ".join(word for word, _, _ in words)
    table = "".join(f"{word} {start} {end} 5.1\n" for word, start, end in words)
    return f"Text:  {spoken}\nConf:  4\nRef:   x\n\nWORD START END ASDSCORE\n{table}"


def split(found: Iterable[Source | Refusal]) -> tuple[list[Source], list[Refusal]]:
    items = list(found)
    return [i for i in items if isinstance(i, Source)], [i for i in items if isinstance(i, Refusal)]


def failure(action: object, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        list(action(*arguments))  # type: ignore[operator]
    return str(caught.value)


# transcripts


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  IT'S   {LG} A\tTEST ", "it's a test"),
        ("{NS}", ""),
        ("ODD } BRACE {X", "odd brace x"),
        ("ÀÉ 25", "àé 25"),
    ],
)
def test_clean_text(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_transcripts(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", text="Text:  WHEN YOU'RE {LG} COOKING\nConf:  5\n")
    found = read_transcript(tmp_path / "a.txt")
    assert (found.text, found.words) == ("when you're cooking", ())
    put(tmp_path, "b.txt", text="\ufeff" + script(("SO", 0.1, 0.3), ("{NS}", 0.3, 0.4), ("YES", 0.5, 0.75)))
    found = read_transcript(tmp_path / "b.txt")
    assert found.text == "so yes" and found.words == (Word("so", 0.1, 0.3), Word("yes", 0.5, 0.75))
    put(tmp_path, "c.txt", text="Just what\nis SAID: here\n")
    assert read_transcript(tmp_path / "c.txt").text == "just what is said: here"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no word"]),
        ("Text:  {NS}\n", ["no word"]),
        (script(("A", 0.5, 0.4)), [":6", "0.5", "0.4"]),
        (script(("A", -1, 0.4)), [":6", "-1"]),
        (script(("A", 0.5, 0.9), ("B", 0.2, 1.0)), [":7", "'b'"]),
        (script(text="A") + "A 0.1\n", [":6", "'A 0.1'"]),
        (script(text="A") + "A x 0.4 1\n", [":6", "A x"]),
        (script(text="A") + "A nan 0.4 1\n", [":6", "nan"]),
    ],
)
def test_bad_transcripts(tmp_path: Path, text: str, parts: list[str]) -> None:
    put(tmp_path, "a.txt", text=text)
    message = failure(lambda: [read_transcript(tmp_path / "a.txt")])
    for part in [str(tmp_path / "a.txt"), *parts]:
        assert part in message


def test_transcripts_that_cannot_be_read(tmp_path: Path) -> None:
    assert str(tmp_path / "no.txt") in failure(lambda: [read_transcript(tmp_path / "no.txt")])
    (tmp_path / "a.txt").write_bytes(b"Text: \xff\xfe")
    assert "UTF-8" in failure(lambda: [read_transcript(tmp_path / "a.txt")])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 2)), min_size=1, max_size=40), st.floats(2, 8))
def test_cutting_at_words(steps: list[tuple[float, float]], limit: float) -> None:
    words, time = [], 0.0
    for gap, length in steps:
        words.append(Word(str(len(words)), time + gap, time + gap + length))
        time += gap + length
    runs = cut_words(words, limit)
    assert [word for run in runs for word in run] == words  # nothing lost, nothing twice
    lengths = [run[-1].end - run[0].start for run in runs]
    assert all(run for run in runs) and max(lengths) <= limit + 1e-9
    for one, other in zip(runs[:-2], runs[1:-1], strict=False):
        assert other[0].end - one[0].start > limit  # each takes as many as fit
    if len(runs) > 1:  # no better balance of the last two
        both = runs[-2] + runs[-1]
        best = min(max(both[i - 1].end - both[0].start, both[-1].end - both[i].start) for i in range(1, len(both)))
        assert max(lengths[-2:]) == pytest.approx(best)


def test_ids() -> None:
    for good in ("a", "a/b", "a b/ü.1"):
        assert is_safe_id(good)
    for bad in ("", "/a", "../a", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\nb"):
        assert not is_safe_id(bad)


# LRS3


@pytest.fixture
def lrs3(tmp_path: Path) -> Path:
    root = tmp_path / "lrs3"
    for speaker in range(8):
        for clip in range(5):
            put(root, f"trainval/S{speaker}/{clip:05d}.mp4")
            put(root, f"trainval/S{speaker}/{clip:05d}.txt", text=f"Text:  THIS IS {clip}\nConf:  3\n")
        put(root, f"pretrain/S{speaker}/00001.mp4")
        put(root, f"pretrain/S{speaker}/00001.txt", text=script(("ALL", 0.2, 0.5), ("SHORT", 0.6, 3.9)))
    put(root, "test/T0/00001.mp4")
    put(root, "test/T0/00001.txt", text="Text:  THE {NS} TEST\n")
    return root


def test_lrs3(lrs3: Path) -> None:
    long = script(("ONE", 0.5, 1.0), ("TWO", 2.0, 4.0), ("THREE", 4.5, 6.0), ("FOUR", 8.0, 8.5), ("FIVE", 9.0, 9.2))
    put(lrs3, "pretrain/S1/00001.txt", text=long)
    sources, refused = split(read_lrs3(lrs3, 6.0, validation=2))
    assert not refused and len(sources) == 8 * 5 + 8 + 1
    by_id = {source.id: source for source in sources}
    held = {source.speaker for source in sources if "validation" in source.manifests}
    assert len(held) == 1
    for source in sources:
        kind, speaker, _ = source.id.split("/")
        assert source.speaker == speaker and source.video == lrs3 / f"{source.id}.mp4"
        expected = {
            "test": ("test",),
            "trainval": ("validation",) if speaker in held else ("train", "trainval"),
            "pretrain": ("pretrain",) if speaker in held else ("train", "pretrain"),
        }[kind]
        assert source.manifests == expected
    (whole,) = by_id["test/T0/00001"].pieces
    assert (whole.id, whole.text, whole.start, whole.end) == ("test/T0/00001", "the test", 0.0, None)
    (short,) = by_id["pretrain/S2/00001"].pieces
    assert (short.id, short.start, short.end, short.last_word) == ("pretrain/S2/00001_00", 0.0, 6.0, 3.9)
    cut = [(p.id[-3:], p.text, p.start, p.end) for p in by_id["pretrain/S1/00001"].pieces]
    # as many words as fit are one two three, but so the two clips are nearer in length
    assert cut == [("_00", "one two", 0.5, 4.0), ("_01", "three four five", 4.5, 9.2)]


def test_lrs3_validation(lrs3: Path, tmp_path: Path) -> None:
    def held(**options: object) -> list[str]:
        sources, _ = split(read_lrs3(lrs3, 16.0, **options))  # type: ignore[arg-type]
        return [source.id for source in sources if "validation" in source.manifests]

    assert held() == held() and len(held()) == 5  # at most 5% of 40, but a whole speaker
    assert held(validation=0) == []
    put(tmp_path, "valid.id", text="trainval/S3/00002\n\ntrainval/S4/00000.mp4\n")
    assert held(validation_ids=tmp_path / "valid.id") == ["trainval/S3/00002", "trainval/S4/00000"]
    assert "no.id" in failure(lambda: read_lrs3(lrs3, 16.0, validation_ids=tmp_path / "no.id"))


def test_bad_lrs3(lrs3: Path, tmp_path: Path) -> None:
    (lrs3 / "trainval/S0/00000.txt").unlink()
    put(lrs3, "pretrain/S1/00001.txt", text="Text:  NO TIMES\n")
    put(lrs3, "pretrain/S2/00001.txt", text=script(("A", 0, 1), ("WOOO", 2, 30), ("B", 31, 32)))
    sources, refused = split(read_lrs3(lrs3, 16.0))
    reasons = {refusal.id: refusal for refusal in refused}
    assert set(reasons) == {"trainval/S0/00000", "pretrain/S1/00001", "pretrain/S2/00001_01"}
    assert all(refusal.kind == "text" for refusal in refused)
    assert "word times" in reasons["pretrain/S1/00001"].reason and "'wooo'" in reasons["pretrain/S2/00001_01"].reason
    (cut,) = [source for source in sources if source.id == "pretrain/S2/00001"]
    assert [piece.id[-3:] for piece in cut.pieces] == ["_00", "_02"]
    (tmp_path / "empty").mkdir()
    assert "not LRS3" in failure(read_lrs3, tmp_path / "empty", 16.0)


# LRS2


@pytest.mark.parametrize("inside", [True, False])
def test_lrs2(tmp_path: Path, inside: bool) -> None:
    data = tmp_path / "mvlrs_v1"
    for name in ("main/5535/00001", "main/5535/00002", "main/6330/00011", "main/9/1", "pretrain/77/00004"):
        put(data, f"{name}.mp4")
        put(data, f"{name}.txt", text=script(("HI", 0, 1), ("YOU", 18, 19)) if "pre" in name else "Text:  HI\n")
    lists = data if inside else tmp_path
    put(lists, "train.txt", text="5535/00001\n5535/00002\n../x\n5535/00009\n")
    put(lists, "val.txt", text="9/1\n")
    put(lists, "test.txt", text="6330/00011 NF\n")
    put(lists, "pretrain.txt", text="77/00004\n")
    sources, refused = split(read_lrs2(data if inside else tmp_path, 16.0))
    assert {source.id: source.manifests for source in sources} == {
        "main/5535/00001": ("train", "main"),
        "main/5535/00002": ("train", "main"),
        "main/9/1": ("validation",),
        "main/6330/00011": ("test",),
        "pretrain/77/00004": ("train", "pretrain"),
    }
    assert [len(source.pieces) for source in sources] == [1, 1, 1, 1, 2]
    assert [(r.id, r.kind) for r in refused] == [("../x", "list"), ("main/5535/00009", "text")]
    (lists / "val.txt").unlink()
    _, refused = split(read_lrs2(tmp_path, 16.0))
    assert any(r.id == "val" and "val.txt is missing" in r.reason for r in refused)


def test_no_lrs2(tmp_path: Path) -> None:
    assert "not LRS2" in failure(read_lrs2, tmp_path, 16.0)
    (tmp_path / "main").mkdir()
    assert "lists" in failure(read_lrs2, tmp_path, 16.0)


# VoxCeleb2


@pytest.mark.parametrize("line", ["dev/mp4/id2/v/1.mp4", "id2/v/1", "dev/id2/v/1", " id2/v/1\r"])
def test_vox2(tmp_path: Path, line: str) -> None:
    put(tmp_path, "dev/mp4/id1/v/1.mp4", "dev/mp4/id2/v/1.mp4", "test/mp4/id3/w/2.mp4")
    (tmp_path / "vox-en.id").write_text(f"{line}\ntest/mp4/id3/w/2\nid9/x/y\n")
    sources, refused = split(read_vox2(tmp_path, 16.0, tmp_path / "vox-en.id"))
    assert not refused
    assert [(s.id, s.speaker, s.manifests, s.window) for s in sources] == [
        ("dev/mp4/id2/v/1", "id2", ("train",), 16.0),
        ("test/mp4/id3/w/2", "id3", ("test",), 16.0),
    ]
    assert sources[0].audio == (tmp_path / "dev/wav/id2/v/1.wav", tmp_path / "dev/aac/id2/v/1.m4a")
    (tmp_path / "en.gz").write_bytes(gzip.compress(b"id1/v/1\n"))
    assert [s.speaker for s in split(read_vox2(tmp_path, 16.0, tmp_path / "en.gz"))[0]] == ["id1"]
    assert len(split(read_vox2(tmp_path, 16.0, None))[0]) == 3


def test_bad_vox2(tmp_path: Path) -> None:
    assert "not VoxCeleb2" in failure(read_vox2, tmp_path, 16.0, None)
    put(tmp_path, "dev/mp4/id1/v/1.mp4")
    put(tmp_path, "en", text="id2/v/1\n")
    assert "none of the 1" in failure(read_vox2, tmp_path, 16.0, tmp_path / "en")
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    assert "x.gz" in failure(read_vox2, tmp_path, 16.0, tmp_path / "x.gz")


def test_vox_labels(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.csv",
        text="vox2,vox2_video_seg16s/dev/mp4/id1/v/00001_00.mp4,75,1 2,Well, {x} YES\nvox2,id1/v/2.mp4,9,,b\n"
        'vox2, id1/v/3.mp4 ,9,1,"So, ""YES"" then"\n',
    )
    assert read_labels(tmp_path / "a.csv") == {
        "id1/v/00001_00": "well, yes",
        "id1/v/2": "b",
        "id1/v/3": 'so, "yes" then',
    }
    put(tmp_path, "b.jsonl", text=json.dumps({"id": "dev/mp4/id1/v/1_01", "text": "Hi\nyou"}) + "\n")
    assert read_labels(tmp_path / "b.jsonl") == {"id1/v/1_01": "hi you"}
    put(tmp_path, "c.tsv", text="id1/v/1_00\tone two\nid1/v/1_01\t \n")
    assert read_labels(tmp_path / "c.tsv") == {"id1/v/1_00": "one two"}
    assert vox_key("id1/a.b/1") == "id1/a.b/1"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "a,b,c"),
        ("a.csv", "a,b,3,1"),
        ("a.csv", "a,b,many,1,text"),
        ("a.jsonl", "{"),
        ("a.jsonl", '{"id": 1, "text": "a"}'),
        ("a.jsonl", "[]"),
        ("a.tsv", "no tab"),
    ],
)
def test_bad_vox_labels(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, name, text=f"{text}\n")
    assert f"{name}:1: " in failure(lambda: read_labels(tmp_path / name))


# MuAViC


def test_muavic(tmp_path: Path) -> None:
    folder = tmp_path / "muavic" / "es"
    put(folder, "video/train/A/A_1.mp4", "audio/train/A/A_1.wav")
    rows = f"A/A_1\t{folder}/video/train/A/A_1.mp4\t{folder}/audio/train/A/A_1.wav\t75\t48000\n"
    put(
        folder,
        "train.tsv",
        text="/\n" + rows + "../B\tx\ty\t-1\t-1\nC/2\tvideo/c.mp4\taudio/c.wav\t1\t640\nD/1\tx\ty\t1\t1\n",
    )
    put(folder, "train.es", text="¿Hola, {x} AMIGO?\nb\nc\n\n")
    put(folder, "valid.tsv", text=f"{folder}\nA/A_1\tvideo/train/A/A_1.mp4\taudio/train/A/A_1.wav\t75\t48000\n")
    put(folder, "valid.wrd", text="SI\n")
    for root in (tmp_path / "muavic", folder):
        sources, refused = split(read_muavic(root, "es"))
        assert [(s.id, s.speaker, s.manifests, s.cropped) for s in sources] == [
            ("train/A/A_1", "A", ("train",), True),
            ("train/C/2", "C", ("train",), True),
            ("valid/A/A_1", "A", ("validation",), True),
        ]
        assert sources[0].video == sources[2].video == folder / "video/train/A/A_1.mp4"
        assert sources[2].audio == (folder / "audio/train/A/A_1.wav",)
        assert sources[1].video == folder / "video/c.mp4"  # below the tsv's folder, as the root has no such file
        assert sources[0].pieces[0].text == "¿hola, amigo?"
        assert [(r.id, r.kind) for r in refused] == [("../B", "list"), ("train/D/1", "text")]


def test_bad_muavic(tmp_path: Path) -> None:
    assert "en/train.tsv" in failure(read_muavic, tmp_path)
    put(tmp_path, "train.tsv", text="")
    assert "empty" in failure(read_muavic, tmp_path)
    put(tmp_path, "train.tsv", text="/\na\tb\tc\t1\n")
    assert "train.wrd" in failure(read_muavic, tmp_path)
    put(tmp_path, "train.en", text="one\ntwo\n")
    assert "2 lines" in failure(read_muavic, tmp_path)
    put(tmp_path, "train.en", text="one\n")
    assert "train.tsv:2" in failure(read_muavic, tmp_path) and "got 4" in failure(read_muavic, tmp_path)


# a folder of videos


def test_videos(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4", "me/b.MOV", "me/c.mkv", "me/d.webm", "me/notes.pdf", "out/clips/x.mp4")
    put(tmp_path, "a.txt", text="Hello there")
    put(tmp_path, "me/b.txt", text=script(("ONE", 0.5, 1.0), ("TWO", 17, 18)))
    put(tmp_path, "me/c.txt", text=" ")
    sources, refused = split(read_videos(tmp_path, 16.0, tmp_path / "out"))
    assert [(s.id, s.speaker, s.window, len(s.pieces)) for s in sources] == [
        ("a", "", None, 1),
        ("me/b", "me", None, 2),
        ("me/d", "me", 16.0, 0),
    ]
    assert sources[0].pieces[0].limit == 16.0 and all(s.manifests == ("all",) for s in sources)
    assert [(r.id, r.kind) for r in refused] == [("me/c", "text")]
    (tmp_path / "none").mkdir()
    assert "no video" in failure(read_videos, tmp_path / "none", 16.0)
