"""How the attention of a validation is shared between the kinds of tokens, without a map of it."""

from __future__ import annotations

import torch

import flashsink
from avsr.models.prompt import KINDS
from avsr.training.losses import all_sum

QUERIES = ("prompt", "text")


class AttentionShares:
    """Adds up what a probe with ``segment_mass`` records: mass between kinds, and entropies, over layers and heads."""

    def __init__(self, device: torch.device) -> None:
        n = len(KINDS)
        self._mass = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._queries = torch.zeros(n, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, probe: flashsink.Probe) -> None:
        """The last forward."""
        masks = torch.stack(list(probe.segment_masks.values())).double()  # (n, B, S)
        for stats in probe.sinks:
            mass, queries, entropy = stats.segment_mass, stats.segment_queries, stats.entropy
            assert mass is not None and queries is not None and entropy is not None
            self._mass += mass.double().sum(dim=(0, 1))
            self._queries += queries.sum(dim=0) * mass.shape[1]
            self._entropy += torch.einsum("nbs,bhs->n", masks, entropy.double())

    def row(self) -> dict[str, float]:
        """Collective. Metrics: the share of a query's attention that goes to each kind, on average over queries, heads
        and layers, and its entropy in nats."""
        found = all_sum(torch.cat([self._mass.flatten(), self._queries, self._entropy]).tolist(), self._mass.device)
        n = len(KINDS)
        mass, queries, entropy = torch.tensor(found).split([n * n, n, n])
        shares = mass.view(n, n) / queries.clamp(min=1)[:, None]
        row = {}
        for query in QUERIES:
            number = KINDS.index(query)
            for key, share in zip(KINDS, shares[number].tolist(), strict=True):
                row[f"validation_attention_{query}_to_{key}"] = share
            row[f"validation_entropy_{query}"] = float(entropy[number] / queries[number].clamp(min=1))
        return row
