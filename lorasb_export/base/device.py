"""Where networks go, and which numbers that device multiplies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..environment import accelerate_uses
from ..errors import SettingsError
from ..out_of_memory import is_out_of_host_memory, is_out_of_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

_IN_FLOAT32 = (
    "the base is in float32: with --dtype %s it takes half the memory, and the tensor cores of a GPU compute it "
    "(--dtype float32 keeps it and silences this warning)"
)
_IN_BFLOAT16 = (
    "this GPU imitates bfloat16, the base's dtype: --dtype float16 is faster, and where that overflows float32 "
    "(--dtype bfloat16 keeps it and silences this warning)"
)


def default_device() -> torch.device:
    """The accelerator torch sees, else the CPU; the CPU where accelerate's switch says so: a Mac's GPU has no other."""
    import torch

    if accelerate_uses("CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def where_there_is_room(compute: Callable[[torch.device], T], what: str) -> T:
    """`compute` on the default device; where its memory is full, as beside a server, on the CPU.

    Args:
        what: is computed, for a warning.
    """
    import torch

    device = default_device()
    try:
        return compute(device)
    except Exception as error:
        if device.type == "cpu" or is_out_of_host_memory(error) or not is_out_of_memory(error):
            raise
    # Only now: the error held what was in memory.
    warn_of_no_room(device, what)
    return compute(torch.device("cpu"))


@cache  # not for every weight
def warn_of_no_room(device: torch.device, what: str) -> None:
    logger.warning("%s has no room to %s: the CPU does it, which takes longer", device, what)


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


def check_dtype(loaded: torch.dtype, device: torch.device, folder: Path, *, was_chosen: bool) -> None:
    """Raise SettingsError where `device` has no numbers as the base in `folder` was `loaded` in.

    Warns of those that it is slow with, unless they were chosen.
    """
    import torch

    if device.type == "mps" and loaded == torch.float64:
        fix = "Use --dtype float32, or set ACCELERATE_USE_CPU=1 in the environment"
        raise SettingsError("Apple's GPUs have no float64", where=folder, fix=fix)
    if was_chosen or device.type == "cpu":
        return
    imitates = imitates_bfloat16(device)
    if loaded == torch.float32:
        logger.warning(_IN_FLOAT32, "float16" if imitates else "bfloat16")
    if loaded == torch.bfloat16 and imitates:
        logger.warning(_IN_BFLOAT16)
