"""Files and folders appear whole or not at all, whatever the disk and the process meet."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasb_export import Adapter, calibrate, export, fit, merge
from lorasb_export.data.task import TaskData
from lorasb_export.errors import OutputError
from lorasb_export.files.atomic import atomic_file, atomic_folder
from lorasb_export.files.output import cannot_write, refuse_existing, require_room
from lorasb_export.project.init import write_project
from lorasb_export.project.project import Project
from lorasb_export.serving.api_keys import api_key
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.tensors import save_tensors
from lorasb_export.training.fit import fit_together
from tests.forks import exit_code_of_a_fork


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "x", kind=None) as temporary:
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
    Adapter.fresh(basis).save("~/a")
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
        with atomic_folder(tmp_path / "x", overwrite=overwrite, kind=None) as temporary:
            (temporary / name).write_text(name)
            (temporary / "lorasb.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["lorasb.json", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_of_somebody_elses_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with (
            pytest.raises(OutputError, match="not a folder lorasb wrote"),
            atomic_folder(tmp_path / name, overwrite=True, kind=None),
        ):
            pass
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home"]


def test_what_stock_peft_trained_is_somebody_elses(tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    (stock / "checkpoint-500").mkdir(parents=True)
    (stock / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(OutputError, match="not a folder lorasb wrote"):
        refuse_existing(stock, overwrite=True, kind=None)
    (stock / "adapter_config.json").write_text('{"peft_type": "LORA_SB", "r"')  # ours, cut short
    refuse_existing(stock, overwrite=True, kind=None)


def test_a_mounted_disk_is_refused_before_anything_is_made() -> None:
    with pytest.raises(OutputError, match="mounted disk") as error:
        refuse_existing(Path("/"), overwrite=True, kind=None)
    assert error.value.fix == "Choose a folder in it, as /model"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def race() -> None:
        with atomic_folder(tmp_path / "x", kind=None) as temporary:
            (temporary / "lorasb.json").write_text('{"slow": 1}')
            with atomic_folder(tmp_path / "y", kind=None) as quicker:
                (quicker / "lorasb.json").write_text('{"quick": 1}')
            (tmp_path / "y").rename(tmp_path / "x")

    with pytest.raises(OutputError, match="the target exists"):
        race()
    assert "quick" in (tmp_path / "x" / "lorasb.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("what", ["tensors", "text"])
def test_a_file_that_the_system_does_not_take_is_our_error(what: str, tmp_path: Path) -> None:
    said = re.escape(f"cannot write: File too large ({tmp_path / 'x'})")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with atomic_folder(tmp_path / "x", kind=None) as folder:
            if what == "tensors":
                save_tensors({"R": torch.zeros(1 << 16)}, folder / "x.safetensors")
            else:
                (folder / "x.txt").write_text("x" * (1 << 16))

    def is_refused() -> None:
        with pytest.raises(OutputError, match=said):
            write()

    assert exit_code_of_a_fork(is_refused) == 0
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
        with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
            (temporary / "lorasb.json").write_text("{}")

    not_of(stat.S_ISREG)
    with pytest.raises(OSError, match="Invalid argument"):
        write()
    assert list(tmp_path.iterdir()) == []
    not_of(stat.S_ISDIR)
    write()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["lorasb.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut an empty one might else have it."""
    fsync, put, synced = os.fsync, Path.replace, list[tuple[int, int]]()

    def watched(handle: int) -> None:
        fsync(handle)
        synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def named(path: Path, target: Path) -> Path:
        assert (path.stat().st_ino, 3) in synced
        return put(path, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "replace", named)
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_a_folder_whose_name_the_disk_does_not_confirm_is_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fails_beside_it(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails_beside_it)
    with (
        pytest.raises(OutputError, match="it is there and whole, but the disk does not confirm its name: Input"),
        atomic_folder(tmp_path / "x", kind=None) as temporary,
    ):
        (temporary / "lorasb.json").write_text("{}")
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


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    for content in ("one", "two", "three"):
        with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
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


@pytest.mark.parametrize("kind", ["clone", "submodule"])
def test_a_clone_that_is_replaced_keeps_its_history(kind: str, tmp_path: Path) -> None:
    git = tmp_path / "x" / ".git"
    named = git / "HEAD" if kind == "clone" else git
    named.parent.mkdir(parents=True)
    named.write_text("ref: refs/heads/main")
    (named.parent / "hook").symlink_to("nowhere")
    (tmp_path / "x" / "lorasb.json").touch()
    with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as temporary:
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
