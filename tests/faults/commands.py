"""Every command of ``avsr`` with what it reads, what it makes, and which faults cannot happen to it.

``prepare`` has two rows: videos, and debian-speech, which has code of its own; the other corpora only read videos.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from avsr.data.index import read_arrow

Result = dict[str, Any]
NOTHING = "writes nothing"
_VOLATILE = {
    "seconds",
    "wait_seconds",
    "total_seconds",
    "peak_memory_mb",
    "rtfx",
    "stamp",
    "audio_mark",
    "video_mark",
    "created",
    "run",
}


@dataclass(frozen=True)
class Command:
    """A row of the matrix.

    Attributes:
        arguments: of the command; paths are relative to the template.
        output: the folder that it writes; "" if nothing.
        result: what is compared, given the root: equal for two runs of the same input.
        inputs: files, any of which may be damaged.
        spared: those of them without which the command may go on: texts that may still be right when they are cut, and
            one clip of many, whose refusal is reported.
        again: arguments of the repetition after a fault that left something, instead of ``arguments``.
        replaces: whether a second run replaces the result of the first.
        refuses: what it says instead where its result is whole.
        cache: a folder of the command's cache.
        ranks: whether it may be one of several.
        cannot: faults that cannot happen, and why.
    """

    arguments: Sequence[str]
    output: str
    result: Callable[[Path], Result]
    inputs: Sequence[str] = ()
    spared: Sequence[str] = ()
    again: Sequence[str] = ()
    replaces: bool = False
    refuses: str = ""
    cache: str = ""
    ranks: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)


def _files(*patterns: str) -> Callable[[Path], Result]:
    """The bytes of files by their path."""
    return lambda root: {
        str(path.relative_to(root)): path.read_bytes() for pattern in patterns for path in sorted(root.glob(pattern))
    }


def _rows(*patterns: str) -> Callable[[Path], Result]:
    """JSON lines without what is not the same twice."""
    return lambda root: {
        str(path.relative_to(root)): [_steady(json.loads(line)) for line in path.read_text().splitlines()]
        for pattern in patterns
        for path in sorted(root.glob(pattern))
    }


def _jsons(*patterns: str) -> Callable[[Path], Result]:
    return lambda root: {
        str(path.relative_to(root)): _steady(json.loads(path.read_text()))
        for pattern in patterns
        for path in sorted(root.glob(pattern))
    }


def _tables(*patterns: str) -> Callable[[Path], Result]:
    """Arrow files, without the times of other files."""
    return lambda root: {
        path.name: [_steady(row) for row in read_arrow(path).to_pylist()]
        for pattern in patterns
        for path in sorted(root.glob(pattern))
    }


def _tensors(*patterns: str) -> Callable[[Path], Result]:
    return lambda root: {
        f"{path.relative_to(root)} {name}": value.tobytes()
        for pattern in patterns
        for path in sorted(root.glob(pattern))
        for name, value in load_file(str(path)).items()
    }


def _all(*parts: Callable[[Path], Result]) -> Callable[[Path], Result]:
    return lambda root: {name: value for part in parts for name, value in part(root).items()}


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _steady(item) for name, item in value.items() if isinstance(item, dict) or name not in _VOLATILE}
    return [_steady(item) for item in value] if isinstance(value, list) else value


_OWN = ("trained/checkpoints/best/model.safetensors", "llm/model.safetensors", "whisper/model.safetensors")
_TRAIN_FILES = ("recipe.yaml", "corpus/train/manifest.jsonl", "corpus/train/u003.wav", *_OWN[1:], "llm/tokenizer.json")
_READER = dict.fromkeys(("kill -9", "SIGTERM", "full disk", "read-only", "two at once"), NOTHING)

COMMANDS = {
    "train": Command(
        ["train", "recipe.yaml"],
        "run",
        _all(_tensors("run/checkpoints/last/model.safetensors"), _rows("run/metrics.jsonl")),
        _TRAIN_FILES,
        ["recipe.yaml", "corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        again=["train", "recipe.yaml", "resume=true"],
        cache="cache",
        ranks=True,
    ),
    "profile": Command(
        ["profile", "recipe.yaml", "--steps", "1"],
        "run-profile",
        lambda root: {"keys": sorted(json.loads((root / "run-profile/profile.json").read_text()))},
        _TRAIN_FILES,
        ["recipe.yaml", "corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        replaces=True,
        cache="cache",
        ranks=True,
    ),
    "plan": Command(
        ["plan", "recipe.yaml"],
        "",
        lambda root: {},
        ["recipe.yaml", "llm/config.json"],
        ["recipe.yaml"],
        cannot={**_READER, "damaged cache": "reads none"},
    ),
    "pretrain": Command(
        ["pretrain", "pretrain.yaml"],
        "pretrained",
        _all(_tensors("pretrained/model.safetensors"), _rows("pretrained/metrics.jsonl")),
        ["pretrain.yaml", "timed/train.jsonl", "timed/2.mp4", "timed/2.json"],
        ["pretrain.yaml", "timed/train.jsonl"],
        cannot={"damaged cache": "reads none"},
    ),
    "evaluate": Command(
        ["evaluate", "trained", "data.cache=cache"],
        "trained",
        _all(_files("trained/**/hypotheses.jsonl"), _jsons("trained/**/metrics.json")),
        [*_OWN, "trained/config.yaml", "corpus/sentences/manifest.jsonl", "corpus/sentences/u002.wav"],
        ["trained/config.yaml", "corpus/sentences/manifest.jsonl", "corpus/sentences/u002.wav"],
        replaces=True,
        cache="cache",
    ),
    "transcribe": Command(
        ["transcribe", "trained", "a.wav", "b.wav", "--out", "texts"],
        "texts",
        _files("texts/transcripts.jsonl"),
        [*_OWN, "trained/config.yaml", "b.wav"],
        ["trained/config.yaml"],
        refuses="transcripts.jsonl is there already",
        cannot={"damaged cache": "does not use data.cache"},
    ),
    "act-search": Command(
        ["act-search", "trained", "data.cache=cache"],
        "trained",
        _jsons("trained/act_heads.json"),
        [*_OWN, "trained/config.yaml", "corpus/validation/manifest.jsonl", "corpus/validation/u002.wav"],
        ["trained/config.yaml", "corpus/validation/manifest.jsonl", "corpus/validation/u002.wav"],
        replaces=True,
        cache="cache",
    ),
    "analyze": Command(
        ["analyze", "trained", "data.cache=cache"],
        "trained",
        _jsons("trained/analysis.json"),
        [*_OWN, "trained/config.yaml", "corpus/validation/u002.wav"],
        ["trained/config.yaml", "corpus/validation/u002.wav"],
        replaces=True,
        cache="cache",
    ),
    "analyze --encoder": Command(
        ["analyze", "whisper:whisper", "--encoder", "--manifest", "long.jsonl", "--out", "inside"],
        "inside",
        _jsons("inside/analysis.json"),
        ["whisper/model.safetensors", "whisper/config.json", "long.jsonl", "long_b.wav"],
        ["long.jsonl"],
        replaces=True,
        cannot={"damaged cache": "reads none"},
    ),
    "average": Command(
        ["average", "trained"],
        "trained/checkpoints",
        _tensors("trained/checkpoints/average/model.safetensors"),
        ["trained/checkpoints/step-000004/model.safetensors", "trained/checkpoints/step-000002/model.safetensors"],
        replaces=True,
        cannot={"damaged cache": "reads none"},
    ),
    "import": Command(
        ["import", "official.pth", "--config=official.yaml", "--out=imported", "--reduction=6", "--alpha=3"],
        "imported",
        _tensors("imported/**/*.safetensors"),
        ["official.pth", "official.yaml", "plain_llm/model.safetensors"],
        ["official.yaml"],
        cannot={"damaged cache": "reads none"},
        refuses="imported exists already",
    ),
    "doctor": Command(["doctor"], "", lambda root: {}, cannot={**_READER, "damaged cache": "reads none"}),
    "synth": Command(
        ["synth", "made", "grid=1", "open=0", "validation=1", "test=1", "voices=1", "unseen_voices=1", "workers=1"],
        "made",
        _files("made/**/*.jsonl", "made/**/*.wav", "made/**/*.mp4"),
        cannot={"damaged cache": "reads none", "damaged input": "reads no file of the user"},
    ),
    "prepare": Command(
        ["prepare", "videos", "videos", "prepared", "landmarks=landmarks", "workers=1"],
        "prepared",
        _files("prepared/all.jsonl", "prepared/refused.jsonl", "prepared/clips/*.wav", "prepared/clips/*.mp4"),
        ["videos/b.mp4", "videos/b.txt", "landmarks/b.npy"],
        ["videos/b.mp4", "videos/b.txt", "landmarks/b.npy"],
        cannot={"damaged cache": "keeps its progress in its output: kill and full disk damage it"},
    ),
    "prepare debian-speech": Command(
        ["prepare", "debian-speech", "speech", "debs=debs"],
        "speech",
        _files("speech/*.jsonl", "speech/clips/*.wav", "speech/licences/*.txt"),
        ["debs/drascula_1.0+ds4-2_all.deb", "debs/asterisk-core-sounds-en_1.6.1-1_all.deb"],
        cannot={"damaged cache": "keeps its progress in its output: kill and full disk damage it"},
    ),
    "pack": Command(
        ["pack", "corpus/train/manifest.jsonl", "packed", "--clips", "2"],
        "packed",
        _files("packed/*.tar", "packed/*.jsonl"),
        ["corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        ["corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        cannot={"damaged cache": "keeps its progress in its output: kill and full disk damage it"},
    ),
    "index": Command(
        ["index", "corpus/train/manifest.jsonl", "--workers", "1"],
        "corpus/train/manifest.jsonl.index",
        _tables("corpus/train/manifest.jsonl.index/*.arrow"),
        ["corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        ["corpus/train/manifest.jsonl", "corpus/train/u003.wav"],
        replaces=True,
        cannot={"damaged cache": "reads none", "two at once": "the second waits, and then has nothing to do"},
    ),
}
