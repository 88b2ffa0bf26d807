"""Several processes under torchrun: who am I, who writes, wait for the others. One process is the plain case."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# The first process may wait for another run's lock, or write, while the others wait for it; nccl gives them 10 minutes.
# One that dies is not waited for: torchrun ends them all.
_PATIENCE = timedelta(days=1)


def start() -> None:
    """Join the process group that torchrun's environment describes (gloo on CPUs, nccl on GPUs), once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(timeout=_PATIENCE)  # also selects this process's GPU


def stop() -> None:
    """Leave it, when all is done: a process that ends as a member may be aborted by a thread of its group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def gather(mine: list[Any]) -> list[Any]:
    """The lists of all processes, one after another, on every process."""
    if world() == 1:
        return mine
    parts: list[list[Any]] = [[]] * world()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]
