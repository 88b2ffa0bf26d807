"""A project that is pushed, as far as it goes without a network: what is read, and whom a failure stops."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis
from lorasb_export.errors import LoraSBError, OutputError, ServerError, SettingsError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.project.project import Project
from lorasb_export.project.push import push_project
from lorasb_export.publishing import checksums
from tests.pushing import make

pytestmark = pytest.mark.usefixtures("no_network")


def test_a_basis_named_by_way_of_the_folder_above(tmp_path: Path) -> None:
    make(tmp_path)
    project = Project(tmp_path, basis_path=f"../{tmp_path.name}/basis")
    found = dict(push_project(project, "me/{name}", dry_run=True))
    plans = [plan for plan in found.values() if not isinstance(plan, LoraSBError)]
    assert [(plan["repo"], plan.get("basis")) for plan in plans] == [("me/basis", None), ("me/a", "me/basis")]


def test_an_adapter_that_cannot_be_pushed_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose weights are damaged, and one whose config is: not even its basis is known."""
    monkeypatch.chdir(tmp_path)
    _, adapter = make(tmp_path)
    for name in ("b", "c", "d"):
        shutil.copytree(adapter, adapter.with_name(name))
    (adapter.with_name("b") / "adapter.safetensors").write_bytes(b"damaged")
    config = read_json(adapter.with_name("c") / "adapter_config.json")
    write_json(adapter.with_name("c") / "adapter_config.json", config | {"scaling": 3.0})
    Path("lorasb.toml").write_text('[hub]\nrepo = "me/{name}"\n')
    caplog.set_level(logging.INFO)
    done = CliRunner().invoke(app, ["push", "--dry-run", "--json"])
    printed = json.loads(done.stdout)
    assert (done.exit_code, [plan["repo"] for plan in printed["pushed"]]) == (1, ["me/basis", "me/a", "me/d"])
    assert {name: error["type"] for name, error in printed["failed"].items()} == dict.fromkeys("bc", "ArtifactError")
    assert "2 failed:\n  1. b: " in done.stderr
    turns = ["1 of 5: basis", *(f"{number} of 5: adapters/{name}" for number, name in enumerate("abcd", 2))]
    assert [message for message in caplog.messages if " of 5: " in message] == turns
    for name in "acd":
        shutil.rmtree(adapter.with_name(name))
    done = CliRunner().invoke(app, ["push", "--dry-run", "--json"])
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed)) == (1, ["pushed", "error"])  # the error as that of a single folder
    assert [plan["repo"] for plan in printed["pushed"]] == ["me/basis"]


@pytest.mark.parametrize(
    ("error", "pushed"),
    [
        (ServerError("the Hub cannot be reached", fix=""), 2),
        (ServerError("somebody else committed meanwhile", fix=""), 4),
        (OutputError("the repository is public", fix=""), 4),
        (SettingsError("not a Hub repository", fix=""), 2),
    ],
)
def test_an_error_that_all_would_meet_ends_the_push(
    error: LoraSBError, pushed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = make(tmp_path)
    for name in ("b", "c"):
        shutil.copytree(adapter, adapter.with_name(name))
    if isinstance(error, ServerError):
        error.of_every_repository = pushed == 2

    def push(folder: Path, *_: Any, **__: Any) -> dict[str, Any]:
        if folder.name == "b":
            raise error
        return {"repo": folder.name}

    monkeypatch.setattr("lorasb_export.project.push.push", push)
    found: dict[str, Any] = {}
    with pytest.raises(type(error)) if pushed == 2 else nullcontext():
        found.update(push_project(Project(tmp_path), "me/{name}"))
    assert list(found) == ["basis", "a", "b", "c"][:pushed]


def test_of_a_project_each_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the basis of an adapter is, its config says; one that goes into every adapter is as its digest says."""
    _, adapter = make(tmp_path)
    shutil.copytree(adapter, adapter.with_name("b"))
    loads = {kind: Mock(wraps=kind.load) for kind in (Adapter, Basis)}
    for kind, load in loads.items():
        monkeypatch.setattr(kind, "load", load)
    assert len(dict(push_project(Project(tmp_path), "me/{name}", dry_run=True))) == 3
    assert [load.call_count for load in loads.values()] == [2, 1]
    hashed = Mock(wraps=checksums.sha256_file)
    monkeypatch.setattr(checksums, "sha256_file", hashed)
    checksums._digest.cache_clear()
    found = dict(push_project(Project(tmp_path), "me/{name}", with_basis=True, dry_run=True))
    assert [plan["basis"] for plan in found.values() if not isinstance(plan, LoraSBError)] == ["embedded"] * 2
    assert [load.call_count for load in loads.values()] == [4, 1]
    assert [call.args[0].name for call in hashed.call_args_list].count("basis.safetensors") == 1
