"""A repository that several people push their projects to, or edit by hand: nobody loses what is theirs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from integration import one_repository
from integration.hub_client import CLI, Hub, make_adapter, make_basis
from integration.one_repository import REPO, copied, pushed
from lorasb_export import Adapter
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed
from lorasb_export.publishing.outgoing import SUMS

project = one_repository.project
Edit = Callable[[str, "bytes | None"], None]


@pytest.fixture
def theirs(project: Path, tmp_path: Path) -> Path:
    """Somebody else's project, with adapter `c` in the same basis."""
    shutil.copytree(project / "basis", tmp_path / "theirs" / "basis")
    shutil.copy(project / "lorasb.toml", tmp_path / "theirs")
    make_adapter(tmp_path / "theirs" / "adapters" / "c", tmp_path / "theirs" / "basis", seed=9)
    return tmp_path / "theirs"


@pytest.fixture
def edit(any_hub: Hub) -> Edit:
    """Commits one small file by hand, or its removal."""

    def edit(path: str, content: bytes | None) -> None:
        repo = any_hub.repos[REPO]
        files = dict(repo.commits[repo.refs["main"]])
        files.pop(path, None)
        repo.commit("main", files | ({} if content is None else {path: any_hub.store.regular(content)}), "by hand")

    return edit


def refused(hub: Hub, project: Path, *more: object) -> str:
    """What is said; and nothing was committed."""
    before = dict(hub.repos[REPO].refs) if REPO in hub.repos else None
    said = hub.lorasb_fails("push", "--config", project / "lorasb.toml", *more)
    assert (dict(hub.repos[REPO].refs) if REPO in hub.repos else None) == before
    return " ".join(said.split())


def renewed(project: Path, hub: Hub, *names: str) -> None:
    """Another basis, and adapters in it."""
    shutil.rmtree(project / "basis")
    shutil.rmtree(project / "adapters")
    make_basis(project / "basis", hub.base, seed=7)
    for name in names:
        make_adapter(project / "adapters" / name, project / "basis", seed=8)


def parts(hub: Hub) -> list[str]:
    return sorted(json.loads(hub.content(REPO, "lorasb.json"))["parts"])


@pytest.mark.parametrize("index", ["as pushed", "without an entry", "gone"])
def test_no_adapter_loses_its_basis(any_hub: Hub, project: Path, theirs: Path, edit: Edit, index: str) -> None:
    pushed(any_hub, theirs)
    if index == "without an entry":
        said = json.loads(any_hub.content(REPO, "lorasb.json"))
        said["parts"]["adapters/c"]["evaluation"] = None
        edit("lorasb.json", json.dumps(said).encode())
    elif index == "gone":
        edit("lorasb.json", None)
    renewed(project, any_hub, "a")
    said = refused(any_hub, project)
    assert "adapters there that are not sent (adapters/c) were trained in a basis that this push replaces" in said
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/c")["basis_matches"]


def test_a_basis_that_moves_takes_nothing_away(any_hub: Hub, project: Path, theirs: Path) -> None:
    """Though the push holds the old one, under another name."""
    pushed(any_hub, theirs)
    old = shutil.copytree(project / "basis", project / "old")
    renewed(project, any_hub, "b")
    make_adapter(project / "adapters" / "a", old, seed=1)
    assert "adapters/c) were trained in a basis that this push replaces" in refused(any_hub, project)


def test_an_adapter_that_names_a_commit_keeps_its_basis(any_hub: Hub, project: Path, theirs: Path) -> None:
    """In a private repository, whatever the push says of public ones."""
    pushed(any_hub, project)
    config = read_json(theirs / "adapters" / "c" / "adapter_config.json")
    config["basis"]["source"] = f"{REPO}/basis@{any_hub.repos[REPO].refs['main']}"
    write_json(theirs / "adapters" / "c" / "adapter_config.json", sealed(config))
    pushed(any_hub, theirs, "--public")
    renewed(project, any_hub, "a", "b")
    pushed(any_hub, project)
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/c")["basis_matches"]


