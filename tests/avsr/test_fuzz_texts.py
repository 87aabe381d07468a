"""Manifests, lists, labels, configs and JSON files with anything in them: read, or refused with a message."""

from __future__ import annotations

import gzip
import json
import math
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from avsr.config import LoraConfig, load_config
from avsr.config.composing import compose
from avsr.data.manifest import Utterance, read_manifest
from avsr.errors import UserError
from avsr.evaluation.act import _read
from avsr.evaluation.results import refuse_other, row_key
from avsr.runtime import folders
from avsr.runtime.rows import Rows
from avsr.tools.analyze import _scores
from avsr.tools.corpora import voxceleb
from avsr.tools.corpora.lrs import read_list
from avsr.tools.corpora.muavic import read_muavic
from avsr.tools.corpora.prepare.journal import FORMAT, Journal
from avsr.tools.corpora.synth import corpus, shards
from avsr.tools.corpora.synth.options import SynthOptions
from avsr.tools.corpora.transcripts import read_transcript
from avsr.tools.corpora.voxceleb import read_labels
from avsr.tools.lipreader.timed import _read_times
from avsr.training.deepspeed_json import deepspeed_config
from avsr.training.frames import FRAMES, read_frames
from avsr.training.metrics import DRAWN, read_metrics

pytestmark = pytest.mark.integration

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


@dataclass
class Small:
    """A key of every type, for composing many times; with all keys of a training it takes ten times as long."""

    run: str = MISSING
    resume: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    test: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    cache: str | None = None
    steps: int = 1


