"""What a corpus of 1.7 million clips costs, before the first step and later: ``python -m bench.run data``."""
