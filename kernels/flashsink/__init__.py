"""flashsink: attention that measures its own sinks, the decorrelation loss, activation statistics and ACT."""

from flashsink import versions
from flashsink.backends import backends
from flashsink.functional import activation_stats, attention, calibrated_attention, decorrelation_loss
from flashsink.probe import Probe, attach
from flashsink.types import ActivationStats, SinkStats

__version__ = "0.1.0"

__all__ = [
    "ActivationStats",
    "Probe",
    "SinkStats",
    "activation_stats",
    "attach",
    "attention",
    "backends",
    "calibrated_attention",
    "decorrelation_loss",
]

for _package in ("torch", "triton"):  # transformers where it is needed, in attach
    versions.warn(_package)
