"""Manifests, lists, labels, configs and JSON files with anything in them: read, or refused with a message."""

from __future__ import annotations

import gzip
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from avsr.config import load_config, to_yaml
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError
from avsr.evaluation.act import _read
from avsr.runtime import folders
from avsr.tools.analyze import _scores
from avsr.tools.corpora import voxceleb
from avsr.tools.corpora.lrs import read_list
from avsr.tools.corpora.muavic import read_muavic
from avsr.tools.corpora.prepare.journal import FORMAT, Journal
from avsr.tools.corpora.synth import corpus
from avsr.tools.corpora.synth.options import SynthOptions
from avsr.tools.corpora.transcripts import read_transcript
from avsr.tools.corpora.voxceleb import read_labels
from avsr.tools.lipreader.timed import _read_times
from avsr.training.engine import deepspeed_config
from avsr.training.metrics import DRAWN, read_metrics
from avsr.training.resume import FRAMES, read_frames

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)

ROW = {"id": "a1", "audio": "a1.wav", "video": "a1.mp4", "times": "a1.json", "text": "hello", "duration": 1.5}
LABELS = (
    "lrs3,lrs3_video_seg16s/s1/a.mp4,75,12 5 8,hello there\n"
    'lrs3,lrs3_video_seg16s/s2/b.mp4,50,4 1,"so, it is"\n'
    "lrs3,lrs3_video_seg16s/s2/c.mp4,50,4\n"
)
RECIPE = """
run: runs/x
model:
  task: audio
  audio:
    encoder: {name: openai/whisper-tiny, batch: 4}
  llm: {name: "a/b"}
  lora: {rank: 4, targets: [q_proj]}
data: {train: a.jsonl, validation: b.jsonl, test: {one: c.jsonl}}
training: {steps: 5, betas: [0.9, 0.98], precision: fp32}
noise: {snr: [0, .inf]}
"""
HOSTILE_YAML = [
    "&a [*a]",
    "!!int abc",
    "!!timestamp abc",
    "!!bool abc",
    "!!python/object/apply:os.system [touch x]",
    "0b" + "1" * 60_000,
    "9" * 5_000,
    "1:2:3",
    "2020-01-01",
    "[" * 5_000,
    "{a: " * 5_000,
    '"\\ud800"',
    '"\\0"',
    "${training}",
    "${a.b}",
    "${",
    "${oc.env:HOME}",
    "???",
    "!!binary aGk=",
    "? [1, 2] : 3",
    "- 1",
    "~",
    ".nan",
    "https://me:secret@host/x",
    "a" * 5_000,
    "../../x",
    "\t",
    "1e400",
    "-1",
]


def write_and(path: Path, read: Callable[[], Any]) -> Callable[[bytes], None]:
    path.parent.mkdir(parents=True, exist_ok=True)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return check