def test_two_first_pushes_at_once(any_hub: Hub, project: Path, theirs: Path) -> None:
    """The second was made for a repository that was not there."""
    race = """
import sys
from pathlib import Path
from lorasb_export.errors import ServerError
from lorasb_export.project.project import Project
from lorasb_export.project.push import push_project
from lorasb_export.publishing.repository import Repository
look = Repository.look
def meanwhile(repository, dry_run):
    found, Repository.look = look(repository, dry_run), look
    list(push_project(Project(Path(sys.argv[2])), sys.argv[3]))
    return found
Repository.look = meanwhile
try:
    list(push_project(Project(Path(sys.argv[1])), sys.argv[3]))
except ServerError as error:
    print(error)
"""
    said = any_hub.run(race, project, theirs, REPO)
    assert said.startswith("the repository changed meanwhile; nothing was committed on top of that")
    assert parts(any_hub) == ["adapters/c", "basis"]
    pushed(any_hub, project)
    assert parts(any_hub) == ["adapters/a", "adapters/b", "adapters/c", "basis"]


def test_a_damaged_basis_inside_an_adapter_is_not_published(any_hub: Hub, project: Path) -> None:
    adapter = Adapter.load(project / "adapters" / "b")
    adapter.load_basis()
    adapter.save(project / "adapters" / "e", embed=True)
    pushed(any_hub, project)
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/e")["basis_matches"]
    for damage in (b"damaged", None):
        os.unlink(project / "adapters" / "e" / "basis.safetensors")
        if damage:
            (project / "adapters" / "e" / "basis.safetensors").write_bytes(damage)
        exit_code, said, _ = any_hub.start(CLI, "push", "--config", project / "lorasb.toml", "--json")
        assert (exit_code, list(json.loads(said.splitlines()[-1])["failed"])) == (1, ["e"])
        assert any_hub.lorasb("inspect", f"{REPO}/adapters/e")["basis_matches"]


def test_what_was_put_beside_the_parts_stays(any_hub: Hub, project: Path, edit: Edit) -> None:
    pushed(any_hub, project)
    for path in ("model.onnx", "full.safetensors", "adapters/a/notes.txt"):
        edit(path, b"by hand")
    make_adapter(project / "adapters" / "d", project / "basis", seed=4)
    assert pushed(any_hub, project)["deleted"] == []
    assert {"model.onnx", "full.safetensors", "adapters/a/notes.txt"} <= set(any_hub.files(REPO))


def test_a_model_with_a_folder_of_adapters_is_no_project(any_hub: Hub, project: Path, edit: Edit) -> None:
    any_hub.put(REPO, any_hub.base)
    any_hub.repos[REPO].private = True
    edit("adapters/x/adapter.safetensors", b"")
    assert "the repository holds another kind (merged)" in refused(any_hub, project)


def test_badly_named_adapters_are_left_out(any_hub: Hub, project: Path) -> None:
    bad = ["a b", "q[1]", "x..y", "ü"]
    for name in bad:
        make_adapter(project / "adapters" / name, project / "basis", seed=9)
    exit_code, said, errors = any_hub.start(CLI, "push", "--config", project / "lorasb.toml", "--json")
    assert (exit_code, sorted(json.loads(said.splitlines()[-1])["failed"])) == (1, bad)
    assert "'q[1]' cannot name a folder on the Hub" in errors
    assert parts(any_hub) == ["adapters/a", "adapters/b", "basis"]


def test_an_adapter_whose_basis_is_gone_is_left_out(any_hub: Hub, project: Path) -> None:
    config = read_json(project / "adapters" / "b" / "adapter_config.json")
    config["basis"]["source"] = "me/gone@" + "0" * 40
    write_json(project / "adapters" / "b" / "adapter_config.json", sealed(config))
    exit_code, said, errors = any_hub.start(CLI, "push", "--config", project / "lorasb.toml", "--json")
    assert (exit_code, list(json.loads(said.splitlines()[-1])["failed"])) == (1, ["b"])
    assert "1. b: the adapter's basis: the Hub has no such repository" in errors
    assert parts(any_hub) == ["adapters/a", "basis"]


