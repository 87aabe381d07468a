"""The ``triton`` backend: NVIDIA sm_80, sm_90 and sm_100, and CPU tensors under TRITON_INTERPRET=1.

Attention takes float16 and bfloat16 with head dims up to 256, and float32 up to 128; everything else takes all three
(float64 goes to the reference) and up to 8192 features.
"""

from __future__ import annotations

from flashsink.gpu.activations import activation_stats
from flashsink.gpu.attention import attention, calibrated_attention, refusal
from flashsink.gpu.decorrelation import decorrelation_sums
from flashsink.gpu.norm import rms_norm

__all__ = ["activation_stats", "attention", "calibrated_attention", "decorrelation_sums", "refusal", "rms_norm"]
