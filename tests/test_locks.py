"""One writer of a target at a time, also where the disk has no locks or another user's lock is there."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from lorasb_export.errors import OutputError
from lorasb_export.files.lock import only_writer


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre mounted without -o flock, NFS without lockd."""

    def refuse(file: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="this disk has no file locks") as error, only_writer(tmp_path / "x"):
        pass
    assert error.value.where == str(tmp_path / ".x.lock")
    assert os.strerror(code) in error.value.what
    assert "-o flock" in str(error.value.fix)


def test_who_shares_a_folder_may_lock_in_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for folder, lock in ((0o2770, 0o660), (0o755, 0o644), (0o700, 0o600), (0o1777, 0o664)):
            tmp_path.chmod(folder)
            with only_writer(tmp_path / "x"):
                assert stat.S_IMODE((tmp_path / ".x.lock").stat().st_mode) == lock
    finally:
        os.umask(before)


@pytest.mark.parametrize("readable", [True, False])
def test_a_lock_file_that_another_user_left(readable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, really_open = tmp_path / ".x.lock", os.open
    left.touch()

    def as_a_stranger(path: Path, flags: int, *mode: int) -> int:
        if path == left and (flags & os.O_RDWR or not readable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", as_a_stranger)
    if readable:
        with (
            only_writer(tmp_path / "x"),
            pytest.raises(OutputError, match="another process"),
            only_writer(tmp_path / "x"),
        ):
            pass
    else:
        with pytest.raises(OutputError, match="cannot open the lock file") as error, only_writer(tmp_path / "x"):
            pass
        assert (error.value.where, "remove it" in str(error.value.fix)) == (str(left), True)


def test_a_lock_on_a_file_that_its_holder_has_just_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened before that: a third process makes the file anew, and would write beside us."""
    flock = fcntl.flock

    def after_it_is_gone(file: IO[bytes], how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".x.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_it_is_gone)
    with (
        only_writer(tmp_path / "x"),
        pytest.raises(OutputError, match="another process is writing"),
        only_writer(tmp_path / "x"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_is_removed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process would else lock it before it is gone, and a third one make it anew."""
    unlink, removed = Path.unlink, list[Path]()

    def watched(path: Path, *words: Any, **options: Any) -> None:
        removed.append(path)
        with path.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlink(path, *words, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    with only_writer(tmp_path / "x"):
        pass
    assert removed == [tmp_path / ".x.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["flock", "fstat"])
def test_over_nfs_a_lock_file_that_is_gone_is_stale(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fcntl if call == "flock" else os
    really, calls = getattr(module, call), 0

    def stale(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if call == "flock" else 2):  # the first fstat is of a file just opened
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return really(*arguments)

    monkeypatch.setattr(module, call, stale)
    with only_writer(tmp_path / "x"):
        assert calls == (2 if call == "flock" else 4)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_machine_that_died_is_named(tmp_path: Path) -> None:
    """An NFS server may keep it."""
    with only_writer(tmp_path / "x"), pytest.raises(OutputError) as error, only_writer(tmp_path / "x"):
        pass
    assert f"if no run is alive on any machine, remove {tmp_path / '.x.lock'}" in str(error.value)


def test_too_many_locks_name_the_limit(tmp_path: Path) -> None:
    """Of `fit --together` with a thousand tasks."""

    def lock_many() -> None:
        with ExitStack() as locks:
            for number in range(128):
                locks.enter_context(only_writer(tmp_path / str(number)))

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        with pytest.raises(OutputError, match=r"Too many open files .*ulimit -n"):
            lock_many()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert list(tmp_path.iterdir()) == []
