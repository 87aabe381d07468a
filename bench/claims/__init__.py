"""One module a claim of the table in ``bench/README.md``. Each has

``CLAIMS``: the rows of the table that it fills, and ``run(bench)``, which measures and reports them.
``python -m bench.run NAME`` runs the module NAME of this package alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A row of the claim table: id in the ledger, what the ratio is, and the targets on the CPU and on an H200;
    "-" where there is none."""

    name: str
    text: str
    cpu: str
    gpu: str


# in the order of the table; a module may hold several rows
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
