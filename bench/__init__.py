"""Benchmarks: ``bench/README.md`` has the claims, the numbers, and how to run and read them."""
