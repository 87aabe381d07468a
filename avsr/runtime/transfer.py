"""Numbers that go to the device and come back without the host waiting for what the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)``, which on CUDA would wait for the stream."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=True)


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
