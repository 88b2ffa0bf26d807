"""Files and folders appear whole or not at all, whatever the disk and the process meet."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasb_export import Adapter, atomic, calibrate, export, fit, merge
from lorasb_export.atomic import atomic_file, atomic_folder
from lorasb_export.data import TaskData
from lorasb_export.errors import OutputError
from lorasb_export.lock import only_writer
from lorasb_export.new_project import write_project
from lorasb_export.output import cannot_write, refuse_existing, require_room
from lorasb_export.project import Project
from lorasb_export.serving.launcher import api_key
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.tensors import save_tensors
from lorasb_export.training.fit import fit_together

FULL = """
import resource, sys, torch
from pathlib import Path
from lorasb_export.tensors import save_tensors
from lorasb_export.atomic import atomic_folder
tensors = {"R": torch.zeros(1 << 16)}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with atomic_folder(Path(sys.argv[1])) as folder:
    if sys.argv[2] == "tensors":
        save_tensors(tensors, folder / "x.safetensors")
    else:
        (folder / "x.txt").write_text("x" * (1 << 16))
"""


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "x") as temporary:
            (temporary / "half").write_text("…")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder_of_what_is_written_too(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    basis = calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random"))
    basis.save("~/basis")
    Adapter.start(basis).save("~/a")
    assert Adapter.load("~/a").basis_source == str(home / "basis")
    settings = FitSettings(max_steps=1)
    fit(str(llama), "~/basis", tasks["plus"], "~/b", settings)
    fit_together(str(llama), "~/basis", list(tasks.values()), "~/together", settings)
    merge("~/a", "~/model", report="~/report.json")
    export("~/a", "~/peft", format="peft")
    write_project("~/lorasb.toml", str(llama), {"plus": "plus"})
    assert Project.load("~/lorasb.toml").folder == home
    (home / "key").write_text("s3cret\n")
    assert api_key("~/key") == "s3cret"
    assert {"basis", "a", "b", "together", "model", "report.json", "peft"} <= {path.name for path in home.iterdir()}
    assert list(here.iterdir()) == []


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    for name, overwrite in (("old", False), ("new", True)):
        with atomic_folder(tmp_path / "x", overwrite=overwrite) as temporary:
            (temporary / name).write_text(name)
            (temporary / "lorasb.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["lorasb.json", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_killed_write_leaves_the_old_and_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lorasb.json").write_text("{}")
    script = (
        "import sys, time; from pathlib import Path; from lorasb_export.atomic import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), overwrite=True) as t:\n"
        "    (t / 'half').write_text('…'); print('writing', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["lorasb.json"]
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_somebody_elses_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with (
            pytest.raises(OutputError, match="not a folder lorasb wrote"),
            atomic_folder(tmp_path / name, overwrite=True),
        ):
            pass
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


def test_what_stock_peft_trained_is_somebody_elses(tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    (stock / "checkpoint-500").mkdir(parents=True)
    (stock / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(OutputError, match="not a folder lorasb wrote"):
        refuse_existing(stock, overwrite=True)
    (stock / "adapter_config.json").write_text('{"peft_type": "LORA_SB", "r"')  # ours, cut short
    refuse_existing(stock, overwrite=True)


def test_a_mounted_disk_is_refused_before_anything_is_made() -> None:
    with pytest.raises(OutputError, match="mounted disk") as error:
        refuse_existing(Path("/"), overwrite=True)
    assert error.value.fix == "Choose a folder in it, as /model"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def race() -> None:
        with atomic_folder(tmp_path / "x") as temporary:
            (temporary / "lorasb.json").write_text('{"slow": 1}')
            with atomic_folder(tmp_path / "y") as quicker:
                (quicker / "lorasb.json").write_text('{"quick": 1}')
            (tmp_path / "y").rename(tmp_path / "x")

    with pytest.raises(OutputError, match="the target exists"):
        race()
    assert "quick" in (tmp_path / "x" / "lorasb.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("what", ["tensors", "text"])
def test_a_file_that_the_system_does_not_take_is_our_error(what: str, tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "x"), what], capture_output=True, text=True)
    assert f"OutputError: cannot write: File too large ({tmp_path / 'x'})" in child.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_syncs_files_but_no_folders_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9p, which WSL mounts the disks of Windows by, answers so."""

    def not_of(refused: Callable[[int], bool]) -> None:
        def fsync(handle: int) -> None:
            if refused(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(os, "fsync", fsync)

    def write() -> None:
        with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
            (temporary / "lorasb.json").write_text("{}")

    not_of(stat.S_ISREG)
    with pytest.raises(OSError, match="Invalid argument"):
        write()
    assert list(tmp_path.iterdir()) == []
    not_of(stat.S_ISDIR)
    write()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["lorasb.json"]


def test_errors_of_other_files_are_not_called_errors_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="basis"), cannot_write(tmp_path / "model"):
        (tmp_path / "basis").read_bytes()
    with pytest.raises(OutputError, match="cannot write: No such file or directory"), cannot_write(tmp_path / "model"):
        (tmp_path / ".model.merge" / "shard").read_bytes()


