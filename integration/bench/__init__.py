"""Benchmarks against named peers, measured in one run, in alternation: `python -m integration.bench NAME [--quick]`."""

from lorasb_export import environment

environment.hide_broken_packages()  # before a benchmark or a child process of one imports transformers
