"""The folder of temporary files of a server: nobody else's, and gone after it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from lorasb_export.errors import ServerError
from lorasb_export.serving import launcher
from lorasb_export.serving.temporary import PREFIX, temporary_folder

LOCK = ".lorasb-serve.lock"


def test_the_compilers_cache_lies_where_nobody_else_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies in it is run, and a name in the folder of temporary files can be guessed."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = {"TMPDIR": "/tmp/short", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / ".cache" / "lorasb" / "torchinductor")}
    assert launcher._keep_inside("/tmp/short") == places
    monkeypatch.setenv("HOME", "/proc/nohome")
    assert launcher._keep_inside("/tmp/short")["TORCHINDUCTOR_CACHE_DIR"] == "/tmp/short/torchinductor"


def test_a_start_removes_only_folders_that_nobody_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of whatever host or container: numbers of processes mean nothing there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, starting = (Path(tempfile.mkdtemp(prefix=PREFIX)) for _ in range(2))
    with temporary_folder() as live:
        (killed / LOCK).touch()
        with temporary_folder() as ours:
            assert set(tmp_path.iterdir()) == {Path(live), Path(ours), starting}
    assert list(tmp_path.iterdir()) == [starting]


def test_a_start_leaves_alone_what_a_link_leads_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in (LOCK, "kept"):
        (mine / name).touch()
    (tmp_path / "lorasb-alink000").symlink_to(mine)
    with temporary_folder():
        assert sorted(path.name for path in mine.iterdir()) == [LOCK, "kept"]


@pytest.mark.parametrize(
    ("name", "lock"),
    [
        ("lorasb-venv", ".lock"),  # as `uv venv` makes it
        ("lorasb-venv_311", ".lock"),
        ("lorasb-venv", LOCK),
    ],
)
def test_a_start_leaves_alone_what_no_server_made(
    name: str, lock: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / name
    folder.mkdir()
    (folder / lock).touch()
    (folder / "kept").touch()
    with temporary_folder():
        assert (folder / "kept").exists()


def test_a_folder_that_was_taken_away_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a cleaner of /tmp: vLLM ends, and why is to be told."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ServerError, match="why"):
        _end_without_a_folder()


def _end_without_a_folder() -> None:
    with temporary_folder() as name:
        shutil.rmtree(name)
        raise ServerError("why", fix="")


def test_what_a_removal_left_that_was_cut_short_goes_at_the_next_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt), temporary_folder() as name:
        (Path(name) / "copies").mkdir()
        (Path(name) / "copies" / "adapter.safetensors").touch()
        patch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
    assert (Path(name) / LOCK).exists()
    assert (Path(name) / "copies" / "adapter.safetensors").exists()
    with temporary_folder():
        assert not Path(name).exists()


def test_a_folder_in_use_is_locked_for_those_who_clean_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd-tmpfiles leaves a folder on which it gets no lock, with all that is in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as live:
        cleaner = os.open(live, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def test_on_a_disk_without_locks_no_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with temporary_folder() as first, temporary_folder() as second:
        assert set(tmp_path.iterdir()) == {Path(first), Path(second)}
    assert not list(tmp_path.iterdir())