SMALL = """
run: runs/x
resume: true
lora: {rank: 4, alpha: 8.0, targets: [q_proj]}
test: {one: c.jsonl}
tasks: {audio: 0.5}
cache: null
steps: 5
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


TYPED = ["0", "-1", "[1]", "1:2:3", "2020-01-01", ".nan", "[.nan]", "[-1e400]", "a/b", "${run}"]  # each fits some type


@few_and_many
def test_manifests(count: int, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"

    def read() -> None:
        for row in read_manifest(path):
            for file in (row.audio, row.video, row.times):
                assert file is None or file.is_relative_to(tmp_path)

    rows = tools.lines_of(ROW, {**ROW, "id": "a2", "video": None})
    tools.fuzz_file(count, path, rows, read, tools.each_changed(ROW))


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

    tools.fuzz_file(count, path, cases, read, each)


@few_and_many
def test_corpus_files(count: int, tmp_path: Path) -> None:
    text = b"Text:  SO THIS IS IT\nConf:  5\n\nWORD START END ASDSCORE\nSO 0.11 0.30 2.1\nTHIS 0.30 0.50 3\n"
    path = tmp_path / "t.txt"
    tools.fuzz_file(count, path, tools.damaged(text), lambda: read_transcript(path))
    tools.fuzz_file(count, path, tools.damaged(b"s1/00001 MV\ns2/00002\n"), lambda: read_list(path))
    tsv = b"/data\ntrain/s1/a\tvideo/a.mp4\taudio/a.wav\t75\t48000\ns2/b\tb.mp4\tb.wav\t50\t-1\n"
    (tmp_path / "train.en").write_text("hello\nthere\n")
    edits = st.one_of(
        tools.damaged(tsv), st.sampled_from(tools.TEXTS).map(lambda text: tsv.replace(b"video/a.mp4", text.encode()))
    )
    tools.fuzz_file(count, tmp_path / "train.tsv", edits, lambda: list(read_muavic(tmp_path)))


@few_and_many
def test_labels_of_voxceleb(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxceleb, "_MOST_BYTES", 2**24)
    path = tmp_path / "l.jsonl"
    rows = tools.lines_of({"id": "dev/id1/v/00001", "text": "hello"})
    each = tools.each_changed({"id": "dev/id1/v/00001", "text": "hello"})
    tools.fuzz_file(count, path, rows, lambda: read_labels(path), each)
    packed = tmp_path / "l.gz"
    whole, bomb = gzip.compress(b"id1/v/00001\thello\n" * 9), gzip.compress(bytes(2**20)) * 2**9
    flips = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    tools.fuzz_file(count, packed, tools.damaged(whole, 24), lambda: read_labels(packed), [bomb, *flips])
    plain = tmp_path / "l.csv"
    tools.fuzz_file(count, plain, tools.damaged(LABELS.encode()), lambda: read_labels(plain))


def written(config: Any) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.structured(config)).encode()


def small(path: Path, overrides: list[str]) -> bytes:
    config = compose(str(path), overrides, Small)
    if not all(isinstance(value, str) for value in config.test.values()):
        raise UserError("OmegaConf lets lists pass, load_config does not")
    return written(config)


@few_and_many
def test_configs(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = [line.partition(":")[2].strip() for line in SMALL.splitlines() if ":" in line]
    words = sorted({word for word in SMALL.replace(":", " ").split() if len(word) > 3})
    swap = st.tuples(st.sampled_from([*values, *words]), st.sampled_from(HOSTILE_YAML))
    swapped = st.lists(swap, min_size=1, max_size=2).map(lambda swaps: _swapped(SMALL, swaps))
    cases = st.one_of(tools.damaged(SMALL.encode(), 300), swapped)
    places = ("runs/x", "4,", "{one: c.jsonl}", "[q_proj]", "null")
    each = [_swapped(SMALL, [(old, new)]) for new in HOSTILE_YAML for old in places]
    tools.fuzz_file(count, path, cases, lambda: small(path, []), each)
    each = [_swapped(RECIPE, [("5", value)]) for value in TYPED]
    tools.fuzz_file(
        count // 4, path, tools.damaged(RECIPE.encode(), 600), lambda: written(load_config(str(path))), each
    )


def _swapped(text: str, swaps: list[tuple[str, str]]) -> bytes:
    for old, new in swaps:
        text = text.replace(old, new, 1)
    return text.encode()


@few_and_many
def test_overrides(count: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALL)
    keys = ["steps", "run", "test.x", "lora", "lora.targets", "lora.targets[0]", "a", "", ".", "[", "run.", "..", "\0"]
    keys += ["run.a" + ".a" * 2_000, "run" + "[0]" * 2_000, "defaults", "test", "tasks"]
    text = st.one_of(st.sampled_from([*HOSTILE_YAML, *tools.TEXTS, "\udcff"]), st.text(max_size=8))
    cases = st.lists(st.tuples(st.sampled_from(keys), text).map("=".join), min_size=1, max_size=3)
    each = [[f"{key}={value}"] for key in ("run", "steps", "test.x") for value in HOSTILE_YAML]
    each += [[f"{key}=1"] for key in keys] + [["run=\udcff"]]
    tools.fuzz(count, cases, lambda overrides: small(path, overrides), each)
    tools.fuzz(count, text, lambda name: load_config(name), tools.TEXTS[:-1])
    path.write_text(RECIPE)
    every = [[f"{key}={value}"] for key in ("run", "training.steps", "noise.snr", "data.test.x") for value in TYPED]
    tools.fuzz(1, st.just([]), lambda overrides: written(load_config(str(path), overrides)), every)


@few_and_many
def test_files_of_a_run(count: int, tmp_path: Path) -> None:
    row = {"step": 2, "ce": 2.0, "validation_ce": 2.0, "grad_norm": 1.0, "decorrelation": None}

    def draw() -> None:
        for row in read_metrics(tmp_path):
            assert all(math.log1p(abs(row.get(key) or 0)) >= 0 or row[key] != row[key] for key in DRAWN)

    curve = tools.lines_of({"step": 1, "ce": 2.5, "lr": 0.1}, row)
    tools.fuzz_file(count, tmp_path / "metrics.jsonl", curve, draw, tools.each_changed(row))
    scores = {"sentences": {"wer": 0.5, "by_speaker": {}}, "decoding": {"beams": 1}}
    tools.fuzz_json(
        count, tmp_path / "metrics.json", scores, lambda: [f"{s['wer']:.3f}" for s in _scores(tmp_path).values()]
    )
    model: Any = SimpleNamespace(
        decoder=SimpleNamespace(model=SimpleNamespace(layers=[0, 1]), config=SimpleNamespace(num_attention_heads=4))
    )
    config: Any = SimpleNamespace(run=str(tmp_path), act=SimpleNamespace(heads=None, beta=0.4, threshold=0.1))
    heads = {"heads": [[0, 1], [1, 3]], "layers": 2, "heads_per_layer": 4, "beta": 0.4, "threshold": 0.1}
    tools.fuzz_json(count, tmp_path / "act_heads.json", heads, lambda: _read(config, model))


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

    tools.fuzz_file(count, tmp_path / folders.SUMS, tools.damaged(whole), read, names)


@few_and_many
def test_other_json_files(count: int, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    own = tmp_path / "ds.json"
    config = load_config(str(recipe), [f"deepspeed.config={own}"])
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}, "train_batch_size": "auto", "steps": 3}
    tools.fuzz_json(count, own, settings, lambda: deepspeed_config(config))
    times = tmp_path / "t.json"
    row = Utterance("a", None, "hi", 1.0, times=times)
    spans = {"words": [["hi", 0.1, 0.4]], "phonemes": [["h", 0.1, 0.2], ["aI", 0.2, 0.4]]}
    tools.fuzz_json(count, times, spans, lambda: _read_times(times, row))
    frames = {"train": {"a": 30, "b": 1}, "validation": {"c": 0}}
    tools.fuzz_json(count, tmp_path / FRAMES, frames, lambda: [p.frames.sum() for p in read_frames(tmp_path).values()])
    state = {"format": corpus.FORMAT, "options": {"grid": 1}, "utterances": {"grid/train.jsonl": 3}}
    made = tmp_path / "synth"
    tools.fuzz_json(count, made / "corpus.json", state, lambda: corpus.synthesise(made, SynthOptions()))


@few_and_many
def test_the_journal_of_prepare(count: int, tmp_path: Path) -> None:
    clip = {"id": "s1/a_00", "start": 0, "end": 30, "sha256": "0" * 64}
    refusal = {"id": "s1/b", "file": "b.mp4", "kind": "text", "reason": "none"}
    line = {"source": "s1/a", "asked": "[]", "tried": "[]", "made": [clip], "refused": [refusal]}
    out = tmp_path / "out"
    Journal(out, {"corpus": "videos"})

    def read() -> None:
        journal = Journal(out, {"corpus": "videos"})
        for name in ("s1/a", "../x"):
            for found in journal.entry(name).made:
                assert (out / found.video).resolve().is_relative_to(out) and found.end - found.start < 2**4000
            json.dumps([vars(found) for found in journal.entry(name).refused])

    rows = tools.lines_of(line, line)
    tools.fuzz_file(count, out / "progress.jsonl", rows, read, tools.each_changed(line))
    (out / "progress.jsonl").unlink()
    state = {"format": FORMAT, "corpus": "videos"}
    tools.fuzz_json(count, out / "prepare.json", state, lambda: Journal(out, {"corpus": "videos"}))


@few_and_many
def test_rows_and_results_of_a_stopped_command(count: int, tmp_path: Path) -> None:
    made = {"checkpoint": "best", "data.limit": 0, "noise.snr": [0.5]}
    row = {"set": "sentences", "id": "u1", "reference": "a", "hypothesis": "b", "nbest": [{"text": "b", "score": -1.0}]}

    def read() -> None:
        rows = Rows(tmp_path / "rows", row_key, made)
        rows.add(row)
        assert Rows(tmp_path / "rows", row_key, made).held[row_key(row)] == row

    lines = tools.lines_of({"made_by": made}, row, row)
    tools.fuzz_file(count, tmp_path / "rows", lines, read, tools.each_changed(row))
    result = tmp_path / "metrics.json"
    tools.fuzz_json(count, result, {"made_by": made, "a": {"wer": 0.1}}, lambda: refuse_other(result, made, "advice"))


@few_and_many
def test_the_finished_shards_of_synth(count: int, tmp_path: Path) -> None:
    options = SynthOptions(grid=1, open=0, test=1, validation=1, voices=1, unseen_voices=1)
    shard = shards.plan_shards(tmp_path, options)[0]
    row = {"id": shard.lines[0].id, "audio": "a.wav", "sha256": "0" * 64, "times": "a.json", "video": "a.mp4"}
    done = {"set": "grid", "voice": shard.voice.name, "utterances": [["train", row]]}

    def read() -> None:
        for held in Rows(tmp_path / "rows", lambda found: (found["set"], found["voice"])).held.values():
            assert not shards.is_whole(shard, held.get("utterances"))

    tools.fuzz_file(count, tmp_path / "rows", tools.lines_of(done), read, tools.each_changed(done))


def test_names_that_stand_for_billions_of_values_are_refused(tmp_path: Path) -> None:
    names = "abcdefghij"
    laughs = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip(names, names[1:], strict=False))
    (tmp_path / "r.yaml").write_text(f"a: &a [lol]\n{laughs}")
    with tools.bounded(), pytest.raises(UserError, match="more than 10000 values"):
        load_config(str(tmp_path / "r.yaml"))
