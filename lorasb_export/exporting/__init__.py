"""Adapters in other formats."""
