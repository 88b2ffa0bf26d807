"""Where networks go, and which numbers that device multiplies."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ..environment import accelerate_uses

if TYPE_CHECKING:
    import torch


def default_device() -> torch.device:
    """The accelerator torch sees, else the CPU; the CPU where accelerate's switch says so: a Mac's GPU has no other."""
    import torch

    if accelerate_uses("CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of `dtype`, of those that torch uses. False for bfloat16 on most
    laptops, whose processors lack AVX-512; torch and vLLM imitate such products there."""
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    which: Any = torch.ops.mkldnn
    found: bool = which._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else which._is_mkldnn_fp16_supported()
    return found


def imitates_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's before Ampere, as the T4."""
    import torch

    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
