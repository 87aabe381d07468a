"""Official fairseq files: read without fairseq, converted once, and refused by name when they are something else."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from avsr.errors import UserError
from avsr.models.avhubert_network import AVHubert, AVHubertConfig
from avsr.models.formats import fairseq_file
from avsr.models.formats.fairseq_file import load_avhubert

TINY = AVHubertConfig(width=128, ffn=96, layers=2, channels=2)
CFG = {"_name": "av_hubert", "layer_norm_first": True, "encoder_attention_heads": 2, "modality_fuse": "concat"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = AVHubert(TINY).state_dict()
    return OrderedDict((k, torch.randn_like(v) if v.is_floating_point() else v) for k, v in state.items())


def foreign(path: str) -> Any:
    """An object whose class is pickled as ``path`` and then no longer exists."""
    module, _, name = path.rpartition(".")
    cls = type(name, (), {"__module__": module})
    parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
    for parent in parents:
        sys.modules[parent] = types.ModuleType(parent)
    setattr(sys.modules[module], name, cls)
    return cls()


@pytest.fixture
def write(tmp_path: Path, weights: dict[str, Tensor]) -> Iterator[Callable[..., Path]]:
    """Writes a checkpoint as fairseq's trainer does; ``extra`` goes to its task state."""
    before = set(sys.modules)

    def make(model: Any = None, cfg: Any = CFG, extra: Any = None, name: str = "tiny_vox.pt", **options: Any) -> Path:
        dictionary = foreign("fairseq.data.dictionary.Dictionary")
        dictionary.symbols, dictionary.indices = ["<s>", "0", "1"], {"<s>": 0, "0": 1, "1": 2}
        training_only = {
            "label_embs_concat": torch.randn(24, 256),
            "final_proj.weight": torch.randn(256, TINY.width),
            "final_proj.bias": torch.randn(256),
        }
        checkpoint = {
            "args": None,
            "cfg": {"model": cfg},
            "model": {**weights, **training_only} if model is None else model,
            "criterion": OrderedDict(),
            "optimizer_history": [{"num_updates": 10, "optimizer_name": "FP16Optimizer"}],
            "task_state": {"dictionaries": [dictionary], "more": extra},
            "extra_state": {"metrics": OrderedDict(), "previous_training_time": 1.5},
        }
        path = tmp_path / name
        torch.save(checkpoint, path, **options)
        for module in [m for m in sys.modules if m not in before and m.split(".")[0] in ("fairseq", "sentencepiece")]:
            del sys.modules[module]
        return path

    yield make


@pytest.mark.parametrize("zipped", [True, False])
def test_an_official_file_is_read_without_fairseq(
    write: Callable[..., Path], weights: dict[str, Tensor], zipped: bool
) -> None:
    model = load_avhubert(str(write(_use_new_zipfile_serialization=zipped)))
    assert "fairseq" not in sys.modules
    assert model.config == TINY
    assert model.state_dict().keys() == weights.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_half_precision_becomes_float32(write: Callable[..., Path], weights: dict[str, Tensor], cache: Path) -> None:
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    state = load_avhubert(str(write(half))).state_dict()
    for key, tensor in half.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert state[key].dtype == expected.dtype and torch.equal(state[key], expected)
    (path,) = cache.glob("models/*/model.safetensors")
    with safe_open(str(path), "pt") as file:  # as converted, too
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32, torch.int64}  # noqa: SIM118


