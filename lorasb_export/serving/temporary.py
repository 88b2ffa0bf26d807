"""The folder one server reads from: it goes with the server, or at the next start when `lorasb serve` was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "lorasb-"  # short, for the paths of sockets in it
# Held while the folder is in use: no process of another container or host has to be asked for. A name of our own, for
# what has it is emptied: others write `.lock` too, uv into every environment.
_LOCK = ".lorasb-serve.lock"
_RANDOM = "?" * 8  # what mkdtemp puts behind the prefix


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder of our own, gone when the block ends; those that killed servers left behind go first."""
    _remove_what_was_killed()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # Both are closed before the folder goes: NFS keeps what is open.
        with _locked(folder), (folder / f"{_LOCK}.new").open("wb") as file:
            # On a disk without locks the file keeps its first name, and no later start removes this.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / f"{_LOCK}.new").rename(folder / _LOCK)
            try:
                yield name
            finally:
                _empty(folder)


def _empty(folder: Path) -> None:
    """Remove all but the lock, by which the next start finds what is left when this is cut short."""
    with suppress(OSError):  # a cleaner of /tmp has taken it
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                with suppress(OSError):
                    path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock on the folder itself: without one systemd-tmpfiles removes what has lain in it for some days."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_what_was_killed() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}{_RANDOM}/{_LOCK}"):
        with suppress(OSError):  # its server runs
            found = path.parent.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():  # another's, or a link into anything
                continue
            with path.open("r+b") as file:  # to write, which a lock needs over NFS
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _empty(path.parent)
            shutil.rmtree(path.parent, ignore_errors=True)
