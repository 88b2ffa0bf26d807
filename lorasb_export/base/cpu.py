"""What this machine's CPU can multiply."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of `dtype`, of those that torch uses. False for bfloat16 on most
    laptops, whose processors lack AVX-512; torch and vLLM imitate such products there."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    which: Any = torch.ops.mkldnn
    found: bool = which._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else which._is_mkldnn_fp16_supported()
    return found
