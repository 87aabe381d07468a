"""flashsink: attention that measures its own sinks, the decorrelation loss, activation statistics and ACT."""

import sys

from flashsink import dispatch, versions
from flashsink.dispatch import backends
from flashsink.functional import activation_stats, attention, calibrated_attention, decorrelation_loss
from flashsink.hf.probe import Probe, attach
from flashsink.hf.spans import bos_states
from flashsink.types import ActivationStats, SinkStats

__version__ = "0.2.0"

__all__ = [
    "ActivationStats",
    "Probe",
    "SinkStats",
    "activation_stats",
    "attach",
    "attention",
    "backends",
    "bos_states",
    "calibrated_attention",
    "decorrelation_loss",
]

sys.modules[f"{__name__}.backends"] = dispatch  # the module's old name; the attribute is the function

for _package in ("torch", "triton"):  # transformers where it is needed, in attach
    versions.warn(_package)
