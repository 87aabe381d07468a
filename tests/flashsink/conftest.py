"""Fixtures of the flashsink tests: the backends, and tiny Hugging Face decoders."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that the tests share

import bf16_interpreter
import cases
import decoders

from flashsink.triton.launch import INTERPRETED

if INTERPRETED:
    bf16_interpreter.install()


MANY = 8  # interpreted cases of a test


def pytest_collection_modifyitems(items):
    """``make check`` leaves out what runs kernels in Triton's interpreter, and of tests that run there in many cases
    ``make test`` runs every third."""
    interpreted = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("chosen") == "triton" or any(
            isinstance(value, cases.Backend) and value.interpreted for value in params.values()
        ):
            item.add_marker(pytest.mark.interpreter)
            interpreted.setdefault((item.path, item.originalname), []).append(item)
    for cases_of_one in interpreted.values():
        for number, item in enumerate(cases_of_one):
            if len(cases_of_one) > MANY and number % 3:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=cases.BACKENDS, ids=str)
def backend(request, monkeypatch):
    """A :class:`cases.Backend`, at work; ``@on(...)`` names others."""
    with request.param.active(monkeypatch, poison="tracing" not in request.fixturenames):
        yield request.param


@pytest.fixture
def tracing():
    """For tests that trace or compile: unwritten outputs are left as they are."""


@pytest.fixture
def threads():
    """The function that sets the number of threads."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """The function ``build(kind, lora=False, **config)``."""
    return decoders.build


@pytest.fixture(
    params=[*((kind, False) for kind in decoders.KINDS), ("llama", True)],
    ids=lambda p: p[0] + ("-lora" if p[1] else ""),
)
def model(request):
    """Every kind of model, and one with LoRA, freshly made."""
    return decoders.build(*request.param)


@pytest.fixture(params=["none", "right", "left", "both"])
def padding(request):
    """(kind, ids, attention_mask or None, starts, lengths) of three rows of 12 tokens."""
    starts, lengths = {
        "none": ([0, 0, 0], [12, 12, 12]),
        "right": ([0, 0, 0], [12, 7, 1]),
        "left": ([0, 5, 10], [12, 7, 2]),
        "both": ([3, 0, 4], [9, 6, 3]),
    }[request.param]
    ids, mask = decoders.padded(decoders.ids(3, 12, seed=7), torch.tensor(starts), torch.tensor(lengths))
    return request.param, ids, None if request.param == "none" else mask, torch.tensor(starts), torch.tensor(lengths)


@pytest.fixture
def no_collection(monkeypatch):
    """accelerate collects garbage at the start of every training, which takes half a second here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
