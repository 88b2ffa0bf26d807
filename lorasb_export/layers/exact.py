"""Products of fp32 matrices computed in fp32, whatever the caller has allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """TF32 on a GPU, or bf16 on a CPU, is not used in place of fp32 within; afterwards it is as it was.

    Either costs three digits: enough to call a right merge wrong, and to make B and A less orthonormal.
    """
    switches = _switches()
    chosen, allowed = [switch.fp32_precision for switch in switches], _allowed()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)
        for switch, precision in zip(switches, chosen, strict=True):
            inherited = precision == torch.backends.fp32_precision  # type: ignore[attr-defined]
            switch.fp32_precision = "none" if inherited else precision  # and it goes on following that one


def _switches() -> list[Any]:
    """What torch has since 2.9 beside the function, for each backend."""
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul] if hasattr(backends, "fp32_precision") else []


def _allowed() -> str | None:
    """None where the caller has set one of the switches: torch then does not say it in its older words."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
