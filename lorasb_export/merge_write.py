"""One merged shard, streamed: a few threads, each with a block of rows to read, sum, round and write.

What does not change is copied by the kernel (`copy_file_range`, which shares blocks where the file system can). Memory
holds the factors of one or two modules and a few megabytes a thread, whatever the size of the model or of a tensor.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import merge_sum
from .basis_file import TORCH_DTYPES
from .errors import ArtifactError
from .merge_plan import MergePlan, PlannedTensor
from .retained import Retained
from .storage import DTYPE_BYTES

MAX_THREADS = 8
PIECE = 1 << 19  # entries of a block: its two fp32 copies and the bytes around them stay near the L2 cache
MEASURED = 8  # one block in so many says what bf16 retains: the sums of 64,000 entries and more are sharp enough
_COPY_BYTES = 64 << 20

Done = tuple[Retained | None, int]  # of one piece: the error of rounding where it was touched, and bytes written


@contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each of which computes alone: they share no barrier and overlap their I/O."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here too: helpers that wait for this thread's next product would spin on a core
    pool = ThreadPoolExecutor(min(threads, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # what a thread sets holds for the math library of the whole process


def write_shard(
    path: Path, shard: tuple[PlannedTensor, ...], plan: MergePlan, pool: ThreadPoolExecutor, bar: Any
) -> dict[str, Retained]:
    """Write one safetensors file; not fsynced.

    Returns:
        module → what its stored weight retains of the update.

    Raises:
        ArtifactError: a factor of the basis is not finite, or a weight overflows the stored dtype.
    """
    header, starts = _layout(shard)
    found: dict[str, Retained] = {}
    waiting: deque[tuple[str | None, Future[Done]]] = deque()

    def collect() -> None:
        module, future = waiting.popleft()
        retained, nbytes = future.result()
        if module is not None and retained is not None:
            found[module] = found.get(module, Retained()) + retained
        bar.update(nbytes)

    with ExitStack() as stack:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        stack.callback(os.close, out)
        os.pwrite(out, header, 0)
        files = {}
        for source in {tensor.file for tensor in shard if tensor.file is not None}:
            files[source] = os.open(source, os.O_RDONLY)
            stack.callback(os.close, files[source])
        stack.callback(lambda: [future.exception() for _, future in waiting])  # none may outlive its files
        for tensor, start in zip(shard, starts, strict=True):
            update = _update(tensor, plan)
            for piece in _pieces(tensor, start, plan, update, files, out):
                waiting.append((tensor.module, pool.submit(piece)))
                if len(waiting) > 3 * MAX_THREADS:
                    collect()
        while waiting:
            collect()
    for module, retained in found.items():
        if not math.isfinite(retained.error):
            raise ArtifactError(
                f"module {module} does not fit the stored dtype", where=path.name, fix="Merge with --dtype float32"
            )
    return found


def _layout(shard: tuple[PlannedTensor, ...]) -> tuple[bytes, list[int]]:
    """The file's header, and where each tensor starts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts = []
    for tensor in shard:
        starts.append(position)
        position += tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.info.dtype,
            "shape": list(tensor.info.shape),
            "data_offsets": [starts[-1], position],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def _update(tensor: PlannedTensor, plan: MergePlan) -> merge_sum.Update | None:
    if tensor.module is None:
        return None
    assert tensor.source is not None
    return merge_sum.Update.of(
        plan.adapter.load_basis().modules[tensor.module],
        plan.adapter.R[tensor.module],
        plan.adapter.scaling,
        transposed=plan.base.stores_transposed,
        source=TORCH_DTYPES[tensor.source.dtype],
        stored=TORCH_DTYPES[tensor.info.dtype],
    )


