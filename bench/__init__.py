"""Benchmarks: one module a claim in ``bench.claims``; ``bench/README.md`` says how to run and read them."""
