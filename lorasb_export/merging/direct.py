"""A file written past the page cache, and the memory that such writes are made from.

To fill the cache costs a merge more than its sums do, and evicts what other programs keep there. A direct write
(`O_DIRECT`) asks that file position, length and address are whole pages; and not every file system allows it.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

import torch

PAGE = mmap.PAGESIZE


class OutputFile:
    """A new file of known size whose ranges are written by many threads, in any order."""

    def __init__(self, path: Path, size: int) -> None:
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct: int | None = None
        self._may_be_direct = True
        try:
            # A full disk shows here; and a file that grows takes one write at a time.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._cached, 0, size)
            with suppress(OSError, AttributeError):  # not on this file system, or not on this system
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except BaseException:
            os.close(self._cached)
            raise

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, start: int, value: torch.Tensor) -> int:
        """Write `value`, from `Buffers.take(…, start)` where it is large, at byte `start`; its size in bytes.

        Whole pages go directly, the ragged ends by way of the cache: no page is written in both ways.
        """
        memory = value.view(-1).view(torch.uint8).numpy().data
        head = min(-start % PAGE, len(memory))
        tail = head + (len(memory) - head) // PAGE * PAGE
        _write(self._cached, start, memory[:head])
        aligned = (value.data_ptr() + head) % PAGE == 0
        self._write_pages(start + head, memory[head:tail], direct=aligned)
        _write(self._cached, start + tail, memory[tail:])
        return len(memory)

    def _write_pages(self, start: int, memory: memoryview, *, direct: bool) -> None:
        if direct and self._direct is not None and self._may_be_direct:
            try:
                _write(self._direct, start, memory)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._may_be_direct = False  # this file system wants more than whole pages
        _write(self._cached, start, memory)


def _write(file: int, start: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], start + done)


class Buffers(threading.local):
    """Named blocks of memory per thread, kept: to fault in fresh pages would cost more than to copy them."""

    def __init__(self) -> None:
        self._blocks: dict[str, torch.Tensor] = {}

    def take(self, name: str, entries: int, dtype: torch.dtype, start: int = 0) -> torch.Tensor:
        """(entries,) of any content, until the same thread asks for this name again.

        Its address has the same offset within a page as byte `start` has within the file, as O_DIRECT demands, unless
        that would misalign `dtype`.
        """
        offset = start % PAGE if start % dtype.itemsize == 0 else 0
        end = offset + entries * dtype.itemsize
        if name not in self._blocks or len(self._blocks[name]) < end:
            block = mmap.mmap(-1, end + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._blocks[name] = torch.frombuffer(block, dtype=torch.uint8)
        return self._blocks[name][offset:end].view(dtype)
