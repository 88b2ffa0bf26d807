"""What is written appears whole or not at all: files and folders."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from .kind import CARD
from .output import cannot_write, is_ours, refuse_existing, replaced
from .storage import real

_STARTED = time.time()  # of this process, or a little later
_TEMPORARY = re.compile(r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]+")  # what `_temporary` puts at the end of a name
# Of a process elsewhere nobody here can tell whether it lives. No write takes a week, and what is never removed piles
# up: a container that is killed and started again is a new place each time.
_SURELY_DEAD = 7 * 24 * 3600  # seconds


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, kind: str | None) -> Iterator[Path]:
    """Yield a sibling temporary folder that becomes `target` when the block ends without an exception.

    A process killed inside the block leaves a hidden `.NAME.tmp-PLACE-PID-…` beside an untouched target; the next call
    for the same target removes it, in another place (`_place`) only when it is old.

    Args:
        overwrite: replace a folder of ours, if there is one.
        kind: of what is written; `overwrite` replaces no other (`output.refuse_existing`).

    Raises:
        OutputError: the target exists and `overwrite` is false, or the disk does not take it.
    """
    target = real(target)  # a link stays one, and what it leads to is replaced
    with cannot_write(target):
        prepare_target(target, overwrite, kind)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            keep_card(target, temporary)
            yield temporary
            put_in_place(temporary, target, overwrite, kind)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def prepare_target(target: Path, overwrite: bool, kind: str | None) -> None:
    """Make `target`'s parent, put back a target whose replacement was cut short, refuse one that is in the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    put_back(target)
    refuse_existing(target, overwrite, kind=kind)
    for stale in _left_by_the_dead(target):
        shutil.rmtree(stale, ignore_errors=True)  # another user's, say: no reason not to write
    discard(replaced(target), target)


def keep_card(target: Path, new: Path) -> None:
    """Let `new` begin with the README.md of the folder it will replace: what people wrote there stays."""
    card = target / CARD
    if card.is_file() and not card.is_symlink():
        shutil.copyfile(card, new / CARD)


def put_back(target: Path) -> None:
    """Undo a replacement of the folder `target` that was cut short between its two renames."""
    target = real(target)
    old = replaced(target)
    if is_ours(old) and not old.is_symlink() and not target.exists():
        old.rename(target)


def discard(folder: Path, target: Path) -> None:
    """Remove a hidden sibling of `target`, under a name by which the next call knows what a kill leaves of it."""
    with suppress(OSError):
        dying = _temporary(target)
        folder.rename(dying)
        shutil.rmtree(dying, ignore_errors=True)


def put_in_place(temporary: Path, target: Path, overwrite: bool, kind: str | None) -> None:
    """Rename the finished sibling folder `temporary` to `target`, every file fsynced before.

    A replaced target is first moved to `.NAME.old`, and put back by the next call if the process dies before the new
    folder is in place.
    """
    _keep_history(target, temporary)
    for path in sorted(temporary.rglob("*")):
        if path.is_file() or path.is_dir():  # no link that leads nowhere, no socket
            fsync(path)
    fsync(temporary)
    old = replaced(target)
    for tries_left in (2, 1, 0):
        refuse_existing(target, overwrite, kind=kind)  # another process may have been quicker
        if target.exists():
            discard(old, target)
            target.rename(old)
        try:
            temporary.rename(target)
            break
        except BaseException as error:
            if tries_left and isinstance(error, OSError) and target.exists():
                continue  # another process took it for one that was cut short, and has put `old` back
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    try:
        fsync(target.parent)
    except OSError as error:
        what = f"it is there and whole, but the disk does not confirm its name: {error.strerror}"
        raise OutputError(what, where=target, fix="Check that disk; use it, or replace it with --overwrite") from None
    discard(old, target)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`, of a name nobody can guess; it takes the place of `path` when the block ends.

    What a process that was killed left of it is removed by the next call. A file that other programs, or the next
    start, may read at any moment is written through this.
    """
    for stale in _left_by_the_dead(path):
        with suppress(OSError):  # as in `atomic_folder`
            stale.unlink()
    temporary = _temporary(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if path.exists():
            shutil.copymode(path, temporary)
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.tmp-{_place()}-{os.getpid()}-{secrets.token_hex(8)}"


def _place() -> str:
    """Eight characters for where our process ids mean something: this machine since it started, this container."""
    place = os.uname().nodename
    with suppress(OSError):  # not on Linux
        place += Path("/proc/sys/kernel/random/boot_id").read_text()
        place += str(os.stat("/proc/self/ns/pid").st_ino)
    return hashlib.sha256(os.fsencode(place)).hexdigest()[:8]


def _left_by_the_dead(target: Path) -> list[Path]:
    """The hidden siblings `.NAME.tmp-PLACE-PID-…` of `target` whose process is gone."""
    prefix = f".{target.name}.tmp-"
    siblings = target.parent.glob(f"{glob.escape(prefix)}*")
    found = [(path, _TEMPORARY.fullmatch(path.name.removeprefix(prefix))) for path in siblings]
    return [path for path, made in found if made and _is_dead(made[1], int(made[2]), path)]


def _is_dead(place: str, pid: int, temporary: Path) -> bool:
    """One with our own PID that is older than this process was left by another, which had that number before."""
    if place == _place() and pid != os.getpid():
        return not _is_alive(pid)
    try:
        changed = temporary.stat().st_ctime
    except OSError:  # another process, or thread of ours, is done with it
        return False
    return changed < (_STARTED if place == _place() else time.time() - _SURELY_DEAD)


def fsync(path: Path) -> None:
    """Return when the bytes of a file, or the entries of a folder, are on the disk.

    Some file systems (9p, older SMB) do that of files alone: there a folder's entries are left to the system.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP) and path.is_dir()):
            raise
    finally:
        os.close(handle)


def _keep_history(target: Path, temporary: Path) -> None:
    """A clone that is replaced stays one: `.git` is linked into the new folder, where that has none yet."""
    git, new = target / ".git", temporary / ".git"
    if git.is_dir() and not new.exists():
        shutil.copytree(git, new, symlinks=True, copy_function=link_or_copy)
    elif git.is_file() and not new.exists():  # of a submodule, or a second worktree
        link_or_copy(git, new)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
