"""What a killed writer left is removed by the next one, and nothing that might be somebody's yet."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasb_export.files import atomic
from lorasb_export.files.atomic import atomic_file, atomic_folder


def test_a_killed_write_leaves_the_old_and_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lorasb.json").write_text("{}")
    script = (
        "import sys, time; from pathlib import Path; from lorasb_export.files.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), overwrite=True, kind=None) as t:\n"
        "    (t / 'half').write_text('…'); print('writing', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["lorasb.json"]
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x", "a[b]", "a**b"])
def test_what_a_killed_writer_of_a_file_left_is_removed(name: str, tmp_path: Path) -> None:
    ours, mine = (
        f".{name}.tmp-{atomic._place()}-{os.getpid()}-4567",
        f".{name}.tmp-of-mine",
    )  # the first another thread's
    for left in (f".{name}.tmp-{atomic._place()}-999999999-0123", mine, ours):
        (tmp_path / left).touch()
    with atomic_file(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {name, ours, mine}


def test_what_a_process_of_the_same_number_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".x.tmp-{atomic._place()}-{os.getpid()}-89ab"
    left.mkdir()
    monkeypatch.setattr(atomic, "_STARTED", time.time() + 1)
    with atomic_folder(tmp_path / "x", kind=None) as temporary:
        assert temporary != left
        (temporary / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_cannot_be_removed_does_not_fail_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, whose run was killed."""
    names = {f".{name}.tmp-{atomic._place()}-999999999-0123" for name in ("folder", "file")}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()

    def refuse(path: object, **_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "unlink", refuse)
    with atomic_folder(tmp_path / "folder", kind=None) as folder, atomic_file(tmp_path / "file") as file:
        (folder / "lorasb.json").touch()
        file.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", *names}


@pytest.mark.parametrize("pid", [os.getpid(), 999999999], ids=["of-our-number", "of-another"])
def test_what_is_written_on_another_node_is_left_alone_until_it_is_old(
    pid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here knows its processes; in a container the program is process 1 every time."""
    elsewhere = tmp_path / f".x.tmp-{'0' * 8}-{pid}-89ab"
    elsewhere.mkdir()
    now = time.time()
    monkeypatch.setattr(atomic, "_STARTED", now + 1)
    for left in (True, False):
        with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
            (temporary / "lorasb.json").touch()
        assert elsewhere.exists() == left
        monkeypatch.setattr("time.time", lambda: now + 8 * 24 * 3600)


def test_what_another_user_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not let us signal their process, and so says that it lives."""
    theirs = tmp_path / f".x.tmp-{atomic._place()}-{os.getpid() + 1}-89ab"
    theirs.touch()

    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", refuse)
    with atomic_file(tmp_path / "x") as temporary:
        temporary.touch()
    assert theirs.exists()


def test_what_an_earlier_replacement_left_behind_is_removed(tmp_path: Path) -> None:
    for name in ("x", ".x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lorasb.json").write_text("{}")
    with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
        (temporary / "lorasb.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