@few_and_many
def test_manifests(count: int, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"

    def read() -> None:
        for row in read_manifest(path):
            for file in (row.audio, row.video, row.times):
                assert file is None or file.is_relative_to(tmp_path)

    tools.fuzz(
        count, tools.lines_of(ROW, {**ROW, "id": "a2", "video": None}), write_and(path, read), tools.each_changed(ROW)
    )


@few_and_many
def test_label_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / "labels" / "m.csv"
    fields = [*tools.TEXTS, "²", "٣", "9" * 400, "9" * 5_000, '"', "0", "-1", "nan", "lrs3", "75", "4 1"]
    lines = st.lists(st.lists(st.sampled_from(fields), max_size=7).map(",".join), min_size=1, max_size=3).map("\n".join)
    good = LABELS.splitlines()[0].split(",")
    each = [",".join([*good[:i], field, *good[i + 1 :]]).encode() for i in range(5) for field in fields]
    cases = st.one_of(tools.damaged(LABELS.encode()), lines.map(str.encode))

    def read() -> None:
        for row in read_manifest(path):
            assert row.video is not None and row.video.is_relative_to(tmp_path) and row.duration < 1e8

    tools.fuzz(count, cases, write_and(path, read), each)


@few_and_many
def test_corpus_files(count: int, tmp_path: Path) -> None:
    text = b"Text:  SO THIS IS IT\nConf:  5\n\nWORD START END ASDSCORE\nSO 0.11 0.30 2.1\nTHIS 0.30 0.50 3\n"
    tools.fuzz(count, tools.damaged(text), write_and(tmp_path / "t.txt", lambda: read_transcript(tmp_path / "t.txt")))
    tools.fuzz(
        count, tools.damaged(b"s1/00001 MV\ns2/00002\n"), write_and(tmp_path / "l", lambda: read_list(tmp_path / "l"))
    )
    tsv = b"/data\ntrain/s1/a\tvideo/a.mp4\taudio/a.wav\t75\t48000\ns2/b\tb.mp4\tb.wav\t50\t-1\n"
    (tmp_path / "train.en").write_text("hello\nthere\n")
    edits = st.one_of(
        tools.damaged(tsv), st.sampled_from(tools.TEXTS).map(lambda text: tsv.replace(b"video/a.mp4", text.encode()))
    )
    tools.fuzz(count, edits, write_and(tmp_path / "train.tsv", lambda: list(read_muavic(tmp_path))))


@few_and_many
def test_labels_of_voxceleb(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxceleb, "_MOST_BYTES", 2**24)
    path = tmp_path / "l.jsonl"
    rows = tools.lines_of({"id": "dev/id1/v/00001", "text": "hello"})
    each = tools.each_changed({"id": "dev/id1/v/00001", "text": "hello"})
    tools.fuzz(count, rows, write_and(path, lambda: read_labels(path)), each)
    packed = tmp_path / "l.gz"
    whole, bomb = gzip.compress(b"id1/v/00001\thello\n" * 9), gzip.compress(b"\0" * 2**29, 1)
    flips = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    tools.fuzz(count, tools.damaged(whole, 24), write_and(packed, lambda: read_labels(packed)), [bomb, *flips])
    plain = tmp_path / "l.csv"
    tools.fuzz(count, tools.damaged(LABELS.encode()), write_and(plain, lambda: read_labels(plain)))


@few_and_many
def test_configs(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = [line.partition(":")[2].strip() for line in RECIPE.splitlines() if ":" in line and line.strip()[-1] != ":"]
    words = sorted({word for word in RECIPE.replace(":", " ").split() if len(word) > 3})
    swap = st.tuples(st.sampled_from([*values, *words]), st.sampled_from(HOSTILE_YAML))
    swapped = st.lists(swap, min_size=1, max_size=2).map(_swapped)
    cases = st.one_of(tools.damaged(RECIPE.encode(), 600), swapped.map(str.encode))
    each = [
        _swapped([(old, new)]).encode() for new in HOSTILE_YAML for old in ("runs/x", "4, t", "{steps: 5,", "0, .inf")
    ]
    tools.fuzz(count, cases, write_and(path, lambda: to_yaml(load_config(str(path))).encode()), each)


def _swapped(swaps: list[tuple[str, str]]) -> str:
    text = RECIPE
    for old, new in swaps:
        text = text.replace(old, new, 1)
    return text


@few_and_many
def test_overrides(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    keys = [
        "training.steps",
        "run",
        "data.test.x",
        "model",
        "model.lora.targets",
        "training.betas[0]",
        "a",
        "",
        ".",
        "[",
    ]
    keys += [
        "run.a" + ".a" * 2_000,
        "run" + "[0]" * 2_000,
        "training.",
        "..",
        "defaults",
        "data.test",
        "noise.snr",
        "\0",
    ]
    text = st.one_of(st.sampled_from([*HOSTILE_YAML, *tools.TEXTS, "\udcff"]), st.text(max_size=8))
    cases = st.lists(st.tuples(st.sampled_from(keys), text).map("=".join), min_size=1, max_size=3)
    each = [[f"{key}={value}"] for key in ("run", "training.steps", "data.test.x") for value in HOSTILE_YAML]
    each += [[f"{key}=1"] for key in keys] + [["run=\udcff"]]
    tools.fuzz(count, cases, lambda overrides: to_yaml(load_config(str(path), overrides)).encode(), each)
    tools.fuzz(count, text, lambda name: load_config(name), tools.TEXTS[:-1])


@few_and_many
def test_files_of_a_run(count: int, tmp_path: Path) -> None:
    row = {"step": 2, "ce": 2.0, "validation_ce": 2.0, "grad_norm": 1.0, "decorrelation": None}

    def draw() -> None:
        for row in read_metrics(tmp_path):
            assert all(math.log1p(abs(row.get(key) or 0)) >= 0 or row[key] != row[key] for key in DRAWN)

    curve = tools.lines_of({"step": 1, "ce": 2.5, "lr": 0.1}, row)
    tools.fuzz(count, curve, write_and(tmp_path / "metrics.jsonl", draw), tools.each_changed(row))
    scores = {"sentences": {"wer": 0.5, "by_speaker": {}}, "decoding": {"beams": 1}}
    show = write_and(tmp_path / "metrics.json", lambda: [f"{s['wer']:.3f}" for s in _scores(tmp_path).values()])
    tools.fuzz(count, tools.json_file(scores), show, tools.each_changed(scores))
    model = SimpleNamespace(
        decoder=SimpleNamespace(model=SimpleNamespace(layers=[0, 1]), config=SimpleNamespace(num_attention_heads=4))
    )
    config: Any = SimpleNamespace(run=str(tmp_path), act=SimpleNamespace(heads=None, beta=0.4, threshold=0.1))
    heads = {"heads": [[0, 1], [1, 3]], "layers": 2, "heads_per_layer": 4, "beta": 0.4, "threshold": 0.1}
    read = write_and(tmp_path / "act_heads.json", lambda: _read(config, model))  # type: ignore[arg-type]
    tools.fuzz(count, tools.json_file(heads), read, tools.each_changed(heads))


@few_and_many
def test_checksums(count: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    folders.seal(tmp_path)
    whole = (tmp_path / folders.SUMS).read_bytes()
    names = [whole[:66] + text.encode() + b"\n" for text in tools.TEXTS]

    def read() -> None:
        name = str(tmp_path / "a")
        assert folders.damage(tmp_path) or (tmp_path / folders.SUMS).read_bytes()[:64] == whole[:64], name
        folders.damage(tmp_path, "a")

    tools.fuzz(count, tools.damaged(whole), write_and(tmp_path / folders.SUMS, read), names)


@few_and_many
def test_other_json_files(count: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    own = tmp_path / "ds.json"
    config = load_config(str(recipe), [f"deepspeed.config={own}"])
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "train_batch_size": "auto", "steps": 3}
    read = write_and(own, lambda: deepspeed_config(config))
    tools.fuzz(count, tools.json_file(settings), read, tools.each_changed(settings))
    times = tmp_path / "t.json"
    row = Utterance("a", None, "hi", 1.0, times=times)
    spans = {"words": [["hi", 0.1, 0.4]], "phonemes": [["h", 0.1, 0.2], ["aI", 0.2, 0.4]]}
    read = write_and(times, lambda: _read_times(times, row))
    tools.fuzz(count, tools.json_file(spans), read, tools.each_changed(spans))
    frames = {"train": {"a": 30, "b": 1}, "validation": {"c": 0}}
    read = write_and(tmp_path / FRAMES, lambda: [sum(part.values()) for part in read_frames(tmp_path).values()])
    tools.fuzz(count, tools.json_file(frames), read, tools.each_changed(frames))
    state = {"format": corpus.FORMAT, "options": {"grid": 1}, "utterances": {"grid/train.jsonl": 3}}
    read = write_and(tmp_path / "synth" / "corpus.json", lambda: corpus.synthesise(tmp_path / "synth", SynthOptions()))
    tools.fuzz(count, tools.json_file(state), read, tools.each_changed(state))


@few_and_many
def test_the_journal_of_prepare(count: int, tmp_path: Path) -> None:
    clip = {"id": "s1/a_00", "start": 0, "end": 30, "sha256": "0" * 64}
    refusal = {"id": "s1/b", "file": "b.mp4", "kind": "text", "reason": "none"}
    line = {"source": "s1/a", "asked": "[]", "tried": "[]", "made": [clip], "refused": [refusal]}
    out = tmp_path / "out"
    Journal(out, {"corpus": "videos"}).__exit__()

    def read() -> None:
        with Journal(out, {"corpus": "videos"}) as journal:
            for name in ("s1/a", "../x"):
                for found in journal.entry(name).made:
                    assert (out / found.video).resolve().is_relative_to(out) and found.end - found.start < 2**4000
                json.dumps([vars(found) for found in journal.entry(name).refused])

    tools.fuzz(count, tools.lines_of(line, line), write_and(out / "progress.jsonl", read), tools.each_changed(line))
    (out / "progress.jsonl").unlink()
    state = {"format": FORMAT, "corpus": "videos"}
    again = write_and(out / "prepare.json", lambda: Journal(out, {"corpus": "videos"}).__exit__())
    tools.fuzz(count, tools.json_file(state), again, tools.each_changed(state))


def test_names_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    names = "abcdefghij"
    laughs = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip(names, names[1:], strict=False))
    (tmp_path / "r.yaml").write_text(f"a: &a [lol]\n{laughs}")
    with tools.bounded(), pytest.raises(UserError, match="expansion"):
        load_config(str(tmp_path / "r.yaml"))
