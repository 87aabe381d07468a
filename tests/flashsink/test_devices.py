"""GPUs that flashsink's kernels are not made for are refused by name; ``backend=None`` then takes the reference."""

from __future__ import annotations

import pytest
import torch

import flashsink
from flashsink import dispatch
from flashsink.triton import launch


@pytest.fixture
def machine(monkeypatch):
    """The function that makes torch report GPUs of a ``capability``, and a build."""

    def pretend(capability=None, hip=None, cuda=None):
        monkeypatch.setattr(launch, "INTERPRETED", False)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return pretend


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_rocm(machine, name):
    """An MI300X is a CUDA device of capability 9.4 to torch."""
    machine((9, 4), hip="6.2.41133")
    assert flashsink.backends()[name].startswith("ROCm is not supported: ")
    with pytest.raises(ValueError, match=f"backend: '{name}' cannot be used: ROCm is not supported"):
        dispatch.select(name, "cuda")
    assert dispatch.select(None, "cuda") == "reference"


def test_old_gpus(machine):
    machine((7, 5), cuda="13.0")
    assert "8.0" in flashsink.backends()["triton"] and "7.5" in flashsink.backends()["sdpa"]
    assert dispatch.select(None, "cuda") == "reference"


def test_what_is_known(machine):
    machine((9, 0), cuda="13.0")
    assert flashsink.backends()["triton"] == flashsink.backends()["sdpa"] == "usable"
    assert dispatch.select(None, "cuda") == "triton"


@pytest.mark.parametrize(("cuda", "reason"), [(None, "built without CUDA"), ("13.0", "no CUDA device")])
def test_no_gpu(machine, cuda, reason):
    machine(cuda=cuda)
    assert reason in flashsink.backends()["triton"]
    with pytest.raises(ValueError, match=f"backend: 'triton' cannot be used: .*{reason}"):
        dispatch.select("triton", "cpu")


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_other_devices(machine, device):
    machine((9, 0), cuda="13.0")
    for name in ("cpu", "sdpa", "triton"):
        with pytest.raises(ValueError, match=f"backend: '{name}' takes tensors on .*{device}"):
            dispatch.select(name, device)
    assert dispatch.select(None, device) == dispatch.select("reference", device) == "reference"
