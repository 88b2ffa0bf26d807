"""Where an adapter finds its basis: in it, beside it, behind links, and after all of it has moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lorasb_export import Adapter, Basis
from tests.artifacts import copy, edit


def test_embedded_adapter_stands_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(folders[1])
    adapter.save(tmp_path / "alone", embed=True)
    Adapter.load(tmp_path / "alone").save(tmp_path / "again")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    moved = tmp_path / "moved"
    (tmp_path / "alone").rename(moved)
    assert Adapter.load(moved).load_basis().sha256 == adapter.basis_sha256


def test_adapters_name_the_folder_that_a_basis_was_saved_to(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    basis = replace(Basis.load(folders[0]), source=None)  # as `calibrate` makes it
    Adapter.fresh(basis).save(tmp_path / "before")
    assert (tmp_path / "before" / "basis.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    basis.save("basis")
    Adapter.fresh(basis).save("after")
    assert not (tmp_path / "after" / "basis.safetensors").exists()
    assert Adapter.load("after").basis_source == basis.source == str(tmp_path / "basis")
    of_hub = replace(basis, source="me/basis@main")
    of_hub.save("copy")
    assert of_hub.source == "me/basis@main"


def test_a_basis_saved_after_its_adapter_was_made_is_named(
    folders: tuple[Path, Path], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    basis = replace(Basis.load(folders[0]), source=None)
    adapter = Adapter.fresh(basis)
    adapter.save(tmp_path / "before")
    assert "before holds the whole basis, saved nowhere else" in log.text
    log.clear()
    basis.save(tmp_path / "basis")
    adapter.save(tmp_path / "after")
    assert Adapter.load(tmp_path / "after").basis_source == str(tmp_path / "basis")
    alone = Adapter.load(tmp_path / "before")
    alone.load_basis()
    for name in ("again", "and_again"):  # what lies in an adapter is no basis for others to name
        alone.save(tmp_path / name)
        assert Adapter.load(tmp_path / name).basis_source is None
    assert not log.text


def test_basis_inside_the_adapter_folder_is_found(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.load(folders[1])
    adapter.basis_source = str(tmp_path / "a" / "basis")
    adapter.save(tmp_path / "a")
    copy(folders[0], tmp_path / "a" / "basis")
    monkeypatch.chdir("/")
    assert Adapter.load(tmp_path / "a").load_basis().sha256 == adapter.basis_sha256


def test_adapters_behind_a_link_find_their_basis_from_both_sides(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """`adapters` leads to another disk; then all of it moves."""
    copy(folders[0], tmp_path / "all" / "project" / "basis")
    (tmp_path / "all" / "scratch" / "me" / "runs").mkdir(parents=True)
    (tmp_path / "all" / "project" / "adapters").symlink_to("../scratch/me/runs")
    adapter = replace(Adapter.load(folders[1]), basis_source=str(tmp_path / "all" / "project" / "basis"))
    adapter.save(tmp_path / "all" / "project" / "adapters" / "a")
    adapter.save(tmp_path / "all" / "project" / "adapters" / "old")
    real = tmp_path / "all" / "scratch" / "me" / "runs"
    edit(real / "old", "adapter_config.json", lambda c: c["basis"].update(source="../../basis"))  # of the first ones
    (tmp_path / "all").rename(tmp_path / "moved")
    for folder in ("project/adapters/a", "scratch/me/runs/a", "project/adapters/old"):
        assert Adapter.load(tmp_path / "moved" / folder).load_basis().sha256 == adapter.basis_sha256


def test_a_project_reached_through_links_may_move(folders: tuple[Path, Path], tmp_path: Path) -> None:
    project, link = tmp_path / "disk" / "project", tmp_path / "link"
    copy(folders[0], tmp_path / "shared" / "basis")
    project.mkdir(parents=True)
    (project / "basis").symlink_to(tmp_path / "shared" / "basis")
    link.symlink_to(project)
    adapter = replace(Adapter.load(folders[1]), basis_source=str(link / "basis"))
    adapter.save(link / "adapters" / "a")
    assert Adapter.load(link / "adapters" / "a").basis_source == str(project / "basis")
    project.rename(tmp_path / "moved")
    assert Adapter.load(tmp_path / "moved" / "adapters" / "a").basis_source == str(tmp_path / "moved" / "basis")
