"""Harnesses that try to break things: `python -m integration.torture NAME --n N --seed S`."""
