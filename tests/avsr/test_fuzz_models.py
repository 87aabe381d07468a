"""Language models of any content, as GGUF files and as folders: whole, or refused with a message."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from avsr.config import EncoderConfig, LLMConfig
from avsr.errors import UserError
from avsr.models.llm import convert_gguf, load_llm
from avsr.models.whisper import Whisper
from avsr.tools.analysis.inputs import _check_decoder

pytestmark = pytest.mark.integration

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)

U32, F32, TEXT, LIST = 4, 6, 8, 9  # types of GGUF's metadata
WIDTH, FFN, TOKENS = 8, 16, ("<s>", "</s>", "a", "b")
MATRICES = {"attn_q": WIDTH, "attn_k": WIDTH, "attn_v": WIDTH, "attn_output": WIDTH, "ffn_gate": FFN, "ffn_up": FFN}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(name: str, kind: int, value: Any) -> bytes:
    if kind == LIST:
        data = struct.pack("<IQ", TEXT, len(value)) + b"".join(map(text, value))
    else:
        data = text(value) if kind == TEXT else struct.pack("<I" if kind == U32 else "<f", value)
    return text(name) + struct.pack("<I", kind) + data


FIELDS: dict[str, tuple[int, Any]] = {
    "general.architecture": (TEXT, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, WIDTH),
    "llama.feed_forward_length": (U32, FFN),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "tokenizer.ggml.model": (TEXT, "gpt2"),
    "tokenizer.ggml.tokens": (LIST, TOKENS),
    "tokenizer.ggml.merges": (LIST, ()),
    "tokenizer.ggml.bos_token_id": (U32, 0),
    "tokenizer.ggml.eos_token_id": (U32, 1),
}
SHAPES: dict[str, tuple[int, ...]] = {
    **{name: (WIDTH, len(TOKENS)) for name in ("token_embd.weight", "output.weight")},
    **{f"{name}.weight": (WIDTH,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")},
    **{f"blk.0.{name}.weight": (WIDTH, rows) for name, rows in MATRICES.items()},
    "blk.0.ffn_down.weight": (FFN, WIDTH),
}


def gguf(fields: dict[str, Any] = FIELDS, shapes: dict[str, tuple[int, ...]] = SHAPES, **counts: int) -> bytes:
    """A GGUF file of zeros; ``counts`` are what its header says instead of the truth."""
    head = b"GGUF" + struct.pack(
        "<IQQ", counts.get("version", 3), counts.get("tensors", len(shapes)), counts.get("pairs", len(fields))
    )
    head += b"".join(pair(name, *field) for name, field in fields.items())
    place = 0
    for name, shape in shapes.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, place)
        size = 4
        for count in shape:
            size *= count
        place += -(-size // 32) * 32 if size < 2**20 else 0
    return head + b"\0" * (-len(head) % 32) + b"\0" * place


def lying() -> list[bytes]:
    """Files whose header claims what is not there."""
    entry = struct.pack("<I", LIST)
    made = [gguf(**{name: 2**60}) for name in ("tensors", "pairs")] + [gguf(version=99), b"", gguf()[:20]]
    made += [gguf({**FIELDS, name: (U32, 2**31 - 8)}) for name, (kind, _) in FIELDS.items() if kind == U32]
    made += [gguf(shapes={**SHAPES, name: (2**40, 2**40)}) for name in ("token_embd.weight", "output_norm.weight")]
    lists = [struct.pack("<IQ", kind, count) for kind in (0, TEXT, LIST) for count in (2**31, 2**60)]
    whole = gguf()
    at = whole.index(entry + struct.pack("<IQ", TEXT, len(TOKENS)))
    made += [whole[: at + 4] + wrong + whole[at + 16 :] for wrong in lists]
    made += [whole[: at + 4] + struct.pack("<IQ", LIST, 1) * 100_000 + whole[at + 16 :]]
    return [*made, whole[:24] + struct.pack("<Q", 2**60) + whole[32:]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@few_and_many
def test_gguf_files(count: int, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf())
    assert load_llm(LLMConfig(name=str(path))).tokenize("ab")
    converted = os.listdir(cache / "models")

    def read() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        with tools.bounded(strict=False):  # a tensor may be asked for that there is no memory for
            convert_gguf(path)

    tools.fuzz_file(count, path, tools.damaged(gguf(), 600), read, lying())
    path.write_bytes(gguf())
    convert_gguf(path)
    assert os.listdir(cache / "models") == converted  # what failed left nothing


@pytest.mark.parametrize("gone", ["token_embd.weight", "output_norm.weight", "blk.0.attn_v.weight", ""])
def test_a_gguf_file_that_lacks_weights_is_refused(gone: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(shapes={name: shape for name, shape in SHAPES.items() if gone and name != gone}))
    with pytest.raises(UserError, match=r"m\.gguf: .*(lack \d+ weights|holds 0 tensors)"):
        convert_gguf(path)


@pytest.fixture
def folder(tiny_llm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llm, tmp_path / "model"))


def test_a_folder_that_lacks_weights_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"model\.llm\.name: .*lack 1 weights \({name}"):
            load_llm(LLMConfig(name=str(folder)))


def test_a_whisper_that_lacks_weights_is_refused(tiny_whisper: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_whisper, tmp_path / "whisper"))
    tensors = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if "encoder.layers.1.fc1" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 2 weights \(encoder\.layers\.1\.fc1"):
        Whisper(EncoderConfig(name=str(folder)))


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size"])
@pytest.mark.parametrize(
    "read", [lambda path: load_llm(LLMConfig(name=str(path))), lambda path: _check_decoder("m", path)]
)
def test_sizes_that_the_weights_cannot_fill_are_refused(folder: Path, key: str, read: Callable[[Path], Any]) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, key: 2**31 - 8}))
    with tools.bounded(), pytest.raises(UserError, match="more than its .* bytes can hold"):
        read(folder)


@pytest.mark.parametrize("key", ["encoder_layers", "encoder_ffn_dim", "d_model", "decoder_layers", "vocab_size"])
def test_sizes_of_a_whisper_that_its_weights_cannot_fill_are_refused(
    tiny_whisper: Path, tmp_path: Path, key: str
) -> None:
    folder = Path(shutil.copytree(tiny_whisper, tmp_path / "whisper"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, key: 2**31 - 8}))
    with tools.bounded(), pytest.raises(UserError, match="more than its .* bytes can hold"):
        Whisper(EncoderConfig(name=str(folder)))


def test_code_beside_a_model_is_not_run_whatever_is_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = folder / "marker"
    about = json.loads((folder / "config.json").read_text())
    about.update(model_type="theirs", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    for read in (lambda: load_llm(LLMConfig(name=str(folder))), lambda: _check_decoder("m", folder)):
        with pytest.raises(UserError):
            read()
    assert not marker.exists()


@few_and_many
def test_folders(count: int, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    whole = (folder / "model.safetensors").read_bytes()

    def read() -> None:
        with tools.bounded(strict=False):
            load_llm(LLMConfig(name=str(folder)))

    tools.fuzz_file(count // 2, folder / "config.json", tools.json_file(config), read)
    (folder / "config.json").write_text(json.dumps(config))
    tools.fuzz_file(count // 2, folder / "model.safetensors", tools.damaged(whole, 2_000), read)
    (folder / "model.safetensors").write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_bytes()
        cases = st.one_of(tools.damaged(content, 1_000), tools.json_file(json.loads(content)))
        tools.fuzz_file(count // 4, folder / name, cases, read)
        (folder / name).write_bytes(content)
