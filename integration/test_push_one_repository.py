"""A project in one repository: pushed in one commit, used by name, shared by two people."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from integration import one_repository
from integration.hub_client import CLI, Hub, make_adapter, make_basis
from integration.hub_server import Entry
from integration.one_repository import REPO, copied, pushed
from lorasb_export import Adapter
from lorasb_export.publishing.outgoing import SUMS

project = one_repository.project


def test_one_commit_brings_all_and_only_what_changed_is_sent(any_hub: Hub, project: Path) -> None:
    plan = pushed(any_hub, project, "--dry-run")
    assert list(any_hub.repos) == ["owner/base"]
    result = pushed(any_hub, project)
    assert (result["repo"], result["kind"], result["private"], result["changed"]) == (REPO, "project", True, True)
    assert any_hub.commits(REPO) == 1
    files = any_hub.files(REPO)
    assert [file["path"] for file in plan["files"]] == sorted(files)
    one = ["README.md", "adapter.safetensors", "adapter_config.json"]
    parts = {"basis": ["README.md", "basis.safetensors", "basis_config.json"], "adapters/a": one, "adapters/b": one}
    assert sorted(files) == sorted(
        ["README.md", "SHA256SUMS", "lorasb.json", *(f"{part}/{name}" for part, of in parts.items() for name in of)]
    )
    config = json.loads(any_hub.content(REPO, "adapters/b/adapter_config.json"))
    assert config["basis"]["source"] == "../../basis"
    assert pushed(any_hub, project)["changed"] is False

    shutil.rmtree(project / "adapters" / "b")
    make_adapter(project / "adapters" / "b", project / "basis", seed=6)
    plan = pushed(any_hub, project, "--dry-run")
    changed = {file["path"] for file in plan["files"] if file["change"] != "same"}
    in_b = {f"adapters/b/{name}" for name in one}
    assert changed == in_b | {"SHA256SUMS", "lorasb.json"}
    assert pushed(any_hub, project)["changed"]
    assert any_hub.commits(REPO) == 2


FEW = f"""
from unittest.mock import patch
with patch("lorasb_export.publishing.project_repository._MANY", 9):  # files in a commit
    {CLI}
