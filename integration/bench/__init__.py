"""Benchmarks against named peers, measured in one run, in alternation: `python -m integration.bench NAME [--quick]`."""
