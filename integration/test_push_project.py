"""A project that is pushed: its bases first, what changed alone, on main, on a branch or in a pull request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from integration.hub_client import CLI, Hub, make_adapter, make_basis
from integration.hub_server import Fault


def test_a_project_pushes_its_basis_once_and_what_changed(any_hub: Hub, adapter: Path, basis: Path) -> None:
    project = basis.parent
    make_adapter(project / "adapters" / "b", basis, seed=5)
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\n')
    words = ["push", "--config", project / "lorasb.toml"]

    def changed(*more: str) -> dict[str, bool]:
        pushed = any_hub.lorasb(*words, *more)["pushed"]
        return {result["repo"]: result.get("changed", result["sent"] > 0) for result in pushed}

    everything = dict.fromkeys(["me/basis-lorasb", "me/a-lorasb", "me/b-lorasb"], True)
    assert changed("--dry-run") == everything
    assert list(any_hub.repos) == ["owner/base"]
    assert changed() == everything
    head = any_hub.repos["me/basis-lorasb"].refs["main"]
    config = json.loads(any_hub.content("me/b-lorasb", "adapter_config.json"))
    assert config["basis"]["source"] == f"me/basis-lorasb@{head}"
    assert all(repo.private for name, repo in any_hub.repos.items() if name.startswith("me/"))

    any_hub.requests.clear()
    assert changed() == dict.fromkeys(everything, False)
    asked = [request for request in any_hub.requests if request == "HEAD /owner/base/resolve/main/README.md"]
    assert len(asked) == 2  # for a basis and for an adapter, beside whose files its licence lies
    # A new card of the basis is a new commit there; the adapters still name the one that holds their basis.
    (basis / "README.md").write_text("Ours.\n")
    shutil.rmtree(project / "adapters" / "b")
    make_adapter(project / "adapters" / "b", basis, seed=6)
    assert changed() == {"me/basis-lorasb": True, "me/a-lorasb": False, "me/b-lorasb": True}
    alone = any_hub.lorasb(*words, project / "adapters" / "a")["pushed"][0]
    assert (alone["repo"], alone["changed"], alone["kind"]) == ("me/a-lorasb", False, "adapter")


def test_a_project_says_whether_its_repositories_are_public(any_hub: Hub, adapter: Path, basis: Path) -> None:
    """As `--public` does, of a whole project and of one folder of it."""
    project = basis.parent
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\npublic = true\n')
    words = ["push", "--config", project / "lorasb.toml"]
    assert any_hub.lorasb(*words, basis)["pushed"][0]["private"] is False
    assert [result["private"] for result in any_hub.lorasb(*words)["pushed"]] == [False, False]
    assert [any_hub.repos[f"me/{name}-lorasb"].private for name in ("basis", "a")] == [False, False]


def test_every_basis_on_this_disk_is_pushed_before_the_adapters(any_hub: Hub, adapter: Path, basis: Path) -> None:
    project = basis.parent
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\n')
    other = make_basis(project / "basis_s", any_hub.base, seed=8)
    make_adapter(project / "adapters" / "s", other, seed=5)
    words = ["push", "--config", project / "lorasb.toml"]
    pushed = any_hub.lorasb(*words)["pushed"]
    assert [result["repo"] for result in pushed] == [
        "me/basis-lorasb",
        "me/basis_s-lorasb",
        "me/a-lorasb",
        "me/s-lorasb",
    ]
    head = any_hub.repos["me/basis_s-lorasb"].refs["main"]
    config = json.loads(any_hub.content("me/s-lorasb", "adapter_config.json"))
    assert config["basis"]["source"] == f"me/basis_s-lorasb@{head}"
    make_adapter(project / "adapters" / "basis_s", other, seed=6)
    refs = {name: dict(repo.refs) for name, repo in any_hub.repos.items()}
    said = any_hub.lorasb_fails(*words)
    assert "would go to one repository (basis_s). Rename a task, or a basis's folder" in " ".join(said.split())
    assert {name: dict(repo.refs) for name, repo in any_hub.repos.items()} == refs


def test_an_adapter_that_is_refused_leaves_the_others_their_turn(any_hub: Hub, adapter: Path, basis: Path) -> None:
    """But a refused token would refuse them all."""
    project = basis.parent
    for seed, name in enumerate("bc", 5):
        make_adapter(project / "adapters" / name, basis, seed=seed)
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\n')
    any_hub.put("me/b-lorasb", adapter)  # a public one
    words = ["push", "--config", project / "lorasb.toml", "--json"]
    any_hub.faults.append(Fault("POST .*/me/a-lorasb/.*commit/", status=401, times=9))
    exit_code, said, _ = any_hub.start(CLI, *words)
    assert (exit_code, "asks for a valid token (me/a-lorasb)" in json.loads(said)["error"]["message"]) == (1, True)
    assert "me/c-lorasb" not in any_hub.repos
    any_hub.faults.clear()
    exit_code, said, errors = any_hub.start(CLI, *words)
    printed = json.loads(said.splitlines()[-1])
    assert (exit_code, list(printed["failed"])) == (1, ["b"])
    assert [result["repo"] for result in printed["pushed"]] == ["me/basis-lorasb", "me/a-lorasb", "me/c-lorasb"]
    assert "1 failed:\n  1. b: the repository is public (me/b-lorasb). Pass --public" in errors


def test_a_project_with_another_basis_on_a_branch_or_in_a_pull_request(
    any_hub: Hub, adapter: Path, basis: Path
) -> None:
    project, on_main = basis.parent, {}
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\n')
    words = ["push", "--config", project / "lorasb.toml"]

    def pushed(*more: str) -> list[tuple[str, bool]]:
        results = any_hub.lorasb(*words, *more)["pushed"]
        return [(result.get("basis", "-"), result.get("changed", result["sent"] > 0)) for result in results]

    def refs() -> dict[str, dict[str, str]]:
        return {name: dict(repo.refs) for name, repo in any_hub.repos.items() if name.startswith("me/")}

    for seed in (0, 7):
        if seed:
            any_hub.lorasb(*words)
            shutil.rmtree(basis)
            shutil.rmtree(adapter)
            make_adapter(adapter, make_basis(basis, any_hub.base, seed=seed))
        on_main = refs()
        for more in ((), ("--dry-run",)):
            said = any_hub.lorasb_fails(*words, "--create-pr", *more)
            assert "a pull request cannot bring a new basis" in said
            assert refs() == on_main
        for more in ((), ("--revision", "exp")):
            assert pushed("--dry-run", *more) == [("-", True), ("me/basis-lorasb", True)]
        assert refs() == on_main

    assert pushed("--revision", "exp")[1][0] == f"me/basis-lorasb@{refs()['me/basis-lorasb']['exp']}"
    assert {name: found["main"] for name, found in refs().items()} == {n: found["main"] for n, found in on_main.items()}
    (basis / "README.md").write_text("Ours.\n")
    assert [changed for _, changed in pushed("--revision", "exp")] == [True, False]
    make_adapter(project / "adapters" / "b", basis, seed=5)
    alone = any_hub.lorasb(*words, "b", "--revision", "exp")["pushed"][0]  # its basis is not on main
    assert alone["basis"] == f"me/basis-lorasb@{refs()['me/basis-lorasb']['exp']}"

    any_hub.lorasb(*words, basis)
    assert [changed for _, changed in pushed("--create-pr")] == [False, True, True]
    assert set(refs()["me/a-lorasb"]) == {"main", "exp", "refs/pr/1"}
