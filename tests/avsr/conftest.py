"""Tiny real parts: a Llama, a Whisper, tone corpora and a recipe that trains them in seconds."""

from __future__ import annotations

import os
import runpy
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import save_file

import avsr.training.run
from avsr.cli import main
from avsr.config import load_config, to_yaml
from avsr.data.manifest import write_manifest
from avsr.data.video_writer import write_video
from avsr.models.build import build_model, build_store
from avsr.models.weights import WEIGHTS

RATE = 16_000
WORDS = ("bin", "lay", "place", "set", "blue", "green", "red", "white", "now", "soon", "again")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_talkers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of babble is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("avsr.data.talkers.cache_folder", lambda: folder)
        yield


@pytest.fixture(autouse=True)
def left_behind() -> Iterator[None]:
    """What a training leaves in the environment must not reach the processes of other tests, nor the linear layer that
    ZeRO-3 puts in the place of torch's, which keeps inputs of frozen weights too, other tests of this process."""
    before, linear = dict(os.environ), torch.nn.functional.linear
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (hidden 48, 3 layers, grouped queries) and a character tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llm")
    tokens = ["<pad>", "<s>", "</s>", "<unk>", " ", *string.ascii_lowercase, *string.digits, *string.punctuation]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokens),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.2,  # larger than the default: outputs then depend on the input
            )
        )
    model.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Whisper of width 32 and 2 layers."""
    from transformers import WhisperConfig, WhisperModel

    folder = tmp_path_factory.mktemp("tiny_whisper")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = WhisperModel(
            WhisperConfig(
                vocab_size=60,
                num_mel_bins=80,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=1500,
                max_target_positions=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        )
    model.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_avhubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file with a random AV-HuBERT of width 64 and 2 layers."""
    from avsr.models.avhubert_network import AVHubert, AVHubertConfig

    path = tmp_path_factory.mktemp("tiny_avhubert") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = AVHubert(AVHubertConfig(width=64, ffn=96, layers=2, channels=4))
    save_file(model.state_dict(), str(path))
    return path


@pytest.fixture(scope="session")
def tiny_wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random WavLM of width 32 and 2 layers, like LARGE."""
    from transformers import WavLMConfig, WavLMModel

    path = tmp_path_factory.mktemp("wavlm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
        )
        WavLMModel(config).save_pretrained(path)
    return path


def tiny_mouth(index: int, frames: int, side: int = 96) -> np.ndarray:
    """(T, side, side) uint8: a dark ellipse that opens and closes, of other size and speed for every ``index``."""
    rows, columns = np.mgrid[:side, :side] / (side / 2) - 1
    opening = 0.15 + 0.1 * (1 + np.sin(np.arange(frames) * (0.4 + 0.3 * index) + index))
    inside = (columns / 0.6) ** 2 + (rows / opening[:, None, None]) ** 2 < 1
    return np.where(inside, 30 + 10 * (index % 4), 150 + 8 * (index % 9)).astype(np.uint8)


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Path]:
    """``make_corpus(folder, count=8, seconds=0.6)``: distinct tones and their manifest, whose path it returns.

    ``seconds`` is one duration for all or a sequence with one for each (then ``count`` does not matter). ``video``
    adds 96x96 mouths: "beside" the sound, "with sound" in one file, or "alone".
    """

    def make(folder: Path, count: int = 8, seconds: float | Sequence[float] = 0.6, video: str = "") -> Path:
        durations = [float(seconds)] * count if isinstance(seconds, int | float) else [float(s) for s in seconds]
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, duration in enumerate(durations):
            samples = round(duration * RATE)
            time = np.arange(samples) / RATE
            tone = 0.4 * np.sin(2 * np.pi * (200 + 90 * index) * time) + 0.1 * np.sin(2 * np.pi * 60 * index * time)
            files = {}
            if video in ("", "beside"):
                files["audio"] = f"u{index:03d}.wav"
                soundfile.write(str(folder / files["audio"]), tone.astype(np.float32), RATE, subtype="PCM_16")
            if video:
                files["video"] = f"u{index:03d}.mp4"
                mouth = tiny_mouth(index, round(duration * 25))
                write_video(folder / files["video"], mouth, sound=tone if video == "with sound" else None)
            rows.append(
                {
                    "id": f"u{index:03d}",
                    **files,
                    "duration": samples / RATE,
                    "text": f"{WORDS[index % 4]} {WORDS[4 + index // 4 % 4]} {WORDS[8 + index % 3]}",
                    "speaker": f"s{index % 2}",
                }
            )
        write_manifest(folder / "manifest.jsonl", rows)
        return folder / "manifest.jsonl"

    return make


@pytest.fixture(scope="session")
def tiny_recipe(tiny_llm: Path, tiny_whisper: Path, make_corpus: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_recipe(tmp_path, **{"training.steps": 2})``: path of a complete recipe for the tiny parts.

    Its corpora are in ``tmp_path/corpus``, its run in ``tmp_path/run``.
    """

    def make(tmp_path: Path, **overrides: Any) -> Path:
        def corpus(name: str, count: int) -> str:
            folder = tmp_path / "corpus" / name
            found = folder / "manifest.jsonl"
            return str(found if found.is_file() else make_corpus(folder, count))

        tree = OmegaConf.create(
            {
                "run": str(tmp_path / "run"),
                "model": {
                    "audio": {
                        "encoder": {"name": str(tiny_whisper), "batch": 4},
                        "compression": {"kind": "average", "rate": 4},
                    },
                    "projector": {"hidden": 32, "layernorm": True},
                    "llm": {"name": str(tiny_llm)},
                    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
                },
                "data": {
                    "train": corpus("train", 8),
                    "validation": corpus("validation", 4),
                    "test": {"sentences": corpus("sentences", 4), "unseen_voices": corpus("unseen_voices", 3)},
                    "cache": str(tmp_path / "cache"),
                    "max_bad": 1.0,  # one bad clip of so few is more than the default
                },
                "loss": {"decorrelation": 0.0},
                "training": {"steps": 4, "frames": 120, "utterances": 4, "validate_every": 2, "precision": "fp32"},
                "deepspeed": {"stage": 1},
                "decode": {"batch": 4},
                "log": {"tensorboard": False},
            }
        )
        for key, value in overrides.items():
            OmegaConf.update(tree, key, value, force_add=True)
        path = tmp_path / "recipe.yaml"
        OmegaConf.save(tree, path)
        return path

    return make


