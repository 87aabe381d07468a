"""Without a GPU Triton's kernels run in its interpreter; it has to be asked for before any kernel is defined."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

# a shell starts what runs in its background with SIGINT ignored, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the files that take longest, which begin first: one of them at the end would leave the other processes idle
LONGEST = (
    "avsr/training/test_distributed.py",
    "bench/test_compile_report.py",
    "bench/test_study_export.py",
    "ptx/test_kernels.py",
    "avsr/training/test_meeting.py",
    "avsr/training/test_resume.py",
    "avsr/data/test_measuring.py",
    "avsr/evaluation/test_ranks.py",
    "avsr/evaluation/test_run.py",
    "flashsink/test_analyze.py",
    "flashsink/test_without_triton.py",
    "avsr/tools/test_analysis_report.py",
)


def pytest_collection_modifyitems(items):
    place = {str(Path(__file__).parent / name): index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
