"""Files of Windows begin with a byte order mark, which must not cost the first line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from avsr.data.manifest import Utterance, read_manifest
from avsr.evaluation.act import _read
from avsr.tools.analysis.inputs import read_texts
from avsr.tools.corpora.lrs import read_list
from avsr.tools.corpora.muavic import read_muavic
from avsr.tools.corpora.transcripts import read_transcript
from avsr.tools.corpora.voxceleb import read_labels
from avsr.tools.lipreader.timed import _read_times

MARK = b"\xef\xbb\xbf"
ROW = {"id": "a1", "audio": "a1.wav", "text": "hello", "duration": 1.5}
TIMES = {"words": [["hi", 0.0, 0.5]], "phonemes": [["h", 0.0, 0.5]]}


def heads(path: Path) -> Any:
    model: Any = SimpleNamespace(
        decoder=SimpleNamespace(model=SimpleNamespace(layers=[0, 1]), config=SimpleNamespace(num_attention_heads=4))
    )
    act = SimpleNamespace(heads=str(path), beta=0.4, threshold=0.1)
    return _read(SimpleNamespace(run="r", act=act), model)  # type: ignore[arg-type]


def parallel_text(path: Path) -> Any:
    labels = path.parent / "labels" / "x.csv"
    labels.parent.mkdir(exist_ok=True)
    labels.write_text("lrs3,lrs3_video_seg16s/a.mp4,75,1 2\n")
    text = path.parent / "lrs3" / "lrs3_text_seg16s" / "a.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_bytes(path.read_bytes())
    return read_manifest(labels)


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("m.jsonl", json.dumps(ROW), read_manifest),
        ("m.csv", "lrs3,a.mp4,75,1 2,hello", read_manifest),
        ("x.txt", "HELLO", parallel_text),
        ("heads.json", '{"heads": [[0, 1]], "layers": 2, "heads_per_layer": 4, "beta": 0.4, "threshold": 0.1}', heads),
        ("t.txt", "first\nsecond", lambda path: read_texts(str(path), None)),
        ("list.txt", "s1/00001 MV\ns2/00002", read_list),
        ("train.tsv", "/\ns1/a\tv/a.mp4\ta/a.wav\t75\t48000", lambda path: list(read_muavic(path.parent))),
        ("l.jsonl", json.dumps({"id": "dev/id1/v/00001", "text": "hello"}), read_labels),
        ("l.txt", "id1/v/00001\thello", read_labels),
        ("t.txt", "Text:  SO IT IS\n", read_transcript),
        ("times.json", json.dumps(TIMES), lambda path: _read_times(path, Utterance("a", None, "hi", 1.5))),
    ],
)
def test_a_mark_changes_nothing(tmp_path: Path, name: str, content: str, read: Callable[[Path], Any]) -> None:
    path = tmp_path / name
    (tmp_path / "train.en").write_bytes(b"hello\n")
    path.write_text(content)
    plain = read(path)
    assert plain
    path.write_bytes(MARK + content.encode())
    if name == "train.tsv":
        (tmp_path / "train.en").write_bytes(MARK + b"hello\n")
    assert read(path) == plain