@pytest.fixture(scope="session")
def av_recipe(
    tiny_recipe: Callable[..., Path], tiny_avhubert: Path, make_corpus: Callable[..., Path]
) -> Callable[..., Path]:
    """``av_recipe(tmp_path, "video", **overrides)``: as ``tiny_recipe``, for any task: Whisper for the sound, AV-HuBERT
    for the mouth or both; the corpora have sound and video."""

    def make(tmp_path: Path, task: str, **overrides: Any) -> Path:
        for name, count in (("train", 8), ("validation", 4), ("sentences", 4), ("unseen_voices", 3)):
            if not (tmp_path / "corpus" / name).exists():
                make_corpus(tmp_path / "corpus" / name, count, video="beside")
        encoders = {
            f"model.{stream}.encoder": {"kind": "avhubert", "name": str(tiny_avhubert), "batch": 4}
            for stream in ("video", "fused")
        }
        return tiny_recipe(tmp_path, **{"model.task": task, **encoders, **overrides})

    return make


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail and returns its message."""

    def run(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == status
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        return shown[max(f"\n{shown}".find("\navsr: "), 0) :].rstrip("\n")

    return run


@pytest.fixture(scope="session")
def untrained(tiny_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of ``tiny_recipe``."""
    config, cpu = load_config(str(tiny_recipe(tmp_path_factory.mktemp("untrained")))), torch.device("cpu")
    model, _ = build_model(config, build_store(config, cpu), cpu)
    return {name: value.detach().clone() for name, value in model.own_state().items()}


@pytest.fixture
def run_folder(tiny_recipe: Callable[..., Path], untrained: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """A run as training leaves it, untrained."""
    run = tmp_path / "run"
    text = to_yaml(load_config(str(tiny_recipe(tmp_path))))
    for folder in (run / "checkpoints" / "best", run / "checkpoints" / "last"):
        folder.mkdir(parents=True)
        save_file(untrained, str(folder / WEIGHTS))
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    (run / "config.yaml").write_text(text, encoding="utf-8")
    return run


@pytest.fixture
def tone() -> Callable[[Path, float], Path]:
    """Writes a tone of so many seconds to a sound file."""

    def write(path: Path, seconds: float) -> Path:
        samples = (0.4 * np.sin(np.arange(round(seconds * 16_000)) / 12)).astype(np.float32)
        soundfile.write(str(path), samples, 16_000)
        return path

    return write


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``avsr train`` up to the engine: a process group of one, without DeepSpeed's start-up."""
    own = not dist.is_initialized()  # a test before this one may have started DeepSpeed in this process

    def start(watchdog: object) -> tuple[int, int]:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return 0, 1

    def no_engine(*arguments: object) -> None:
        raise AssertionError("training would have begun")

    monkeypatch.setattr(avsr.training.run, "start_distributed", start)
    monkeypatch.setattr(avsr.training.run, "make_engine", no_engine)
    yield
    if own and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def refuse_training(
    refuse: Callable[..., str], one_process: None, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., str]:
    """``refuse_training("key=value", **changes)``: the message of ``avsr train`` of a tiny recipe that must fail."""
    return lambda *overrides, **changes: refuse("train", tiny_recipe(tmp_path, **changes), *overrides)


@pytest.fixture(scope="session")
def draw_face() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The function of drawn_face.py next to this file."""
    return runpy.run_path(str(Path(__file__).with_name("drawn_face.py")))["draw_face"]


@pytest.fixture(scope="session")
def parts() -> Any:
    """The module official_checkpoint.py next to this file."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("official_checkpoint.py"))))


@pytest.fixture(scope="session")
def plain_llm(parts: Any, tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that has no <pad>, as Llama's."""
    folder: Path = parts.write_plain_llm(tiny_llm, tmp_path_factory.mktemp("plain_llm"))
    return folder


@pytest.fixture
def official(parts: Any, plain_llm: Path, tiny_whisper: Path) -> Any:
    """An official checkpoint of the task audio."""
    return parts.audio_checkpoint(plain_llm, tiny_whisper)


@pytest.fixture
def audio_recipe(tiny_recipe: Callable[..., Path], tmp_path: Path, plain_llm: Path) -> Callable[..., Path]:
    def make(**overrides: Any) -> Path:
        lora = {"rank": 8, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
        return tiny_recipe(tmp_path, **{"model.llm.name": str(plain_llm), "model.lora": lora, **overrides})

    return make
