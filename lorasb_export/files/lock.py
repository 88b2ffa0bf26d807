"""One writer at a time for a folder that takes long to make."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import BusyError, OutputError
from .output import cannot_write
from .storage import real

logger = logging.getLogger(__name__)

# Lustre without -o flock, NFS without lockd, others; the last two are one on Linux.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_GONE = {errno.ENOENT, errno.ESTALE}  # the latter over NFS, of a file that is open here
_OF_ANOTHER = "It is another user's: when no run of theirs writes there any more, remove it"


@contextmanager
def only_writer(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `.NAME.lock` beside `target` while the block runs; the system lets go of it however this process ends.

    Args:
        wait: until another process that holds it lets go.

    Raises:
        BusyError: another process holds it and `wait` is false.
        OutputError: the parent cannot be written, its disk has no locks, or the lock file is another user's and out of
            reach.
    """
    target = real(target)  # a link to a folder is no second folder
    with cannot_write(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.parent / f".{target.name}.lock"
        file = _lock(path, target, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # a lock file that stays does no harm: nobody holds it
            path.unlink()  # while it is held: who opened it meanwhile sees that it is gone
        file.close()


def _lock(path: Path, target: Path, wait: bool) -> IO[bytes]:
    while True:
        file = os.fdopen(_open(path), "rb")
        try:
            _take(file, path, target, wait)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except OSError as error:
            if error.errno not in _GONE:
                file.close()
                raise
        file.close()  # its holder removed it just now: this is a lock on nothing


def _take(file: IO[bytes], path: Path, target: Path, wait: bool) -> None:
    try:
        _flock(file, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            fix = f"Wait for it, or choose another path; if no run is alive on any machine, remove {path}"
            raise BusyError("another process is writing this target", where=target, fix=fix) from None
        logger.warning("another process is writing %s: waiting for it", target)
        _flock(file, path, fcntl.LOCK_EX)


def _open(path: Path) -> int:
    """Open a lock file, made if it is not there; to write, which a lock needs over NFS, where that is allowed."""
    if path.is_symlink():
        raise OutputError("the lock file is a link", where=path, fix="No run of ours makes one: remove it")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        if not os.access(path.parent, os.W_OK):
            raise
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except PermissionError as error:
            raise OutputError(f"cannot open the lock file: {error.strerror}", where=path, fix=_OF_ANOTHER) from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size or found.st_nlink > 1:
        os.close(handle)
        raise OutputError("a file that is no lock has its name", where=path, fix="Remove it, or call it otherwise")
    # Whoever shares the folder may lock it, whatever our umask: it is empty. To strangers of a /tmp reading is enough.
    with suppress(OSError):  # it is another user's, who has done so
        os.fchmod(handle, path.parent.stat().st_mode & 0o664)
    return handle


def _flock(file: IO[bytes], path: Path, how: int) -> None:
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno == errno.EBADF:  # over NFS, opened to read alone
            raise OutputError("may not write the lock file", where=path, fix=_OF_ANOTHER) from None
        if error.errno not in _NO_LOCKS:
            raise
        fix = "Mount it with locks (Lustre: -o flock; NFS: version 4, or lockd on both sides), or write to another disk"
        raise OutputError(f"this disk has no file locks: {error.strerror}", where=path, fix=fix) from None
