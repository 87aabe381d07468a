"""The exported study against ``avsr train``, in processes that find nothing but torch, transformers and peft."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from avsr.config import Config, load_config
from avsr.data.batches import collate
from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.evaluation import run as evaluation
from avsr.models.build import build_model, build_store
from avsr.models.weights import load_some_weights, load_weights
from avsr.training import run as training
from avsr.training.losses import attach
from bench.study import export, settled, train
from bench.study.grid import Arm
from bench.study.measure import scored
from bench.study.penalty import Penalty, attach_penalty
from bench.study.standalone import config_from
from bench.study.summary import sinks

pytestmark = pytest.mark.integration

STEPS, RATE = 20, 4
CPU = torch.device("cpu")
WORDS = ("bin", "lay", "place", "set", "blue", "green", "red", "white", "now", "soon", "again")
HIDDEN = (
    *("deepspeed", "jiwer", "omegaconf", "av", "soundfile", "torchaudio", "datasets", "rich", "pyarrow", "matplotlib"),
    *("tensorboard", "ninja", "sounddevice"),
)
# without the finders of editable installations, which would find this repository
ALONE = f"""
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Hiding]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
import avsr, flashsink
assert avsr.__file__.startswith(sys.path[0]) and flashsink.__file__.startswith(sys.path[0])
"""
ARMS = {
    "off": Arm("off"),
    "paper": Arm("paper", weight=100.0),
    "anchored": Arm("anchored", weight=200.0, margin=0.2, anchor="base"),
    "norm": Arm("norm", weight=100.0, penalty=Penalty(kind="norm")),
    "bf16": Arm("bf16", weight=100.0, seed=2, overrides=("training.precision=bf16",)),
}


def make_llm(folder: Path) -> None:
    """A random Llama, with initial values from which the norm penalty has something to push."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", " ", *string.ascii_letters, *string.punctuation]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = LlamaConfig(vocab_size=len(tokens), **sizes, num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens.index("T")] *= 1000  # of the prompt: an outlier
    model.save_pretrained(folder)


def make_whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    WhisperModel(WhisperConfig(vocab_size=60, d_model=32, **layers, **heads, **ids)).save_pretrained(folder)


