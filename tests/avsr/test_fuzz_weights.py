"""Weights and checkpoints of any content: read, or refused with a message, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from avsr.config import load_config
from avsr.data.mouth import inert
from avsr.data.mouth.landmarks import read_landmarks
from avsr.errors import UserError
from avsr.models.avhubert_network import AVHubert, AVHubertConfig
from avsr.models.formats.ctranslate2 import load_whisper_encoder
from avsr.models.formats.fairseq_file import load_avhubert, read_fairseq
from avsr.models.formats.official import official_task, read_official
from avsr.models.visual import FORMAT, VisualConfig, VisualModel, load_visual
from avsr.runtime import folders
from avsr.training import resume
from avsr.training.run import make_trainer

pytestmark = pytest.mark.integration

tools = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fuzzing.py"))))
few_and_many = pytest.mark.parametrize("count", tools.CASES)


class Planted:
    """Pickled, it is a call that makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.marker),)


def safetensors(header: bytes, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


HEADER = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}, "__metadata__": {"step": "3"}}


def each_header() -> list[bytes]:
    found = [safetensors(text) for text in tools.each_changed(HEADER)]
    return [*found, b"", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**31) + b"{}", safetensors(b"{}")]


@pytest.fixture(scope="module")
def avhubert() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AVHubert(AVHubertConfig(width=64, ffn=8, layers=1, channels=1)).state_dict()


def hollow() -> list[torch.Tensor]:
    """Tensors that say more than they hold."""
    return [
        torch.zeros(1).expand(2**40),
        torch.zeros(1).as_strided((2**20, 2**20), (0, 0)),
        torch.empty(2**40, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (2**30, 2**30)),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    ]


