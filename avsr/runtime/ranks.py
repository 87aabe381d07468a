"""What one rank does before the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def after_the_first_rank() -> Iterator[None]:
    """Ranks other than 0 enter when rank 0 has left. All of them have to come here."""
    together = dist.is_initialized() and dist.get_world_size() > 1
    first = not together or dist.get_rank() == 0
    if not first:
        dist.barrier()
    try:
        yield
    finally:
        if together and first:
            dist.barrier()
