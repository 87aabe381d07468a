"""Landmark files: what numpy and pickle write is read back, and a pickle that names anything else is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avsr.data.mouth.inert import read_pickle
from avsr.data.mouth.landmarks import find_landmarks, read_landmarks
from avsr.errors import UserError


def some_landmarks(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 200, (count, 68, 2)).astype(np.float32)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_landmarks(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8", "<u2"])
def test_pickles_of_arrays(tmp_path: Path, protocol: int, dtype: str) -> None:
    frames: list[Any] = [frame.astype(dtype) for frame in some_landmarks()]
    expected = np.stack(frames).astype(np.float32)
    frames[3] = None
    frames[4] = np.asfortranarray(frames[4])
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(frames, protocol=protocol))
    found = read_landmarks(path)
    assert found.dtype == np.float32 and np.isnan(found[3]).all()
    np.testing.assert_array_equal(found[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


def test_other_shapes_of_pickles(tmp_path: Path) -> None:
    landmarks, path = some_landmarks(), tmp_path / "x.pkl"
    for value in (
        landmarks,
        {"landmarks": landmarks},
        tuple(landmarks),
        [frame.tolist() for frame in landmarks],
        [[(np.float32(x), np.float32(y)) for x, y in frame] for frame in landmarks],
        [np.concatenate([frame, np.ones((68, 1))], axis=1) for frame in landmarks],  # with a confidence
    ):
        path.write_bytes(pickle.dumps(value))
        np.testing.assert_allclose(read_landmarks(path), landmarks, rtol=1e-6)
    path.write_bytes(pickle.dumps([None, [], landmarks[0]]))
    assert np.isnan(read_landmarks(path)[:2]).all()


def test_the_pickles_of_old_numpy(tmp_path: Path) -> None:
    """Before numpy 2 the module was numpy.core, and Python 2 wrote the data as text."""
    frame = some_landmarks(1)[0]
    data = pickle.dumps([frame], protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_landmarks(path)[0], frame)


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch OWNED",), "posix.system"),
        (eval, ("open('OWNED', 'w')",), "builtins.eval"),
        (subprocess.Popen, (["touch", "OWNED"],), "subprocess.Popen"),
        (np.load, ("OWNED",), "numpy.load"),
        (np.fromfile, ("OWNED",), "numpy"),
        (OrderedDict, (), "collections.OrderedDict"),
        (getattr, (np, "load"), "builtins.getattr"),
    ],
)
def test_a_foreign_name_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, arguments: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    hidden = [some_landmarks(1)[0], {"a": (Evil(function, *arguments),)}]
    if function is getattr:
        hidden = [Evil(getattr, some_landmarks(1), "tofile")]
    path.write_bytes(pickle.dumps(hidden))
    assert name in refusal(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([np.array([{}, None], dtype=object)]))
    assert "numbers" in refusal(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", pickle.dumps([some_landmarks(1)[0]])[:-40], b"\x80\x04\x95", b"cnumpy\ndtype\n(S'f8'\ntRb."],
)
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    refusal(path)


def test_a_shape_that_does_not_fit_its_data(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    data = pickle.dumps([np.zeros((68, 2), np.float32)], protocol=2)
    assert data.count(b"KDK\x02") == 1  # 68 and 2
    path.write_bytes(data.replace(b"KDK\x02", b"K\xf0K\x02"))
    assert "pickle" in refusal(path)


def test_array_files(tmp_path: Path) -> None:
    landmarks = some_landmarks()
    landmarks[2] = np.nan
    np.save(tmp_path / "a.npy", landmarks)
    np.savez_compressed(tmp_path / "b.npz", landmarks=landmarks.astype(np.float64), other=1)
    for name in ("a.npy", "b.npz"):
        np.testing.assert_array_equal(read_landmarks(tmp_path / name), landmarks)
    np.savez(tmp_path / "c.npz", points=landmarks)
    assert "points" in refusal(tmp_path / "c.npz")
    np.save(tmp_path / "d.npy", np.array([None, landmarks[0]], dtype=object), allow_pickle=True)
    refusal(tmp_path / "d.npy")
    (tmp_path / "e.npy").write_bytes(b"no array")
    refusal(tmp_path / "e.npy")
    (tmp_path / "f.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:200])
    refusal(tmp_path / "f.npz")


@pytest.mark.parametrize(
    "value", [np.zeros((5, 5, 2)), np.zeros((68, 2)), np.zeros((3, 68, 2), complex), np.zeros(3, "U3")]
)
def test_arrays_of_the_wrong_kind(tmp_path: Path, value: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", value)
    assert "(T, 68, 2)" in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("value", [{"points": []}, "text", 3, [np.zeros((5, 2))], ["text"], [[[1], [2, 3]]], [3.0]])
def test_pickles_of_the_wrong_kind(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    refusal(tmp_path / "a.pkl")


def test_plain_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    value = {"a": [1, 2.5, None, True, "text", b"bytes"], 2: (1, (2,))}
    path.write_bytes(pickle.dumps(value))
    assert read_pickle(path) == value


def test_finding_the_file(tmp_path: Path) -> None:
    assert find_landmarks(tmp_path, "a/b") is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.pkl").touch()
    assert find_landmarks(tmp_path, "a/b") == tmp_path / "a/b.pkl"
    (tmp_path / "a/b.npz").touch()
    assert find_landmarks(tmp_path, "a/b") == tmp_path / "a/b.npz"
