"""Whether an error says that memory is full: the host's, or a GPU's."""

from __future__ import annotations

import sys

_OF_CPU = "DefaultCPUAllocator"
# Of Apple's GPU, of what CUDA, cuBLAS and cuSOLVER take besides torch's allocator.
_OUT_OF_MEMORY = (
    "MPS backend out of memory",
    "Invalid buffer size",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cublasCreate(handle)",
    "cusolverDnCreate(handle)",
)


def is_out_of_memory(error: Exception) -> bool:
    """On a GPU torch has a class for it; elsewhere it is a RuntimeError of an allocator."""
    torch = sys.modules.get("torch")  # without it, it was not torch
    of_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_torch or is_out_of_host_memory(error) or any(words in str(error) for words in _OUT_OF_MEMORY)


def is_out_of_host_memory(error: Exception) -> bool:
    """Whether it is the CPU's memory that is full."""
    return isinstance(error, MemoryError) or _OF_CPU in str(error)
