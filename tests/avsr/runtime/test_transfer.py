"""Copies between host and device; the order on CUDA streams with streams that only write down what happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from avsr.data.batches import Batch
from avsr.runtime.transfer import Carrier, Later, on_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "dtype"), [([[1, 2], [3, 4]], None), ([], torch.int64), ([0.5, True], torch.float64)]
)
def test_values_are_those_of_torch_tensor(values: list[Any], dtype: torch.dtype | None) -> None:
    expected, found = torch.tensor(values, dtype=dtype), on_device(values, CPU, dtype)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_later_gives_the_values_of_now() -> None:
    total, scalar = torch.tensor([1.5, float("inf")], dtype=torch.float64), torch.tensor(2.0, requires_grad=True)
    later, number = Later(total), Later(scalar * 3.0)
    total.zero_()
    assert later.read() == later.read() == [1.5, float("inf")]
    assert number.read() == 6.0


class Tensor:
    """Stands for a tensor on any device."""

    def __init__(self, events: list[Any], name: str) -> None:
        self.events, self.name = events, name

    def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
        self.events.append((f"copy {self.name}", device.type, non_blocking))
        return Tensor(self.events, self.name)

    def record_stream(self, stream: Any) -> None:
        self.events.append((f"keep {self.name}", stream.name))


def test_copies_run_on_a_stream_of_their_own_and_are_waited_for_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Stream:
        def __init__(self, device: Any, name: str = "copies") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append((f"{self.name} waits", other.name))

    @contextmanager
    def stream(given: Stream) -> Iterator[None]:
        events.append(("enter", given.name))
        yield
        events.append(("leave", given.name))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "compute"))
    carrier = Carrier(torch.device("cuda", 0))
    sent: Any = carrier.send({"audio": Tensor(events, "a")})  # type: ignore[dict-item]
    assert events == [("enter", "copies"), ("copy a", "cuda", True), ("leave", "copies")]
    carrier.receive(sent.values())
    assert events[3:] == [("compute waits", "copies"), ("keep a", "compute")]


def test_on_a_cpu_nothing_is_copied() -> None:
    rows = torch.ones(2)
    sent = Carrier(CPU).send({"audio": rows})
    Carrier(CPU).receive(sent.values())
    assert sent["audio"] is rows


def test_the_loader_pins_features_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch([], {"audio": torch.ones(1, 2, 3)}, {"audio": torch.tensor([2])}, [[]], ["audio"])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert isinstance(pinned, Batch) and pinned.features["audio"].eq(2).all()
    assert pinned.lengths is batch.lengths and batch.features["audio"].eq(1).all()
