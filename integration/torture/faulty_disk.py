"""A disk that fails on demand, for child processes: a library loaded before libc, and the memory it is told through."""

from __future__ import annotations

import ctypes
import errno
import mmap
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


class _Control(ctypes.Structure):
    """In step with `struct control` in faulty_disk.c."""

    _fields_ = (
        ("calls", ctypes.c_long),
        ("fail_at", ctypes.c_long),
        ("failed", ctypes.c_long),
        ("error", ctypes.c_int),
        ("sticky", ctypes.c_int),
        ("only_growing", ctypes.c_int),
        ("fsync_ms", ctypes.c_int),
        ("root", ctypes.c_char * 1024),
        ("vanish", ctypes.c_char * 1024),
        ("call", ctypes.c_char * 32),
        ("path", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        error: the errno of a call that fails; 0 for none.
        sticky: whether all later calls fail too: a full disk stays full.
        only_growing: whether only calls that take room on the disk can fail.
        vanish: a file that is deleted when the call comes, which then goes through.
        fsync_ms: milliseconds that each fsync takes longer.
    """

    error: int = 0
    sticky: bool = False
    only_growing: bool = False
    vanish: Path | None = None
    fsync_ms: int = 0


FAULTS = {
    "full": Fault(errno.ENOSPC, sticky=True, only_growing=True),
    "one failing call": Fault(errno.EIO),
    "failing": Fault(errno.EIO, sticky=True),
    "read-only": Fault(errno.EROFS, sticky=True),
}


def spread(calls: int, n: int) -> list[int]:
    """At most `n` of the numbers 1 … `calls`."""
    n = min(n, calls)
    return sorted({1 + round(index * (calls - 1) / max(1, n - 1)) for index in range(n)})


class FaultyDisk:
    """The folder `root` as child processes see it that are started with `variables`."""

    def __init__(self, root: Path, where: Path) -> None:
        """Build the library in `where`, outside `root`. Raises RuntimeError without a C compiler."""
        library, memory = where / "faulty_disk.so", where / "control"
        command = ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-o", str(library), str(_SOURCE), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("the harness `disk` needs a C compiler (cc); install one") from None
        memory.write_bytes(bytes(ctypes.sizeof(_Control)))
        with memory.open("r+b") as file:
            self._control = _Control.from_buffer(mmap.mmap(file.fileno(), 0))
        self._root = f"{root.resolve()}/".encode()
        self.variables = {"LD_PRELOAD": str(library), "FAULTY_DISK": str(memory)}

    def arm(self, fault: Fault, call: int = 0) -> None:
        """From now on call number `call` fails as `fault` says (1 is the next one); 0 only counts."""
        control = self._control
        control.root = b""  # nothing counts while the rest changes
        control.calls, control.failed, control.fail_at = 0, 0, call
        control.error, control.sticky, control.only_growing = fault.error, fault.sticky, fault.only_growing
        control.fsync_ms, control.vanish = fault.fsync_ms, str(fault.vanish or "").encode()
        control.call = control.path = b""
        control.root = self._root

    def heal(self) -> int:
        """No call fails any more. Returns the number of calls that could have since `arm`."""
        self._control.root = b""
        return int(self._control.calls)

    @property
    def hit(self) -> str:
        """The first call that failed and its path below the root; empty when none did."""
        path = self._control.path.decode(errors="replace").removeprefix(self._root.decode())
        return f"{self._control.call.decode()} {path}" if self._control.failed else ""