def _pieces(
    tensor: PlannedTensor,
    start: int,
    plan: MergePlan,
    update: merge_sum.Update | None,
    files: dict[Path, int],
    out: int,
) -> Iterator[Callable[[], Done]]:
    """The work one tensor is, cut into calls that may run in any order."""
    if tensor.head is not None:
        value = plan.adapter.head[tensor.head].to(TORCH_DTYPES[tensor.info.dtype]).contiguous()
        yield partial(_write, out, start, value)
        return
    assert tensor.file is not None
    assert tensor.source is not None
    source, file = tensor.source, files[tensor.file]
    if update is not None:
        left, right = update.in_sum_dtype()
        rows, columns = source.shape
        step = max(1, PIECE // columns)
        for number, row in enumerate(range(0, rows, step)):
            of_rows = slice(row, min(rows, row + step))
            # In float64 every block is measured: it costs little there, and an overflow of fp16 must not be missed.
            measure = number % MEASURED == 0 or update.dtype == torch.float64
            yield partial(_add, file, out, tensor, start, update, left, right, of_rows, measure)
    elif tensor.info == source:
        for offset in range(0, source.nbytes, _COPY_BYTES):
            count = min(_COPY_BYTES, source.nbytes - offset)
            yield partial(_copy, file, source.start + offset, out, start + offset, count)
    else:
        entries = math.prod(source.shape)
        for first in range(0, entries, PIECE):
            yield partial(_convert, file, out, tensor, start, first, min(PIECE, entries - first))


def _add(
    file: int,
    out: int,
    tensor: PlannedTensor,
    start: int,
    update: merge_sum.Update,
    left: torch.Tensor,
    right: torch.Tensor,
    rows: slice,
    measure: bool,
) -> Done:
    columns = right.shape[1]
    count = (rows.stop - rows.start) * columns
    weights = _read(file, tensor, rows.start * columns, count).view(-1, columns)
    stored = _buffers.take("stored", count, TORCH_DTYPES[tensor.info.dtype]).view(-1, columns)
    retained = merge_sum.add(weights, update, left, right, rows, stored, measure=measure)
    return retained, _write(out, start + rows.start * columns * stored.element_size(), stored)[1]


def _convert(file: int, out: int, tensor: PlannedTensor, start: int, first: int, count: int) -> Done:
    weights = _read(file, tensor, first, count)
    stored = weights.to(TORCH_DTYPES[tensor.info.dtype])
    if stored.dtype == torch.float16 and torch.isinf(stored).any() and not torch.isinf(weights).any():
        raise ArtifactError(f"tensor {tensor.name} does not fit float16", fix="Merge with --dtype float32")
    return _write(out, start + first * stored.element_size(), stored)


def _copy(file: int, position: int, out: int, start: int, count: int) -> Done:
    done = 0
    with suppress(OSError, AttributeError):  # not on this system, or not between these two file systems
        while done < count and (copied := os.copy_file_range(file, out, count - done, position + done, start + done)):
            done += copied
    while done < count:
        block = os.pread(file, min(1 << 20, count - done), position + done)
        if not block:
            raise ArtifactError("a file of the base became shorter while it was read", fix="Fetch it again")
        done += os.pwrite(out, block, start + done)
    return None, count


class _Buffers(threading.local):
    """Named blocks of memory per thread, kept: to fault in fresh pages would cost more than to copy them."""

    def __init__(self) -> None:
        self.blocks: dict[str, torch.Tensor] = {}

    def take(self, name: str, entries: int, dtype: torch.dtype) -> torch.Tensor:
        """(entries,) of any content, until the same thread asks for this name again."""
        nbytes = entries * dtype.itemsize
        if name not in self.blocks or len(self.blocks[name]) < nbytes:
            self.blocks[name] = torch.empty(nbytes, dtype=torch.uint8)
        return self.blocks[name][:nbytes].view(dtype)


_buffers = _Buffers()


def _read(file: int, tensor: PlannedTensor, first: int, count: int) -> torch.Tensor:
    """(count,) entries of the source from entry `first`, in this thread's buffer."""
    assert tensor.source is not None
    size = DTYPE_BYTES[tensor.source.dtype]
    weights = _buffers.take("weights", count, TORCH_DTYPES[tensor.source.dtype])
    memory = weights.view(torch.uint8).numpy().data
    position, done = tensor.source.start + first * size, 0
    while done < len(memory):
        read = os.preadv(file, [memory[done:]], position + done)
        if not read:
            raise ArtifactError("the file became shorter while it was read", where=tensor.file, fix="Fetch it again")
        done += read
    return weights


def _write(out: int, start: int, value: torch.Tensor) -> Done:
    memory = value.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(memory):
        done += os.pwrite(out, memory[done:], start + done)
    return None, len(memory)