@few_and_many
def test_foreign_torch_files(
    count: int, tmp_path: Path, avhubert: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "cache"))
    marker, path = tmp_path / "marker", tmp_path / "a.pt"

    def saved(content: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    small = {"model": OrderedDict(list(avhubert.items())[:6]), "cfg": {"model": {"layer_norm_first": True}}}
    official = {"audio_proj.0.weight": torch.zeros(4, 4), "llm.x": torch.zeros(2)}
    name = "post_extract_proj.weight"
    always = [saved({"model": {**avhubert, name: tensor}}) for tensor in hollow()]
    always += [saved({"audio_proj.0.weight": tensor}) for tensor in hollow()]
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        always += [saved({"model": {"a": Planted(marker)}}, **options), saved(Planted(marker), **options)]
    always += [pickle.dumps(Planted(marker)), pickle.dumps({"model": Planted(marker)}, 0)]
    always += [saved({"model": value}) for value in ([1], None, {1: 2}, {"a": "b"}, {})]
    cases = st.sampled_from(
        [saved(small), saved(small, _use_new_zipfile_serialization=False), saved(official), always[-7]]
    )

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for read in (read_fairseq, lambda path: official_task(read_official(path), path)):
            try:
                with tools.bounded(strict=False):  # torch's unpickler makes room for what a text says of its length
                    read(path)
            finally:
                assert not marker.exists()

    tools.fuzz(count, cases.flatmap(lambda data: tools.damaged(data, 2_000)), check, always)


@pytest.mark.parametrize("number", range(5))
def test_tensors_without_their_values_are_refused(
    number: int, tmp_path: Path, avhubert: dict[str, torch.Tensor]
) -> None:
    torch.save({"model": {**avhubert, "post_extract_proj.weight": hollow()[number]}}, tmp_path / "a.pt")
    with tools.bounded(), pytest.raises(UserError, match="without its values"):
        read_fairseq(tmp_path / "a.pt")


def test_groups_that_do_not_divide_the_width_are_refused(tmp_path: Path, avhubert: dict[str, torch.Tensor]) -> None:
    """Its convolution would fail at the first clip."""
    save_file({**avhubert, "encoder.pos_conv.0.weight_v": torch.zeros(64, 3, 128)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no multiple of 3 channels"):
        load_avhubert(str(tmp_path / "a.safetensors"))


@few_and_many
def test_converted_avhubert(count: int, tmp_path: Path, avhubert: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    whole = save(avhubert)
    name = st.sampled_from(sorted(avhubert))
    side = st.sampled_from([0, 1, 2, 3, 7, 8, 64, 104, 129, 1024])

    def other(case: tuple[str, list[int]]) -> bytes:
        numel = int(np.prod(case[1]))
        return save({**avhubert, case[0]: torch.zeros(case[1] if numel <= 2**16 else [1])})

    swapped = st.tuples(name, st.lists(side, max_size=5)).map(other)
    extra = [save({**avhubert, f"encoder.layers.{n}.fc1.weight": torch.zeros(1)}) for n in (1, 9, 10**30)]
    many = save({**avhubert, **{f"encoder.layers.{n}.x": torch.zeros(1) for n in range(3_000)}})

    cases, always = st.one_of(tools.damaged(whole, 4_000), swapped), [*each_header(), *extra, many]
    tools.fuzz_file(count, path, cases, lambda: load_avhubert(str(path)), always)


def ct2(variables: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], version: int = 6) -> bytes:
    """A CTranslate2 file; ``shapes`` are what it says in place of the arrays' own."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, array in variables.items():
        shape = shapes.get(name, array.shape)
        parts += [text(f"encoder/{name}"), struct.pack(f"<B{len(shape)}I", len(shape), *shape)]
        parts += [struct.pack("<BI", 0 if array.dtype == np.float32 else 3, array.nbytes), array.tobytes()]
    return b"".join(parts)


def whisper(width: int = 4, ffn: int = 8, mels: int = 3, positions: int = 5) -> dict[str, np.ndarray]:
    sizes: dict[str, tuple[int, ...]] = {
        "conv1/weight": (width, mels, 3),
        "conv1/bias": (width,),
        "conv2/weight": (width, width, 3),
        "conv2/bias": (width,),
        "position_encodings/encodings": (positions, width),
        "layer_norm/gamma": (width,),
        "layer_norm/beta": (width,),
    }
    layer = {"linear_0/weight": (3 * width, width), "linear_0/bias": (3 * width,), "linear_1/weight": (width, width)}
    layer |= {"linear_1/bias": (width,), "layer_norm/gamma": (width,), "layer_norm/beta": (width,)}
    sizes |= {f"layer_0/self_attention/{name}": size for name, size in layer.items()}
    layer |= {"linear_0/weight": (ffn, width), "linear_0/bias": (ffn,), "linear_1/weight": (width, ffn)}
    sizes |= {f"layer_0/ffn/{name}": size for name, size in layer.items()}
    arrays = {name: np.ones(size, np.float32) for name, size in sizes.items()}
    return {**arrays, "num_heads": np.array(2, np.int32)}


@few_and_many
def test_ctranslate2_files(count: int, tmp_path: Path) -> None:
    good = whisper()
    whole, path = ct2(good, {}), tmp_path / "model.bin"
    path.write_bytes(whole)
    assert load_whisper_encoder(path).config.d_model == 4
    huge = {**good, "conv1/weight": np.zeros((0,), np.float32)}
    always = [ct2(huge, {"conv1/weight": (2**32 - 1, 0, 3)}), ct2(good, {}, 5)]
    always += [ct2({**good, "conv1/weight": np.zeros((60_000, 1, 1), np.float32)}, {})]
    always += [ct2({**good, f"layer_{n}/x": good["conv1/bias"]}, {}) for n in ("1", "²", "99999999", "9" * 400, "-1")]
    always += [ct2({**good, "num_heads": np.array(n, np.int32)}, {}) for n in (0, -1, 3, 2**31 - 1, [1, 2])]
    always += [ct2({k: v for k, v in good.items() if k != name}, {}) for name in good]
    always += [ct2({**good, name: np.zeros(3, np.float32)}, {}) for name in good]

    tools.fuzz_file(count, path, tools.damaged(whole, 300), lambda: load_whisper_encoder(path), always)


@few_and_many
def test_visual_encoders(count: int, tmp_path: Path) -> None:
    model = VisualModel(VisualConfig(pool=11, channels=[1, 1, 1], width=4, hidden=2, layers=1), ["a", "b"], ["u"])
    save_file(model.state_dict(), str(tmp_path / "model.safetensors"))
    sizes = {"pool": 11, "channels": [1, 1, 1], "width": 4, "hidden": 2, "layers": 1, "dropout": 0.2}
    about = {"format": FORMAT, "model": sizes, "visemes": ["a", "b"], "units": ["u"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(about))
    assert load_visual(tmp_path).config.hidden == 2

    wide = [json.dumps({**about, "model": {**sizes, key: 10**n}}).encode() for key in sizes for n in (5, 9)]
    tools.fuzz_json(count, path, about, lambda: load_visual(tmp_path), *wide)


def headers(plain: bytes) -> list[bytes]:
    """A .npy file with headers that say something else."""
    header, data = plain[10:128], plain[128:]

    def headed(text: bytes, version: bytes = b"\1\0") -> bytes:
        size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
        return b"\x93NUMPY" + version + size + text + data

    shapes = [b"(%d, 68, 2)" % 2**40, b"(-1, 68, 2)", b"(" * 90 + b")" * 90, b"(2**62,)", b"3", b"(3, 68, 2.5)", b"'"]
    found = [headed(header.replace(b"(3, 68, 2)", shape)) for shape in shapes]
    kinds = [b"'O'", b"'V0'", b"[('a', 'O')]", b"'<f4000'"]
    found += [headed(header.replace(b"'<f4'", kind)) for kind in kinds]
    found += [headed(header, version) for version in (b"\2\0", b"\3\0", b"\xff\0")]
    return [*found, headed(b"[" * 60_000)]


@few_and_many
def test_landmark_files(count: int, tmp_path: Path) -> None:
    points = np.zeros((3, 68, 2), np.float32)
    marker = tmp_path / "marker"
    np.save(tmp_path / "a.npy", points)
    np.savez(tmp_path / "a.npz", landmarks=points)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        head = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": (2**19, 68, 2)}
        np.lib.format.write_array_header_1_0(head, about)
        file.writestr("landmarks.npy", head.getvalue() + bytes(2**19 * 68 * 2 * 4))
    plain, packed = (tmp_path / "a.npy").read_bytes(), (tmp_path / "a.npz").read_bytes()
    listed = pickle.dumps([points[0], None, points[1].tolist()])
    always = [("npz", (tmp_path / "bomb.npz").read_bytes()), *(("npy", data) for data in headers(plain))]
    memo = b"\x80\x02K\x01r\xff\xff\xff\x7f."
    hostile = [
        [10**400],
        [[1, [2]]],
        [np.array(1.0)],
        [None] * 90_001,
        {"landmarks": points},
        {1: 2},
        "x",
        [{}],
        [points[0]] * 3,
    ]
    always += [("pkl", data) for data in (memo, b"(" * 10_000, b"]" + b"]" * 5_000 + b"a" * 5_000 + b".")]
    always += [("pkl", pickle.dumps(value)) for value in (*hostile, Planted(marker), [Planted(marker)])]
    cases = st.one_of(
        *(
            tools.damaged(data).map(lambda found, kind=kind: (kind, found))
            for kind, data in (("npy", plain), ("npz", packed), ("pkl", listed), ("pkl", always[-1][1]))
        )
    )

    def check(case: tuple[str, bytes]) -> None:
        path = tmp_path / f"case.{case[0]}"
        path.write_bytes(case[1])
        try:
            found = read_landmarks(path)
            assert found.shape[1:] == (68, 2) and found.dtype == np.float32
        finally:
            assert not marker.exists()

    tools.fuzz(count, cases, check, always)


def test_a_pickle_changes_nothing_in_this_process(tmp_path: Path) -> None:
    """A pickle may set attributes of what it names."""
    call, planted = b"cnumpy.core.multiarray\n_reconstruct\n", b"X\x07\x00\x00\x00planted"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + call + b"N}" + planted + planted + b"s\x86b.")
    with pytest.raises(UserError):
        read_landmarks(tmp_path / "a.pkl")
    assert not vars(inert._reconstruct)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([np.zeros((68, 2), np.float32)]))
    assert read_landmarks(tmp_path / "b.pkl").shape == (1, 68, 2)


@pytest.mark.parametrize("kind", ["pkl", "npy"])
def test_landmarks_of_more_than_an_hour_are_refused(kind: str, tmp_path: Path) -> None:
    """A frame without a face is one byte of a pickle and 544 bytes of memory."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(pickle.dumps([None] * 90_001))
    if kind == "npy":
        np.save(path, np.zeros((90_001, 68, 2), np.int8))
    with pytest.raises(UserError, match="90001 frames, more than the 90000 of an hour"):
        read_landmarks(path)


@few_and_many
def test_checkpoints_of_a_run(
    count: int, tmp_path: Path, tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sealed again after every change: the sums of a folder say that it is whole, not that it is ours."""
    recipe = str(tiny_recipe(tmp_path, **{"training.steps": 2}))
    trainer = make_trainer(load_config(recipe))
    trainer.fit()
    whole, case = tmp_path / "run" / "checkpoints" / "last", tmp_path / "run" / "checkpoints" / "case"
    config = load_config(recipe, ["resume=true"])
    state = json.loads((whole / "state.json").read_text())
    state["random"][1] = state["random"][1][:4]  # its 625 numbers are alike
    monkeypatch.setattr(folders, "flush", lambda path: None)  # half of the time of a case

    def check(change: tuple[str, bytes]) -> None:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(whole, case)
        (case / change[0]).write_bytes(change[1])
        folders.seal(case)
        assert not folders.damage(case)
        start = resume.load_start(config, "case", trainer.model)
        assert start is not None
        resume._check_parts(start.record, 1, 1)
        resume.load_engine(trainer.engine, start)

    check(("state.json", (whole / "state.json").read_bytes()))
    full = json.loads((whole / "state.json").read_text())
    files = {
        name: (whole / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "generators.safetensors")
    }
    always: list[tuple[str, bytes]] = []
    for key in full:
        inner = {"random": state["random"]}.get(key, full[key])
        for text in tools.each_changed({key: inner}):
            try:
                always.append(("state.json", tools.to_text({**full, **json.loads(text)}).encode()))
            except (ValueError, RecursionError, AttributeError, TypeError):
                always.append(("state.json", text))
    always = always[:: 3 if count == tools.FEW else 1]
    stride = 9 if count == tools.FEW else 3
    always += [(name, header) for index, name in enumerate(files) for header in each_header()[index::stride]]
    for name in ("optimizer.safetensors", "generators.safetensors"):
        held = load(files[name])
        for other in (lambda value: value[None], lambda value: value.to(torch.int64), lambda value: value[:1].clone()):
            always.append((name, save({key: other(value).contiguous() for key, value in held.items()})))
        always.append((name, save({"other": torch.zeros(1)})))
    parts = [tools.damaged(data, 3_000).map(lambda found, name=name: (name, found)) for name, data in files.items()]
    parts += [tools.json_file({**full, "random": state["random"]}).map(lambda found: ("state.json", found))]
    parts += [tools.damaged((whole / "config.yaml").read_bytes(), 2_000).map(lambda found: ("config.yaml", found))]
    tools.fuzz(count, st.one_of(*parts), check, always)


def test_archives_are_read_where_they_are(tmp_path: Path) -> None:
    """A zip whose names lead out of any folder writes nothing."""
    for name in ("a.npz", "a.pt"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("../../outside.npy", b"x")
            file.writestr("/tmp/../landmarks.npy", b"x")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(UserError):
        read_landmarks(tmp_path / "a.npz")
    with pytest.raises(UserError):
        read_official(tmp_path / "a.pt")
    assert sorted(tmp_path.parent.rglob("*")) == before
