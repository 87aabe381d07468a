"""One module per claim of the table in ``bench/README.md``. A module defines

``CLAIMS``: the table rows that it fills, and ``comparisons(bench)``: what is measured for them, in order.
``python -m bench.run NAME`` measures one module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A row of the claim table: id in the ledger, what the ratio is, and the targets on the CPU and on an H200
    ("-" = not measured there, "report" = no target)."""

    name: str
    text: str
    cpu: str
    gpu: str


# in the order of the table; a module may fill several rows
MODULES = (
    "attention_statistics",
    "packed_headline",
    "long_rows",
    "forward_statistics",
    "eager_attention",
    "flag_attention",
    "decorrelation",
    "norm",
    "loss_memory",
    "training_step",
    "options",
)
