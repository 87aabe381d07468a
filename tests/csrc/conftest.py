"""Fixtures of the tests of the compiled library."""

from __future__ import annotations

import os

import pytest
import torch

from flashsink.cpu import library as native
from flashsink.cpu import short as native_short

LEVELS = [0, 1, 2]  # baseline, AVX2, AVX-512


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Other jobs may hold the cores, and waiting threads then cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def library():
    """The loaded library; without one the test is skipped, or fails where it is required."""
    if native.available() != "usable" and os.environ.get("FLASHSINK_REQUIRE_NATIVE") != "1":
        pytest.skip(native.available())
    return native.library()


@pytest.fixture(params=LEVELS, ids=["baseline", "avx2", "avx512"])
def isa(request, library):
    """The kernels on one instruction set."""
    if library.flashsink_limit_isa(request.param) != request.param:
        pytest.skip("this processor has not got it")
    yield request.param
    library.flashsink_limit_isa(LEVELS[-1])


@pytest.fixture(params=["short", "tiles"])
def kernel(request, monkeypatch):
    """Attention by either of its two kernels, whatever the lengths."""
    monkeypatch.setattr(native_short, "LONGEST", 10**6 if request.param == "short" else -1)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
