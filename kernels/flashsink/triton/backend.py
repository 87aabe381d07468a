"""The ``triton`` backend: NVIDIA sm_80, sm_90 and sm_100, and CPU tensors under TRITON_INTERPRET=1.

Attention takes float16 and bfloat16 with head dims up to 256, and float32 up to 128, of q and of v; everything else
takes all three (float64 goes to the reference) and up to 8192 features.

Where triton cannot be imported (there is none for macOS and Windows, nor with torch's CPU wheels) this module is
empty and ``available`` says so. No module outside this folder imports triton.
"""

from __future__ import annotations

import importlib

from flashsink.operators import register
from flashsink.triton import launch

try:
    version: str = importlib.import_module("triton").__version__
except ImportError as error:
    _missing = f"triton cannot be imported: {error}"
else:
    _missing = ""
    from flashsink.triton.activations import activation_stats
    from flashsink.triton.attention import attention, calibrated_attention, refusal, run_received
    from flashsink.triton.decorrelation import MAX_FEATURES, decorrelation_sums
    from flashsink.triton.norm import rms_norm
    from flashsink.triton.operators import OPERATORS

    register(OPERATORS, "CUDA", "CPU")

__all__ = [
    "MAX_FEATURES",
    "activation_stats",
    "attention",
    "available",
    "calibrated_attention",
    "decorrelation_sums",
    "refusal",
    "rms_norm",
    "run_received",
]


def available() -> str:
    """``"usable"``, or the reason why Triton kernels cannot run here."""
    return _missing or launch.available()