"""


def test_many_files_come_in_several_commits_each_of_them_whole(any_hub: Hub, project: Path) -> None:
    for seed, name in enumerate("cde"):
        make_adapter(project / "adapters" / name, project / "basis", seed=seed)
    words = "push", "--config", project / "lorasb.toml", "--json"
    result = json.loads(any_hub.run(FEW, *words))["pushed"][0]
    there = ["".join(sorted({path[9] for path in files if path.startswith("adapters/")})) for files in commits(any_hub)]
    assert there == ["a", "abc", "abcde"]
    assert result["commit"] == any_hub.repos[REPO].refs["main"]
    for files in commits(any_hub):
        sums = any_hub.store.path(files[SUMS].sha256).read_text().split("\n")
        assert dict(reversed(line.split("  ")) for line in sums if line) == {
            path: entry.sha256
            for path, entry in files.items()
            if path.rpartition("/")[2] not in (SUMS, ".gitattributes", "README.md")
        }
        index = json.loads(any_hub.store.path(files["lorasb.json"].sha256).read_text())["parts"]
        assert set(index) == {path.rpartition("/")[0] for path in files if path.endswith(".safetensors")}

    # A basis that takes another's place comes with all its adapters.
    make_basis(project / "new", any_hub.base, seed=8)
    shutil.rmtree(project / "basis")
    (project / "new").rename(project / "basis")
    for seed, name in enumerate("abcde"):
        shutil.rmtree(project / "adapters" / name)
        make_adapter(project / "adapters" / name, project / "basis", seed=seed)
    assert json.loads(any_hub.run(FEW, *words))["pushed"][0]["changed"]
    assert any_hub.commits(REPO) == 4


def test_many_files_are_one_pull_request(any_hub: Hub, project: Path) -> None:
    for seed, name in enumerate("cde"):
        make_adapter(project / "adapters" / name, project / "basis", seed=seed)
    any_hub.run(FEW, "push", "--config", project / "lorasb.toml", "--create-pr", "--json")
    assert set(any_hub.repos[REPO].refs) == {"main", "refs/pr/1"}


def test_adapters_that_take_the_place_of_others_are_named(any_hub: Hub, project: Path) -> None:
    words = "push", "--config", project / "lorasb.toml"
    pushed(any_hub, project)
    (project / "adapters" / "a" / "README.md").write_text("Ours.\n")
    shutil.rmtree(project / "adapters" / "b")
    make_adapter(project / "adapters" / "b", project / "basis", seed=6)
    make_adapter(project / "adapters" / "d", project / "basis", seed=7)
    lines = any_hub.start(CLI, *words)[1].splitlines()
    assert [line for line in lines if "replaced" in line] == ["  replaced adapters/b/adapter.safetensors"]
    assert "replaced" not in any_hub.start(CLI, *words)[1]


def commits(hub: Hub) -> list[Mapping[str, Entry]]:
    """The files of each commit that a push made, oldest first."""
    return list(hub.repos[REPO].commits.values())[1:]


def test_an_adapter_is_used_by_its_place(any_hub: Hub, project: Path, tmp_path: Path) -> None:
    """Its basis is the one of the same commit, though another has taken its place."""
    first = pushed(any_hub, project)["commit"]
    found = any_hub.lorasb("inspect", f"{REPO}/adapters/a", "--verify")
    assert (found["kind"], found["path"]) == ("adapter", f"{REPO}/adapters/a@{first}")
    assert (found["basis_source"], found["basis_matches"]) == (f"{REPO}/basis@{first}", True)
    assert (found["verified"]["against"], found["verified"]["files"]) == (SUMS, 2)
    whole = any_hub.lorasb("inspect", REPO, "--verify")
    assert (whole["kind"], whole["verified"]["files"]) == ("project", 7)
    assert sorted(whole["parts"]) == ["adapters/a", "adapters/b", "basis"]
    assert whole["base_model"] == "owner/base"
    lines = any_hub.start(CLI, "inspect", REPO)[1].splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["path:", "kind:", "base", "adapters/a", "adapters/b", "basis"]

    for name in ("basis", "adapters/a", "adapters/b"):
        shutil.rmtree(project / name)
    make_basis(project / "basis", any_hub.base, seed=7)
    for name in "ab":
        make_adapter(project / "adapters" / name, project / "basis", seed=8)
    second = pushed(any_hub, project)["commit"]
    for commit in (first, second):
        out = tmp_path / commit
        any_hub.run(CLI, "merge", f"{REPO}/adapters/a@{commit}", "--out", out)
        made = json.loads((out / "lorasb.json").read_text())
        assert made["adapter"]["source"] == f"{REPO}/adapters/a@{commit}"
        assert made["basis"]["source"] == f"{REPO}/basis@{commit}"
    said = any_hub.lorasb_fails("inspect", f"{REPO}/adapters/c")
    assert "that folder of that repository has no" in said
    assert f"{REPO}/adapters/c@{second}" in said


def test_all_of_them_are_served(any_hub: Hub, project: Path) -> None:
    commit = pushed(any_hub, project)["commit"]
    for source in (f"{REPO}/adapters", f"{REPO}/adapters@{commit}"):
        plan = any_hub.lorasb("serve", "--adapters-dir", source, "--dry-run")
        assert plan["models"] == ["owner/base", "a", "b"]
        assert plan["mode"] == "shared"
    any_hub.requests.clear()
    plan = any_hub.lorasb("serve", "--adapters", f"{REPO}/adapters/a,{REPO}/adapters/b", "--dry-run")
    assert plan["models"] == ["owner/base", "a", "b"]
    assert any_hub.requests.count(f"GET /api/models/{REPO}?expand=sha") == 1
    said = any_hub.lorasb_fails("serve", "--adapters-dir", "me/nothing/adapters", "--dry-run")
    assert "the Hub has no such repository" in said


def test_a_download_of_it_is_whole(any_hub: Hub, project: Path, tmp_path: Path) -> None:
    pushed(any_hub, project)
    copy = copied(any_hub, tmp_path / "copy")
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=copy, check=True)
    adapter = Adapter.load(copy / "adapters" / "b")
    adapter.load_basis()
    own = Adapter.load(project / "adapters" / "b")
    assert all(torch.equal(adapter.R[name], own.R[name]) for name in own.R)


def test_two_people_with_different_tasks_share_one(any_hub: Hub, project: Path, tmp_path: Path) -> None:
    pushed(any_hub, project)
    theirs = tmp_path / "theirs"
    shutil.copytree(project / "basis", theirs / "basis")
    make_adapter(theirs / "adapters" / "c", theirs / "basis", seed=9)
    (theirs / "lorasb.toml").write_text(f'[hub]\nrepo = "{REPO}"\n')
    result = pushed(any_hub, theirs)
    assert result["deleted"] == []
    index = json.loads(any_hub.content(REPO, "lorasb.json"))
    assert sorted(index["parts"]) == ["adapters/a", "adapters/b", "adapters/c", "basis"]
    assert "# 3 LoRA-SB adapters" in any_hub.content(REPO, "README.md").decode()
    assert any_hub.lorasb("inspect", REPO, "--verify")["verified"]["files"] == 9
    assert pushed(any_hub, project)["changed"] is False

    # A basis of their own would take away that of a and b.
    shutil.rmtree(theirs / "basis")
    shutil.rmtree(theirs / "adapters")
    make_adapter(theirs / "adapters" / "c", make_basis(theirs / "basis", any_hub.base, seed=7), seed=9)
    said = any_hub.lorasb_fails("push", "--config", theirs / "lorasb.toml")
    lost = "adapters there that are not sent (adapters/a, adapters/b) were trained in a basis that this push replaces"
    assert lost in said
    assert any_hub.commits(REPO) == 2


def test_the_card_shows_the_labels_of_a_classifier_that_becomes_the_first(any_hub: Hub, project: Path) -> None:
    for name in "ab":
        adapter = Adapter.load(project / "adapters" / name)
        adapter.task_type, adapter.head = "SEQ_CLS", {"score.weight": torch.zeros(2, 16)}
        adapter.training = {"labels": [f"no {name}", f"yes {name}"]}
        adapter.save(project / "adapters" / name, overwrite=True)
    pushed(any_hub, project)
    assert 'id2label={0: "no a", 1: "yes a"}' in any_hub.content(REPO, "README.md").decode()
    repo = any_hub.repos[REPO]
    kept = {path: entry for path, entry in repo.commits[repo.refs["main"]].items() if "adapters/a/" not in path}
    repo.commit("main", kept, "without a")
    for name in "ab":
        shutil.rmtree(project / "adapters" / name)
    make_adapter(project / "adapters" / "c", project / "basis", seed=9)
    pushed(any_hub, project)
    assert 'id2label={0: "no b", 1: "yes b"}' in any_hub.content(REPO, "README.md").decode()


def test_what_cannot_be_published_is_left_out(any_hub: Hub, project: Path) -> None:
    """What was published of it before stays."""
    pushed(any_hub, project)
    (project / "adapters" / "b" / "adapter.safetensors").write_bytes(b"damaged")
    (project / "adapters" / "a" / "README.md").write_text("Ours.\n")
    exit_code, said, errors = any_hub.start(CLI, "push", "--config", project / "lorasb.toml", "--json")
    printed = json.loads(said.splitlines()[-1])
    assert (exit_code, list(printed["failed"])) == (1, ["b"])
    assert printed["pushed"][0]["changed"]
    assert "Ours." in any_hub.content(REPO, "adapters/a/README.md").decode()
    assert "adapters/b/adapter.safetensors" in any_hub.files(REPO)
    assert "1 failed:\n  1. b: " in errors
    (project / "adapters" / "a" / "adapter.safetensors").write_bytes(b"damaged")
    before = any_hub.commits(REPO)
    any_hub.lorasb_fails("push", "--config", project / "lorasb.toml")
    assert any_hub.commits(REPO) == before


def test_a_card_that_was_edited_there_keeps_its_text(any_hub: Hub, project: Path) -> None:
    pushed(any_hub, project)
    for path in ("README.md", "adapters/a/README.md"):
        edited = any_hub.content(REPO, path) + b"\nMine.\n"
        repo = any_hub.repos[REPO]
        repo.commit("main", {**repo.commits[repo.refs["main"]], path: any_hub.store.regular(edited)}, "edited")
    make_adapter(project / "adapters" / "c", project / "basis", seed=9)
    assert pushed(any_hub, project)["changed"]
    for path in ("README.md", "adapters/a/README.md"):
        assert any_hub.content(REPO, path).endswith(b"\nMine.\n")


def test_one_folder_is_not_pushed_over_a_project(any_hub: Hub, project: Path) -> None:
    pushed(any_hub, project)
    said = " ".join(any_hub.lorasb_fails("push", project / "adapters" / "a", "--repo", REPO, "--with-basis").split())
    assert f"the repository holds another kind (project) ({REPO}). Name no folder, to push the project" in said
    said = " ".join(any_hub.lorasb_fails("push", "--config", project / "lorasb.toml", "--with-basis").split())
    assert "in one repository the basis lies beside the adapters" in said


def test_a_project_with_two_bases(any_hub: Hub, project: Path) -> None:
    other = make_basis(project / "basis_s", any_hub.base, seed=8)
    make_adapter(project / "adapters" / "s", other, seed=5)
    pushed(any_hub, project)
    config = json.loads(any_hub.content(REPO, "adapters/s/adapter_config.json"))
    assert config["basis"]["source"] == "../../bases/basis_s"
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/s")["basis_matches"]


def test_on_a_branch_and_in_a_pull_request(any_hub: Hub, project: Path) -> None:
    """The basis comes along, so that a new one is no obstacle."""
    branch = pushed(any_hub, project, "--revision", "exp")
    assert branch["url"].endswith(f"{REPO}/tree/exp")
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/a@exp")["basis_matches"]
    request = pushed(any_hub, project, "--create-pr")
    assert request["changed"]
    assert set(any_hub.repos[REPO].refs) == {"main", "exp", "refs/pr/1"}
    assert any_hub.lorasb("inspect", f"{REPO}/adapters/a@refs/pr/1")["basis_matches"]
