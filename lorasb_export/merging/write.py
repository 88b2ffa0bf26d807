"""One merged shard, streamed: a few threads, each with a block of rows to read, sum, round and write.

What is written goes past the page cache (`O_DIRECT`) where the file system allows it: to fill the cache costs more than
the sum, and evicts what others keep there. Memory holds the factors of one or two modules and a few megabytes a thread,
whatever the size of the model or of a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from ..files.storage import TensorInfo
from ..tensors import TORCH_DTYPES
from . import sums
from .direct import PAGE, Buffers, OutputFile
from .layout import PlannedTensor
from .plan import MergePlan, worker_count
from .retained import Retained

PIECE = 8 * sums.BLOCK  # entries that are read and written at a time; 4 took 9 % longer, 16 5 % less
MEASURED = 8  # only every 8th block tells what bf16 retains: sums over 64,000 entries and more are precise enough
_COPY_BYTES = 4 << 20
_FLOAT16 = torch.finfo(torch.float16)
_WIDER = "Write it in float32: `lorasb merge --dtype float32`, `lorasb export --precision fp32`"
_WAITING = 12  # pieces that keep the factors of their modules in memory

Done = tuple[Retained | None, int]  # of one piece: the error of rounding where it was touched, and bytes written


@contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """`worker_count()` threads, each of which computes alone: they share no barrier and overlap their I/O."""
    threads, workers = torch.get_num_threads(), worker_count()
    torch.set_num_threads(1)  # here too: helpers that wait for this thread's next product would spin on a core
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
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
        module, future = waiting[0]
        retained, nbytes = future.result()
        waiting.popleft()
        if module is not None and retained is not None:
            found[module] = found.get(module, Retained()) + retained
        bar.update(nbytes)

    with ExitStack() as stack:
        out = OutputFile(path, starts[-1] + shard[-1].nbytes)
        stack.callback(out.close)
        out.write(0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
        files = {}
        for source in {tensor.source[0] for tensor in shard if tensor.source is not None}:
            files[source] = os.open(source, os.O_RDONLY)
            stack.callback(os.close, files[source])
        stack.callback(lambda: [future.exception() for _, future in waiting])  # none may outlive its files
        for tensor, start in zip(shard, starts, strict=True):
            update = _update(tensor, plan)
            for piece in _pieces(tensor, start, plan, update, files, out):
                waiting.append((tensor.module, pool.submit(piece)))
                if len(waiting) > _WAITING:
                    collect()
        while waiting:
            collect()
    for module, retained in found.items():
        if not math.isfinite(retained.error):
            raise ArtifactError(f"module {module} does not fit the stored dtype", where=path.name, fix=_WIDER)
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
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [starts[-1], position],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((-8 - len(text)) % PAGE)  # the format wants the data aligned to 8 bytes, direct writes to a page
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def _update(tensor: PlannedTensor, plan: MergePlan) -> sums.Update | None:
    if tensor.module is None:
        return None
    assert tensor.source is not None
    name = tensor.module
    return sums.Update.of(
        [(a.load_basis().modules[name], a.R[name], a.scaling) for a in plan.adapters if name in a.R],
        transposed=plan.base.stores_transposed,
        source=TORCH_DTYPES[tensor.source[1].dtype],
        stored=TORCH_DTYPES[tensor.dtype],
    )


def _pieces(
    tensor: PlannedTensor,
    start: int,
    plan: MergePlan,
    update: sums.Update | None,
    files: dict[Path, int],
    out: OutputFile,
) -> Iterator[Callable[[], Done]]:
    """The work one tensor is, cut into calls that may run in any order."""
    if tensor.source is None:
        yield partial(_store, out, start, plan.adapters[0].head[tensor.name], TORCH_DTYPES[tensor.dtype])
        return
    path, source = tensor.source
    rounded = plan.rounding.read(path, source) if tensor.source in plan.rounding.sources else None
    job = _Job(files[path], source, out, start, tensor, rounded)
    if update is not None:
        rows, columns = source.shape
        step = max(1, sums.BLOCK // columns) * (PIECE // sums.BLOCK)
        # In float64 every piece is measured: it costs little there, and an overflow of fp16 must not be missed. So it
        # is where R lies in a few rows, which may be those of other pieces.
        everywhere = not update.small or any(a.load_basis().is_blocks for a in plan.adapters)
        measure = 1 if everywhere else MEASURED
        for row in range(0, rows, step):
            yield partial(job.add, update, slice(row, min(rows, row + step)), measure)
    elif tensor.dtype == source.dtype and rounded is None:
        for offset in range(0, source.nbytes, _COPY_BYTES):
            yield partial(job.copy, offset, min(_COPY_BYTES, source.nbytes - offset))
    else:
        entries = math.prod(source.shape)
        for first in range(0, entries, PIECE):
            yield partial(job.convert, first, min(PIECE, entries - first))


_buffers = Buffers()


@dataclass(frozen=True)
class _Job:
    """One tensor of the base, taken piece by piece from `file` and written to `out` from byte `start` on."""

    file: int
    source: TensorInfo
    out: OutputFile
    start: int
    tensor: PlannedTensor
    rounded: torch.Tensor | None  # what is taken in place of the file's content

    def add(self, update: sums.Update, rows: slice, measure: int) -> Done:
        columns = update.right.shape[1]
        first, count = rows.start * columns, (rows.stop - rows.start) * columns
        weights = self._read(first, count).view(-1, columns)
        start, stored = self._place(first, count)
        retained = sums.add(weights, update, rows, stored.view(-1, columns), measure=measure)
        return retained, self.out.write(start, stored)

    def convert(self, first: int, count: int) -> Done:
        weights = self._read(first, count)
        start, stored = self._place(first, count)
        stored.copy_(weights)
        if stored.dtype == torch.float16 and torch.isinf(stored).any() and not torch.isinf(weights).any():
            if not self.tensor.name.endswith((".weight", ".bias")):  # a buffer, as GPT-Neo's mask of -1e9
                return None, self.out.write(start, stored.clamp_(_FLOAT16.min, _FLOAT16.max))
            raise ArtifactError(f"tensor {self.tensor.name} does not fit float16", fix=_WIDER)
        return None, self.out.write(start, stored)

    def copy(self, offset: int, count: int) -> Done:
        memory = _buffers.take("stored", count, torch.uint8, self.start + offset)
        _fill(self.file, self.source.start + offset, memory)
        return None, self.out.write(self.start + offset, memory)

    def _read(self, first: int, count: int) -> torch.Tensor:
        """(count,) entries of the source from entry `first`, those of a file in this thread's buffer."""
        if self.rounded is not None:
            return self.rounded.reshape(-1)[first : first + count]
        weights = _buffers.take("weights", count, TORCH_DTYPES[self.source.dtype])
        _fill(self.file, self.source.start + first * weights.element_size(), weights)
        return weights

    def _place(self, first: int, count: int) -> tuple[int, torch.Tensor]:
        """Where (count,) entries go from entry `first` on, and this thread's buffer for them."""
        dtype = TORCH_DTYPES[self.tensor.dtype]
        start = self.start + first * dtype.itemsize
        return start, _buffers.take("stored", count, dtype, start)


def _store(out: OutputFile, start: int, value: torch.Tensor, dtype: torch.dtype) -> Done:
    stored = _buffers.take("stored", value.numel(), dtype, start).copy_(value.reshape(-1))
    return None, out.write(start, stored)


def _fill(file: int, position: int, value: torch.Tensor) -> None:
    memory, done = value.view(torch.uint8).numpy().data, 0
    while done < len(memory):
        read = os.preadv(file, [memory[done:]], position + done)
        if not read:
            raise ArtifactError("a file of the base became shorter while it was read", fix="Fetch it again")
        done += read
