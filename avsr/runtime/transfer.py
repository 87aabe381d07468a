"""Numbers that go to the device and come back without the host waiting for what the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)``, which on CUDA would wait for the stream."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=True)


class Carrier:
    """Copies tensors to a CUDA device while it computes, on a stream of its own. For another device it does nothing.

    Tensors should be in page-locked memory, or the host waits for their copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Launches the copies. :meth:`receive` has to be called with them before they are used."""
        if self._stream is None:
            return dict(tensors)
        with torch.cuda.stream(self._stream):
            return {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}

    def receive(self, tensors: Iterable[Tensor]) -> None:
        """What is launched from now on waits for all copies; the host does not."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)  # or its memory might be used again before that is done


class Later:
    """The values of a tensor as they are on the device by now, for the host.

    The copy is launched here; :meth:`read` waits for it, and not for what is launched after it.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values.detach(), non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Any:
        """A number, or nested lists of them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