def test_an_index_of_another_hand_harms_nobody(any_hub: Hub, project: Path, edit: Edit) -> None:
    pushed(any_hub, project)
    index = json.loads(any_hub.content(REPO, "lorasb.json"))
    index["parts"] |= {"bases/z": {"sha256": "x", "rank": 4, "base_model": "y", "basis_sha256": "y"}, "adapters/0": 7}
    for path in ("bases/z/basis.safetensors", "bases/z/basis_config.json", "adapters/0/adapter.safetensors"):
        edit(path, b"{}")
    edit("lorasb.json", json.dumps(index).encode())
    make_adapter(project / "adapters" / "d", project / "basis", seed=4)
    pushed(any_hub, project)
    assert parts(any_hub) == ["adapters/a", "adapters/b", "adapters/d", "bases/z", "basis"]


def test_a_config_that_is_no_text_stops_nobody(any_hub: Hub, project: Path, theirs: Path, edit: Edit) -> None:
    """Of a classifier that comes first on the card, and of one that the index does not know."""
    adapter = Adapter.load(theirs / "adapters" / "c")
    adapter.task_type, adapter.head = "SEQ_CLS", {"score.weight": torch.zeros(2, 16)}
    adapter.training = {"labels": ["no", "yes"]}
    adapter.save(theirs / "adapters" / "0")
    pushed(any_hub, theirs)
    edit("adapters/0/adapter_config.json", b"\xff")
    pushed(any_hub, project)
    assert "adapters/0" in parts(any_hub)
    edit("lorasb.json", None)
    make_adapter(project / "adapters" / "d", project / "basis", seed=4)
    pushed(any_hub, project)
    assert parts(any_hub) == ["adapters/a", "adapters/b", "adapters/c", "adapters/d", "basis"]


def test_a_card_of_another_hand_is_named(any_hub: Hub, project: Path, theirs: Path, edit: Edit) -> None:
    pushed(any_hub, theirs)
    lines = [f"{new}: &{new} [*{old}, *{old}]" for old, new in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")]
    edit("README.md", "\n".join(["---", "a: &a [x, x]", *lines, "tags: [*z]", "---"]).encode())
    said = refused(any_hub, project)
    assert "the card's front matter has an alias (`*name`) (README.md on the Hub)" in said


def test_checksums_of_another_hand_are_not_overwritten(any_hub: Hub, project: Path, theirs: Path, edit: Edit) -> None:
    pushed(any_hub, project)
    edit(SUMS, any_hub.content(REPO, SUMS) + b"a line\n")
    assert f"{SUMS} there is not as a push writes it" in refused(any_hub, theirs)


def test_one_adapter_by_its_name(any_hub: Hub, project: Path) -> None:
    """With the repository in lorasb.toml; the others stay as they are."""
    made = pushed(any_hub, project, "a")
    assert made["kind"] == "project"
    assert parts(any_hub) == ["adapters/a", "basis"]
    pushed(any_hub, project)
    for name in "ab":
        shutil.rmtree(project / "adapters" / name)
        make_adapter(project / "adapters" / name, project / "basis", seed=6)
    before = any_hub.content(REPO, "adapters/a/adapter.safetensors")
    pushed(any_hub, project, "b")
    assert any_hub.content(REPO, "adapters/a/adapter.safetensors") == before
    for folder in (project / "basis", any_hub.base):
        assert f"{REPO} is for the project's basis and adapters" in refused(any_hub, project, folder)
    said = any_hub.lorasb_fails("push", project / "adapters" / "a", "--repo", REPO, "--with-basis")
    assert "Name no folder, to push the project" in " ".join(said.split())


def test_a_copy_of_it_is_not_overwritten(any_hub: Hub, project: Path, tmp_path: Path) -> None:
    pushed(any_hub, project)
    copy = copied(any_hub, tmp_path / "copy")
    words = ("merge", project / "adapters" / "a", "--out", copy, "--overwrite")
    assert "the target exists and is not a folder lorasb wrote" in any_hub.lorasb_fails(*words)
    said = any_hub.lorasb_fails("push", copy, "--repo", "me/other")
    assert "a whole project is not pushed as a folder" in said
    said = any_hub.lorasb_fails("merge", f"{REPO}/adapter/a")
    assert "of a project's repository owner/name/adapters/NAME" in " ".join(said.split())
