"""Several processes under torchrun: who am I, who writes, wait for the others. One process is the plain case."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .environment import accelerate_uses
from .errors import LoraSBError, SettingsError, some

T = TypeVar("T")

# What the first process does alone, while the others wait for it: it may wait for another run's lock, or write much.
# Those that compute together get the backend's own patience, 10 minutes with nccl, 30 with gloo.
_PATIENCE = timedelta(days=1)
_SEEN_WITHIN = 90  # seconds: for up to a minute NFS remembers of a file that it was not there
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"  # by DistributedDataParallel, which looks for it on the model
_hosts: dist.ProcessGroup | None = None  # in which they wait so long, without their GPUs


def start() -> None:
    """Join the process group that torchrun's environment describes (gloo on CPUs, nccl on GPUs), once.

    Raises SettingsError where the environment describes it by half; or where the caller has made one that it does not
    describe: rows would be shared, and gradients not.
    """
    global _hosts
    described = _of_environment("WORLD_SIZE", 1)
    if _hosts is None and max(described, world_size()) > 1:
        from accelerate import PartialState

        fix = "Set RANK, LOCAL_RANK and WORLD_SIZE as torchrun does"
        if dist.is_initialized() and (world_size() != described or "LOCAL_RANK" not in os.environ):
            what = f"torch.distributed has {world_size()} processes, which the environment does not describe"
            raise SettingsError(what, fix=fix)
        missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
        if missing and not dist.is_initialized():
            what = f"WORLD_SIZE is {described}, without {' and '.join(missing)}"
            raise SettingsError(what, fix=f"{fix}; or unset WORLD_SIZE, for one process")
        _require_gpu_of_its_own()
        PartialState()  # also selects this process's GPU
        _hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _of_environment(name: str, default: int) -> int:
    """What it says in that variable. Raises SettingsError where that is no whole number."""
    said = os.environ.get(name) or str(default)
    try:
        return int(said)
    except ValueError:
        fix = f"Set it as torchrun does, or unset {name}"
        raise SettingsError(f"{name} is {said!r}, no whole number", fix=fix) from None


def _require_gpu_of_its_own() -> None:
    """Raise SettingsError where accelerate would put two processes on one GPU, which NCCL refuses in its own words."""
    count, place = torch.cuda.device_count(), _of_environment("LOCAL_RANK", 0)
    sees_its_own = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # as SLURM may have it
    if place < count or count == 0 or sees_its_own or dist.is_initialized() or accelerate_uses("CPU"):
        return
    what = f"this is process {place + 1} of this machine, and it sees {count} GPU{'s' if count > 1 else ''}"
    fix = "Start one process for each GPU, and let each see all of them; or set ACCELERATE_USE_CPU=1"
    raise SettingsError(what, fix=fix)


def stop() -> None:
    """Leave it, when all is done: a process that ends as a member may be aborted by a thread of its group."""
    global _hosts
    if dist.is_initialized():
        dist.destroy_process_group()
        _hosts = None


def world_size() -> int:
    """How many processes compute together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def send_only_trained(network: torch.nn.Module) -> None:
    """Every process has read the same frozen base: it is not sent to all again when a run begins."""
    setattr(network, _NOT_SENT, [name for name, p in network.named_parameters() if not p.requires_grad])


def send_all(network: torch.nn.Module) -> None:
    """Undo `send_only_trained`."""
    vars(network).pop(_NOT_SENT, None)


def barrier() -> None:
    """Block until every process has called this."""
    if world_size() > 1:
        dist.barrier(_hosts)


def any_process(mine: bool) -> bool:
    """Whether `mine` is true on any process. It uses gloo, so no GPU is synchronized."""
    if world_size() == 1:
        return mine
    found = torch.tensor(int(mine))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_hosts)
    return bool(found)


def on_main(decide: Callable[[], T]) -> T:
    """What the first process finds or does, or the error that it meets, on every process.

    Each by its own look at the disk might see something else, and then wait for what the others never do.
    """
    if world_size() == 1:
        return decide()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = decide()
        except (LoraSBError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, group=_hosts)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def require_same_disk(folder: Path) -> None:
    """Raise SettingsError unless every process sees in `folder` what the first one writes there."""
    if world_size() == 1:
        return

    def write() -> str:
        name = f".seen-by-all-{uuid.uuid4().hex[:12]}"
        (folder / name).touch()
        return name

    path, end = folder / on_main(write), time.monotonic() + _SEEN_WITHIN
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    blind = all_gather([] if path.exists() else [str(rank())])
    if is_main():
        path.unlink()
    if blind:
        who = f"number {blind[0]} does" if len(blind) == 1 else f"numbers {', '.join(blind)} do"
        raise SettingsError(
            f"of the {world_size()} processes {who} not see what number 0 writes",
            where=folder,
            fix="Put the project on a disk that all nodes share",
        )


def require_same_inputs(inputs: Callable[[], Mapping[str, Any]]) -> None:
    """Raise SettingsError, on every process, unless all are about to compute with the same.

    A node may have a copy of its own, of other rows, or an older commit in its cache: gradients of both would be
    averaged, or one process would wait for a step that the others never take.

    Args:
        inputs: name → JSON; not asked for where there is one process.
    """
    if world_size() == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True) for name, value in inputs().items()}
    mine = {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}
    (_, first), *others = all_gather([(os.uname().nodename, mine)])
    differing = []
    for number, (host, theirs) in enumerate(others, 1):
        if names := [name for name in first | theirs if first.get(name) != theirs.get(name)]:
            differing.append(f"number {number} (on {host}) has other {', '.join(names)}")
    if differing:
        raise SettingsError(
            f"of the {world_size()} processes not all have the inputs of number 0: {some(differing)}",
            fix="Let all nodes see the same files, and name what is on the Hub as owner/name@revision",
        )


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's share of `items`; `all_gather` puts together what the processes make of theirs."""
    return items[rank() :: world_size()]


def all_gather(mine: list[Any]) -> list[Any]:
    """The lists of all processes, one after another, on every process."""
    if world_size() == 1:
        return mine
    parts: list[list[Any]] = [[]] * world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def all_gather_by_name(mine: Mapping[str, T]) -> dict[str, T]:
    """The entries of all processes, which have different names, sorted by them, on every process."""
    return dict(sorted(all_gather(list(mine.items())), key=lambda item: item[0]))
