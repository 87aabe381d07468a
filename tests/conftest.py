"""Without a GPU Triton's kernels run in its interpreter; it has to be asked for before any kernel is defined."""

from __future__ import annotations

import os
import signal

import torch

# a shell starts what runs in its background with SIGINT ignored, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