def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    (tmp_path / "old").touch(mode=0o640)
    for name in ("new", "old"):
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_text(name)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"usual": modes["usual"], "new": modes["usual"], "old": 0o640}


def test_tensors_are_as_readable_as_other_files(tmp_path: Path) -> None:
    """A server under another user reads them too."""
    (tmp_path / "usual").touch()
    (tmp_path / "old").touch(mode=0o640)
    for name in ("new", "old"):
        save_tensors({"R": torch.zeros(2)}, tmp_path / name)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"usual": modes["usual"], "new": modes["usual"], "old": 0o640}


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
    with atomic_folder(tmp_path / "x") as temporary:
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
    with atomic_folder(tmp_path / "folder") as folder, atomic_file(tmp_path / "file") as file:
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
        with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
            (temporary / "lorasb.json").touch()
        assert elsewhere.exists() == left
        monkeypatch.setattr("time.time", lambda: now + 8 * 24 * 3600)


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    for content in ("one", "two", "three"):
        with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
            (temporary / "lorasb.json").write_text(content)
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "disk" / "x" / "lorasb.json").read_text() == "three"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["x"]


def test_the_room_of_a_new_folder_is_that_of_the_disk_its_link_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to("disk/x")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0 if path.name == "disk" else 1000))
    with pytest.raises(OutputError, match="not enough disk"):
        require_room(tmp_path / "x", 1)


def test_what_an_earlier_replacement_left_behind_is_removed(tmp_path: Path) -> None:
    for name in ("x", ".x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lorasb.json").write_text("{}")
    with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
        (temporary / "lorasb.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


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


@pytest.mark.parametrize("kind", ["clone", "submodule"])
def test_a_clone_that_is_replaced_keeps_its_history(kind: str, tmp_path: Path) -> None:
    git = tmp_path / "x" / ".git"
    named = git / "HEAD" if kind == "clone" else git
    named.parent.mkdir(parents=True)
    named.write_text("ref: refs/heads/main")
    (named.parent / "hook").symlink_to("nowhere")
    (tmp_path / "x" / "lorasb.json").touch()
    with atomic_folder(tmp_path / "x", overwrite=True) as temporary:
        (temporary / "lorasb.json").write_text("{}")
        (temporary / "link").symlink_to("nowhere")
    assert (named.read_text(), (tmp_path / "x" / "lorasb.json").read_text()) == ("ref: refs/heads/main", "{}")
    assert (git / "hook").is_symlink() == (kind == "clone")


def test_a_link_that_cannot_be_made_is_about_where_it_goes(tmp_path: Path) -> None:
    """The system names first what it leads to."""
    with (
        pytest.raises(OutputError, match=r"cannot write: No such file or directory \(.*target\)"),
        cannot_write(tmp_path / "target"),
    ):
        (tmp_path / "target" / "gone" / "link").symlink_to("/etc/passwd")
