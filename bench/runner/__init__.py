"""The runner: ``measure`` times providers in turns, ``ledger`` keeps the rows, ``report`` makes the claim table."""