def test_it_is_converted_once_and_the_result_is_a_name_too(
    write: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    first = load_avhubert(str(path)).state_dict()
    (folder,) = (cache / "models").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    about = json.loads((folder / "config.json").read_text())
    assert about["width"] == 128 and about["source"] == "tiny_vox.pt" and "non-commercial" in about["licence"]

    def never(*arguments: Any) -> None:
        raise AssertionError("unpickled again")

    monkeypatch.setattr(fairseq_file, "load_torch_file", never)
    for name in (path, folder, folder / "model.safetensors"):
        again = load_avhubert(str(name)).state_dict()
        assert all(torch.equal(first[key], again[key]) for key in first)
    os.utime(path, ns=(1, 1))  # another file under the same name and size
    with pytest.raises(UserError, match="unpickled again"):
        load_avhubert(str(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["fairseq.tasks.evil.Task", "posix.system", "argparse.Namespace"])
def test_a_foreign_class_is_refused_by_name(
    write: Callable[..., Path], tmp_path: Path, name: str, zipped: bool
) -> None:
    extras: dict[str, Callable[[], Any]] = {
        "posix.system": lambda: RunsCode(tmp_path / "ran"),
        "argparse.Namespace": lambda: argparse.Namespace(a=1),
    }
    extra = extras.get(name, lambda: foreign(name))()
    path = write(extra=extra, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"tiny_vox\.pt: refused, .* foreign class {name}") as caught:
        load_avhubert(str(path))
    assert "fine-tuned" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "name", ["fairseq.data.encoders.sentencepiece_bpe.SentencepieceBPE", "sentencepiece.SentencePieceProcessor"]
)
def test_a_fine_tuned_file_is_told_by_its_tokenizer(write: Callable[..., Path], name: str) -> None:
    with pytest.raises(UserError, match=rf"foreign class {name}.*fine-tuned model.*pre-trained one is meant"):
        load_avhubert(str(write(extra=foreign(name))))


@pytest.mark.parametrize("prefix", ["encoder.w2v_model.", "decoder.layers.0."])
def test_a_fine_tuned_file_is_told_by_its_keys(
    write: Callable[..., Path], weights: dict[str, Tensor], prefix: str
) -> None:
    model = {prefix + key: tensor for key, tensor in weights.items()}
    with pytest.raises(UserError, match=rf"fine-tuned model \(it has the key '{prefix}mask_emb'"):
        load_avhubert(str(write(model)))


def test_other_sizes_are_refused_with_the_first_key(write: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
        state = {**weights, **{key.replace("__", "."): tensor for key, tensor in tensors.items()}}
        return {key: tensor for key, tensor in state.items() if tensor is not None}

    cases = [
        (
            changed(encoder__layers__1__fc2__bias=torch.zeros(5)),
            r"layers\.1\.fc2\.bias has shape \[5\], expected \[128",
        ),
        (changed(encoder__layers__1__fc2__bias=None), r"encoder\.layers\.1\.fc2\.bias is missing"),
        (changed(layer_norm__weight=torch.zeros(128)), r"layer_norm\.weight has shape \[128\], expected \[256\]"),
        (changed(post_extract_proj__weight=None), r"no AV-HuBERT weights: post_extract_proj\.weight is missing"),
        (changed(post_extract_proj__weight=torch.zeros(90, 180)), r"width 90 is no multiple of 64"),
        (changed(post_extract_proj__weight=torch.zeros(90)), r"post_extract_proj\.weight has shape \[90\]"),
        (changed(encoder__layers__2__extra=torch.zeros(1)), r"encoder\.layers\.2\.\S+ is missing"),
        (changed(encoder__extra=torch.zeros(1)), r"AV-HuBERT has no 'encoder\.extra'"),
        ({"mask_emb": 3}, r"the model's entry 'mask_emb' is not a tensor but int"),
        ({}, r"post_extract_proj\.weight is missing"),
    ]
    for index, (model, message) in enumerate(cases):
        with pytest.raises(UserError, match=rf"case{index}\.pt: .*{message}"):
            load_avhubert(str(write(model, name=f"case{index}.pt")))


@pytest.mark.parametrize(
    ("option", "value"), [("layer_norm_first", False), ("encoder_attention_heads", 4), ("modality_fuse", "add")]
)
def test_variants_that_shapes_do_not_tell_are_refused(write: Callable[..., Path], option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"cfg\.model\.{option} is {value!r}; only"):
        load_avhubert(str(write(cfg={**CFG, option: value})))


def test_files_that_are_no_checkpoint_are_refused_by_name(
    write: Callable[..., Path], tmp_path: Path, weights: dict[str, Tensor], cache: Path
) -> None:
    whole = write().read_bytes()
    legacy = write(_use_new_zipfile_serialization=False).read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], legacy[: len(legacy) // 2], pickle.dumps({"a": 1}, 5)):
        path = tmp_path / "bad.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.pt: not a ") as caught:
            load_avhubert(str(path))
        assert "weights_only" not in str(caught.value)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "lightning.pt")
    with pytest.raises(UserError, match=r"no 'model' entry \(it has state_dict, epoch\)"):
        load_avhubert(str(tmp_path / "lightning.pt"))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: not a fairseq checkpoint"):
        load_avhubert(str(tmp_path / "list.pt"))
    assert not list((cache / "models").iterdir())


def test_missing_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_avhubert(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="not read from a hub"):
        load_avhubert("facebook/av_hubert")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_avhubert(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_avhubert(str(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(write: Callable[..., Path], cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"tiny_vox\.pt: cannot convert to "):
        load_avhubert(str(write()))


def test_the_licence_is_said_once(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    fairseq_file._say_licence.cache_clear()
    path = str(write())
    for _ in range(2):
        load_avhubert(path)
    assert [r.message for r in caplog.records if "non-commercial" in r.message] == [fairseq_file.LICENCE]
