"""May it be written: what is in the way, whether there is room, and the errors of the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArtifactError, LoraSBError, OutputError, UnreadableError
from .kind import ADAPTER_CONFIG, BASIS_CONFIG, PEFT_TYPE, RECORD, artifact_kind
from .storage import real

_OURS = (BASIS_CONFIG, RECORD)  # every folder we write has one of these, or is an adapter
_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_FIXES = {
    errno.ENOSPC: "Free some space there, then start again",
    errno.EIO: "Check that disk, then start again",
    errno.EMFILE: "Allow this process more of them (ulimit -n), then start again",  # a lock for each task of many
}


@contextmanager
def cannot_write(target: Path, fix: str | None = None) -> Iterator[None]:
    """Raise the system's errors (no permission, disk full, …) as an OutputError about `target`.

    Errors that name a file which does not belong to `target` pass: something else could not be read.

    Args:
        fix: what to do then, if it is more than to start again.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, LoraSBError) or not error.errno or not _is_about(error, target):
            raise
        fix = fix or _FIXES.get(error.errno, "Choose another path")
        raise OutputError(f"cannot write: {error.strerror}", where=target, fix=fix) from None


def _is_about(error: OSError, target: Path) -> bool:
    """Whether its file is, or lies in, `target`, its hidden siblings `.NAME.…` or a folder above it.

    Of two files, as of a link and what it leads to, either. An error of a file that is already open carries no name;
    then only errors of the disk itself count.
    """
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
    if not names:
        return error.errno in _OF_A_DISK
    return any(_belongs(Path(os.path.abspath(name)), Path(os.path.abspath(target))) for name in names)


def _belongs(path: Path, target: Path) -> bool:
    if path in (target, *target.parents):
        return True
    if not path.is_relative_to(target.parent):
        return False
    first = path.relative_to(target.parent).parts[0]
    return first == target.name or first.startswith(f".{target.name}.")


def disk_error_in(words: str) -> OSError | None:
    """The error of a disk that another program's last words quote."""
    return next((OSError(code, text) for code in _OF_A_DISK if (text := os.strerror(code)) in words), None)


def refuse_existing(
    target: Path,
    overwrite: bool,
    fix: str = "Choose another path, or pass --overwrite",
    *,
    kind: str | None,
) -> None:
    """Raise OutputError when `target` exists with content and may not be replaced.

    Even with `overwrite` only a folder that this package wrote is replaced: a mistyped path must not cost a home, nor
    an adapter, or the basis of all of them.

    Args:
        kind: of the folder that is to be written, as `artifact_kind` has it: none of another kind is replaced.
            None: any folder of ours may be.

    Raises:
        UnreadableError: what it is cannot be read.
    """
    if real(target).is_mount():  # of a link Python 3.11 would compare the disks of both its ends
        fix = f"Choose a folder in it, as {target / 'model'}"
        raise OutputError("the target is a mounted disk, which cannot be put in place whole", where=target, fix=fix)
    refuse_foreign(replaced(target), is_ours)
    if is_free(target):
        return
    if not is_ours(target):
        raise OutputError("the target exists and is not a folder lorasb wrote", where=target, fix="Choose another path")
    if not overwrite:
        raise OutputError("the target exists", where=target, fix=fix)
    try:
        there = artifact_kind(target)
    except UnreadableError:  # it may be whole
        raise
    except ArtifactError:  # a damaged one
        return
    if kind is not None and there != kind:
        what = f"the target is of the kind {there!r}, and only one of the kind {kind!r} would be replaced"
        raise OutputError(what, where=target, fix="Choose another path, or remove it first")


def refuse_existing_file(path: Path, overwrite: bool, what: str = "the file exists") -> None:
    """Raise OutputError when `path` exists, but for a file that may be replaced."""
    if path.exists() and not (overwrite and path.is_file()):
        fix = "Choose another path, or pass --overwrite" if path.is_file() else "Choose another path"
        raise OutputError(what, where=path, fix=fix)


def refuse_foreign(path: Path, ours: Callable[[Path], bool]) -> None:
    """Raise OutputError where something at `path`, a hidden name that we write to, may be the user's.

    Args:
        ours: whether a folder is known to be one of ours; a link never is.
    """
    if path.is_symlink() or not (ours(path) or is_free(path)):
        fix = "Remove it if an interrupted run has left it, or choose another path"
        raise OutputError("something that lorasb did not write has a name that it needs", where=path, fix=fix)


def replaced(target: Path) -> Path:
    """Where what was at `target` lies, links followed, while another folder takes its place."""
    target = real(target)
    return target.parent / f".{target.name}.old"


def is_free(target: Path) -> bool:
    """Whether `target` does not exist, or is an empty folder."""
    try:
        return not any(target.iterdir()) if target.is_dir() else not target.exists()
    except FileNotFoundError:  # another process has just moved it
        return True


def is_ours(folder: Path) -> bool:
    """Whether this package wrote `folder`, and it is one thing: a clone of a project from the Hub is the user's."""
    is_one = any((folder / name).is_file() for name in _OURS) or _is_our_adapter(folder)
    return is_one and not _is_project(folder / RECORD)


def _is_project(record: Path) -> bool:
    return record.is_file() and b'"kind": "project"' in record.read_bytes()


def _is_our_adapter(folder: Path) -> bool:
    """By the type its config names, be the file cut short: PEFT's folders have a config of that name too."""
    config = folder / ADAPTER_CONFIG
    return config.is_file() and f'"{PEFT_TYPE}"'.encode() in config.read_bytes()


def refuse_own_input(target: Path, *inputs: str | Path | None) -> None:
    """Raise OutputError when one of `inputs` is, or lies in, `target`: nothing can bring R or a basis back.

    Args:
        inputs: folders; what is none on this disk (a Hub id, None) is passed over.
    """
    for source in inputs:
        if source is not None and Path(source).exists() and real(Path(source)).is_relative_to(real(target)):
            fix = "Choose another --out"
            raise OutputError(f"the target holds what it is made from, {source}", where=target, fix=fix)


def free_bytes(target: Path) -> int:
    """Free on the disk that `target` will lie on."""
    parent = real(target)
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def require_room(
    target: Path, needed: int, fix: str = "Nothing was written; free some space or choose another --out"
) -> None:
    """Raise OutputError when the disk that `target` will lie on has fewer than `needed` bytes free."""
    free = free_bytes(target)
    if free < needed:
        what = f"not enough disk: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise OutputError(what, where=target, fix=fix)