def make_corpus(folder: Path, count: int, first: int) -> Path:
    """Tones of unlike lengths, none a whole number of tokens."""
    folder.mkdir()
    rows = []
    for index in range(first, first + count):
        samples = 6_000 + 1_111 * (index * 7 % 11)
        sound = 0.4 * np.sin(2 * np.pi * (200 + 90 * index) * np.arange(samples) / 16_000)
        soundfile.write(str(folder / f"u{index}.wav"), sound.astype(np.float32), 16_000)
        text = f"{WORDS[index % 4]} {WORDS[4 + index // 4 % 4]} {WORDS[8 + index % 3]}"
        row = {"id": f"u{index}", "audio": f"u{index}.wav", "duration": samples / 16_000, "text": text}
        rows.append({**row, "speaker": f"s{index % 2}"})
    write_manifest(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"


def config_of(root: Path, key: str) -> Config:
    arm = ARMS[key]
    sets = {name: root / name / "manifest.jsonl" for name in ("train", "validation", "texts", "roles")}
    return load_config(
        "demo",
        [
            f"run={root / 'runs' / key}",
            f"model.llm.name={root / 'llm'}",
            f"model.audio.encoder.name={root / 'whisper'}",
            f"model.audio.compression.rate={RATE}",
            "model.projector.hidden=32",
            "model.lora.rank=4",
            f"data.train={sets['train']}",
            f"data.validation={sets['validation']}",
            f"data.test={{texts: {sets['texts']}, roles: {sets['roles']}}}",
            f"data.cache={root / 'cache'}",
            f"loss.decorrelation={arm.weight}",
            f"loss.margin={arm.margin}",
            f"loss.anchor={arm.anchor}",
            f"training.seed={arm.seed}",
            f"training.steps={STEPS}",
            "training.frames=130",
            "training.utterances=4",
            "training.warmup=3",
            "training.decay=0.2",
            "training.clip=0.5",
            "training.packed=true",
            "training.precision=fp32",
            "training.validate_every=8",
            "training.gradient_norms_every=10",
            "decode.batch=3",
            "log.tensorboard=false",
            *arm.overrides,
        ],
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, corpora and a projector, and in ``export`` what is exported of them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("study")
    make_llm(root / "llm")
    make_whisper(root / "whisper")
    for number, (name, count) in enumerate({"train": 11, "validation": 4, "texts": 5, "roles": 3}.items()):
        make_corpus(root / name, count, 20 * number)
    config = config_of(root, "off")
    model, _ = build_model(config, build_store(config, CPU), CPU)
    torch.manual_seed(5)  # unlike the one that a seed gives
    taught = {name: p + 0.01 * torch.randn_like(p) for name, p in model.own_state().items() if "projectors" in name}
    save_file({name: p.detach().contiguous() for name, p in taught.items()}, root / "projector.safetensors")
    arms = {key: (arm, config_of(root, key)) for key, arm in ARMS.items()}
    export.write_export(root / "export", arms, root / "projector.safetensors")
    return root


def alone(root: Path, *arguments: object, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", ALONE, script or root / "export" / "run.py", *arguments]
    return subprocess.run([str(part) for part in command], cwd=root, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def exported(root: Path) -> dict[str, Any]:
    """The rows of all arms, trained alone."""
    options = ("--llm", root / "llm", "--device", "cpu", "--out", root / "rows.jsonl", "--weights", root / "weights")
    first = alone(root, "off", 1, *options)
    assert first.returncode == 0, first.stderr
    done = alone(root, "--all", *options)  # goes on behind the first
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == list(ARMS)
    return {row["key"]: row for row in rows}


def train_here(root: Path, key: str) -> tuple[Config, list[dict[str, Any]], dict[str, torch.Tensor]]:
    """``avsr train``: config, metrics and weights of an arm; DeepSpeed's group stays for good in the process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        run = pool.submit(train_arm, root, key).result()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return config_of(root, key), rows, load_file(run / "checkpoints" / "last" / "model.safetensors")


def train_arm(root: Path, key: str) -> Path:
    torch.set_num_threads(1)

    def prepare(model: Any, config: Config) -> None:
        load_some_weights(model, root / "projector.safetensors")
        penalty = ARMS[key].penalty
        attach(model, config) if penalty is None else attach_penalty(model, config, penalty)

    return training.train_and_leave(config_of(root, key), prepare)


COMPARED = ("ce", "decorrelation", "loss", "lr", "grad_norm", "grad_norm_ce", "grad_cosine", "validation_ce")


@pytest.mark.parametrize("key", ["paper", *(pytest.param(key, marks=pytest.mark.slow) for key in ("anchored", "norm"))])
def test_a_training_is_that_of_avsr_train(root: Path, exported: dict[str, Any], key: str) -> None:
    config, rows, weights = train_here(root, key)
    theirs = exported[key]
    assert len(theirs["metrics"]) == len(rows) == STEPS
    assert key == "off" or any(row["decorrelation"] > 0 for row in rows)
    assert any(row["grad_norm"] > config.training.clip for row in rows)
    for mine, other in zip(rows, theirs["metrics"], strict=True):
        assert (mine["step"], mine["epoch"], mine["tokens"]) == (other["step"], other["epoch"], other["tokens"])
        for name in COMPARED:
            if mine.get(name) is None:
                assert other.get(name) is None, (mine["step"], name)
            else:
                assert other[name] == pytest.approx(mine[name], rel=1e-4), (mine["step"], name)
    moved = load_file(root / "weights" / f"{key}.safetensors")
    assert moved.keys() == weights.keys()
    for name, weight in weights.items():
        assert float((moved[name] - weight).norm()) <= 1e-4 * float(weight.norm()), name
    assert [step for step, _ in theirs["validation"]] == [8, 16, 20]
    check_measurement(root, config, theirs)


def check_measurement(root: Path, config: Config, row: dict[str, Any]) -> None:
    """Transcripts and sinks are those of the product's own functions."""
    store = build_store(config, CPU)
    model, _ = build_model(config, store, CPU)
    load_weights(model.eval(), Path(config.run) / "checkpoints" / "last")
    for name, dataset in evaluation.test_sets(config, model, store).items():
        _, found = evaluation.decode_set(model, dataset, config, name)
        assert row["transcripts"][name] == [[one["reference"], one["hypothesis"]] for one in found]
        if name == "texts":
            own = sinks(model, dataset, config)
            assert row["sinks"]["cos2"] == pytest.approx(own["cos2"], rel=1e-3)
            assert row["sinks"]["groups"].keys() == own["groups"].keys()
    assert row["perplexity"] > 1 and row["plain_text_tokens"] > 1000


@pytest.mark.slow
def test_in_bf16_a_training_stays_close(root: Path, exported: dict[str, Any]) -> None:
    """Features are pooled before they are rounded to bf16, there after it."""
    _, rows, _ = train_here(root, "bf16")
    for mine, other in zip(rows, exported["bf16"]["metrics"], strict=True):
        assert other["lr"] == mine["lr"]
        assert other["ce"] == pytest.approx(mine["ce"], rel=0.02)


def test_packed_rows_are_penalized_as_padded_ones(root: Path) -> None:
    losses = []
    for packed in (False, True):
        config = config_of(root, "norm")
        config.training.packed = packed
        store = build_store(config, CPU)
        model, loaded = build_model(config, store, CPU, training=True)
        attach_penalty(model, config, Penalty(kind="norm"))
        dataset = next(iter(evaluation.test_sets(config, model, store).values()))
        with torch.no_grad():
            losses.append(float(model(collate([dataset[i] for i in range(3)])).decorrelation))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0] > 0


def test_rows_are_imported_with_scores(root: Path, exported: dict[str, Any], tmp_path: Path) -> None:
    arms = {key: (arm, config_of(root, key)) for key, arm in ARMS.items()}
    into = tmp_path / "rows.jsonl"
    into.write_text(json.dumps({"key": "paper"}) + "\n")
    assert export.import_rows(root / "rows.jsonl", arms, into) == len(ARMS) - 1
    rows = {row["key"]: row for row in map(json.loads, into.read_text().splitlines())}
    assert rows["paper"] == {"key": "paper"}
    pairs = exported["off"]["transcripts"]["texts"]
    assert rows["off"]["scores"]["texts"] == scored([r for r, _ in pairs], [h for _, h in pairs])
    assert len(rows["off"]["scores"]["texts"]["errors"]) == 5 and "transcripts" not in rows["off"]
    assert export.import_rows(root / "rows.jsonl", arms, into) == 0
    arms["off"][1].training.steps += 1
    with pytest.raises(UserError, match="off has 20 steps, the plan 21"):
        export.import_rows(root / "rows.jsonl", arms, into)
    with pytest.raises(UserError, match="no arm of the settled study"):
        export.import_rows(root / "rows.jsonl", {}, into)
    with pytest.raises(UserError, match="no row of run.py"):
        export.import_rows(tmp_path / "missing", arms, into)


def test_what_cannot_run_is_said_in_one_line(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("avsr", "flashsink", "bench", "run.py"):
        (other / name).symlink_to(root / "export" / name)
    launcher = other / "start.py"
    text = (root / "export" / "run.py").read_text()
    launcher.write_text(text)
    llm = ("--llm", root / "llm")
    for script, arguments, said in (
        (None, ("off", 1, "--llm", root / "nowhere"), "there is no such folder"),
        (None, ("of", 1, *llm), "there is no arm 'of' with seed 1; there are: off 1, paper 1"),
        (None, ("off", *llm), "name an arm and its seed, or --all"),
        (launcher, ("off", 1, *llm), f"{other} is no export: it lacks arms.json"),
    ):
        done = alone(root, *arguments, script=script)
        assert done.returncode == 2 and done.stderr.startswith("avsr: "), done.stderr
        assert said in done.stderr and done.stderr.count("\n") == 1


def test_an_export_is_small_and_replaces_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"off": (ARMS["off"], config_of(root, "off"))}
    with pytest.raises(UserError, match="it exists"):
        export.write_export(root / "export", arms, root / "projector.safetensors")
    monkeypatch.setattr(export, "MOST", 1000)
    with pytest.raises(UserError, match="it would have 2 MB, allowed are 0"):
        export.write_export(tmp_path / "small", arms, root / "projector.safetensors")
    assert not list(tmp_path.iterdir())
    stacked = config_of(root, "off")
    stacked.model.audio.compression.kind = "stack"
    with pytest.raises(UserError, match="pooled by average"):
        export.write_export(tmp_path / "small", {"off": (ARMS["off"], stacked)}, root / "projector.safetensors")
    with pytest.raises(UserError, match="--rate 5: no arm"):
        export.export(tmp_path / "small", 5)


def test_the_settled_arms_come_back_from_their_plain_form() -> None:
    arm = replace(next(iter(settled.ARMS.values())), seed=3)
    config = train.config_of(arm)
    assert config_from(Config, json.loads(json.dumps(asdict(config)))) == config
