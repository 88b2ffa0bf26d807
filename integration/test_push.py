"""Push and read back over the loopback Hub: the real client, in real processes, over both transports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import httpx2
import pytest

from integration.hub_client import CLI, Hub, for_one_test, make_adapter, make_basis, make_merged, serve
from integration.hub_server import HubServer
from lorasb_export.storage import sha256_file

DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download as get; print(get(*sys.argv[1:2], revision=sys.argv[2]))"
)


@pytest.fixture(scope="module")
def lfs(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Hub]:
    yield from serve(tmp_path_factory.mktemp("lfs"), llama, HF_HUB_DISABLE_XET="1")


@pytest.fixture(params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    found: Hub = request.getfixturevalue(request.param)
    yield from for_one_test(found, "/lfs/" if request.param == "xet" else "/xet-")


def test_a_basis_comes_back_byte_for_byte(hub: Hub, basis: Path) -> None:
    result = hub.push(basis, "me/basis")
    assert (result["repo"], result["kind"], result["changed"]) == ("me/basis", "basis", True)
    assert result["url"] == f"{hub.url}/me/basis"
    assert result["commit"] == hub.repos["me/basis"].refs["main"]
    folder = Path(hub.run(DOWNLOAD, "me/basis", result["commit"]))
    for path in basis.iterdir():
        if path.name != "README.md":  # the uploaded card names the repository
            assert (folder / path.name).read_bytes() == path.read_bytes()
    assert 'Basis.load("me/basis")' in (folder / "README.md").read_text()
    load = "import sys; from lorasb_export import Basis; b = Basis.load(sys.argv[1]); print(b.sha256, b.source)"
    assert hub.run(load, "me/basis") == f"{sha256_file(basis / 'basis.safetensors')} me/basis@{result['commit']}"


def test_an_adapter_is_loadable_by_its_name_alone(hub: Hub, adapter: Path, basis: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    result = hub.push(adapter, "me/a", with_basis=True)
    assert result["basis"] == "embedded"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    basis.rename(tmp_path / "elsewhere")
    load = """
import sys, torch
from lorasb_export import Adapter
from safetensors.torch import load_file
adapter, expected = Adapter.load("me/a"), load_file(sys.argv[1])
assert all(torch.equal(R, expected[f"{name}.R"]) for name, R in adapter.R.items()) and adapter.R
print(adapter.load_basis().sha256)
"""
    digest = hub.run(load, adapter / "adapter.safetensors")
    assert digest == sha256_file(tmp_path / "elsewhere" / "basis.safetensors")


def test_a_merged_model_is_loadable_with_transformers(hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged")
    hub.push(merged, "me/merged")
    load = """
import sys, torch
import lorasb_export
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
found, expected = AutoModelForCausalLM.from_pretrained("me/merged").state_dict(), load_file(sys.argv[1])
assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
print("equal")
"""
    assert hub.run(load, merged / "model.safetensors") == "equal"


def test_pushing_again_sends_nothing(hub: Hub, adapter: Path) -> None:
    first = hub.push(adapter, "me/a", with_basis=True)
    hub.requests.clear()
    second = hub.push(adapter, "me/a", with_basis=True)
    assert (second["changed"], second["commit"], second["sent"]) == (False, first["commit"], 0)
    assert {file["change"] for file in second["files"]} == {"same"}
    assert [line for line in hub.requests if not line.startswith(("GET ", "HEAD "))] == []


def test_pull_request_and_branch_leave_main_alone(hub: Hub, basis: Path) -> None:
    head = hub.push(basis, "me/basis")["commit"]
    make_basis(basis.parent / "other", hub.base, seed=7)
    pull = hub.push(basis.parent / "other", "me/basis", create_pr=True, message="Try another one")
    assert pull["url"] == f"{hub.url}/me/basis/discussions/1"
    branch = hub.push(basis.parent / "other", "me/basis", revision="try/this")
    assert branch["url"] == f"{hub.url}/me/basis/tree/try/this"
    refs = hub.repos["me/basis"].refs
    assert hub.repos["me/basis"].titles[pull["commit"]] == "Try another one"
    assert refs == {"main": head, "refs/pr/1": pull["commit"], "try/this": branch["commit"]}
    load = "import sys; from lorasb_export import Basis; print(Basis.load(sys.argv[1]).sha256)"
    assert hub.run(load, "me/basis@try/this") == sha256_file(basis.parent / "other" / "basis.safetensors")


def test_private_unless_public(any_hub: Hub, basis: Path) -> None:
    assert any_hub.push(basis, "me/hidden")["private"] is True
    assert any_hub.push(basis, "me/shown", public=True)["private"] is False
    assert (any_hub.repos["me/hidden"].private, any_hub.repos["me/shown"].private) == (True, False)
    refused = any_hub.push(basis, "me/shown")
    assert refused == {
        "error": "OutputError",
        "text": "the repository is public (me/shown). Pass --public, or choose another one",
    }


def test_a_basis_of_its_own_repository(any_hub: Hub, adapter: Path, basis: Path) -> None:
    commit = any_hub.push(basis, "me/basis")["commit"]
    any_hub.push(adapter, "me/a", with_basis=True)
    result = any_hub.push(adapter, "me/a", basis_repo="me/basis")
    assert result["basis"] == f"me/basis@{commit}"
    assert not [path for path in any_hub.files("me/a") if path.startswith("basis")]  # the embedded one is gone
    load = "from lorasb_export import Adapter; print(Adapter.load('me/a').load_basis().source)"
    assert any_hub.run(load) == f"me/basis@{commit}"

    make_basis(basis.parent / "other", any_hub.base, seed=7)
    any_hub.push(basis.parent / "other", "me/other")
    refused = any_hub.push(adapter, "me/a", basis_repo="me/other")
    assert refused["error"] == "ArtifactError"
    assert "the basis there is" in refused["text"]
    refused = any_hub.push(adapter, "me/open", basis_repo="me/basis", public=True)
    assert refused["text"].startswith("the adapter would be public, its basis is private (me/basis).")
    assert "me/open" not in any_hub.repos


def test_stale_weights_go_in_the_same_commit(any_hub: Hub, tmp_path: Path) -> None:
    any_hub.push(make_merged(tmp_path / "sharded", shard="8KB"), "me/merged")
    assert "model.safetensors.index.json" in any_hub.files("me/merged")
    any_hub.push(make_merged(tmp_path / "whole"), "me/merged")
    weights = [path for path in any_hub.files("me/merged") if "safetensors" in path]
    assert weights == ["model.safetensors"]
    assert len(any_hub.repos["me/merged"].commits) == 3


def test_what_an_earlier_push_left_goes_and_what_people_added_stays(any_hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged")
    (merged / "additional_chat_templates").mkdir()
    templates = [merged / "chat_template.jinja", merged / "additional_chat_templates" / "rag.jinja"]
    for template in templates:
        template.write_text("old")
    any_hub.push(merged, "me/merged")
    added = {"recipe.json": any_hub.store.regular(b"{}")}
    any_hub.repos["me/merged"].commit("main", {**any_hub.files("me/merged"), **added}, "web")
    for template in templates:
        template.unlink()
    assert any_hub.push(merged, "me/merged")["deleted"] == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
    ]
    left = [path for path in any_hub.files("me/merged") if path.endswith((".jinja", "recipe.json"))]
    assert left == ["recipe.json"]
    damaged = {"SHA256SUMS": any_hub.store.regular(b"\xff")}
    any_hub.repos["me/merged"].commit("main", {**any_hub.files("me/merged"), **damaged}, "web")
    assert any_hub.push(merged, "me/merged")["deleted"] == []
    assert "recipe.json" in any_hub.files("me/merged")


@pytest.mark.parametrize("what", ["adapter", "basis"])
def test_a_folder_that_is_replaced_meanwhile_is_not_published(
    any_hub: Hub, adapter: Path, basis: Path, what: str
) -> None:
    """Just after its config was read; what is fit again has another R under the same name."""
    if what == "adapter":
        replaced, other = adapter, make_adapter(adapter.with_name("b"), basis, seed=2)
    else:
        replaced, other = basis, Path(shutil.copytree(basis, basis.with_name("other")))
    replace = """
import shutil, sys
from pathlib import Path
from lorasb_export.publishing import hub
from lorasb_export import push
adapter, folder, other, name = sys.argv[1:]
function = getattr(hub, name)
def replace_before(*args):
    shutil.rmtree(folder)
    Path(other).rename(folder)
    return function(*args)
setattr(hub, name, replace_before)
try:
    push(adapter, "me/a", with_basis=True)
except hub.ArtifactError as error:
    print(error)
finally:
    setattr(hub, name, function)  # the process goes on
"""
    said = any_hub.run(replace, adapter, replaced, other, "_look" if what == "adapter" else "_readme")
    assert said.startswith(f"the folder was replaced while it was pushed ({replaced})")
    assert said.endswith("Push again: nothing was published")
    assert not any(path.endswith(".safetensors") for path in any_hub.files("me/a"))
    assert any_hub.push(adapter, "me/a", with_basis=True)["changed"]


def test_another_kind_is_not_overwritten(any_hub: Hub, basis: Path, adapter: Path) -> None:
    any_hub.push(basis, "me/basis")
    refused = any_hub.push(adapter, "me/basis", with_basis=True)
    assert refused["error"] == "OutputError"
    assert refused["text"].startswith("the repository holds another kind (basis) (me/basis).")


@pytest.mark.parametrize("config", [b'{"peft_type": "LORA"}', b'{"basis": "x"}', b"no JSON"])
def test_what_others_left_there_is_no_basis_of_ours(
    any_hub: Hub, basis: Path, adapter: Path, tmp_path: Path, config: bytes
) -> None:
    """With weights beside it, it is refused as PEFT's; without, it is replaced."""
    any_hub.push(basis, "me/basis")
    there = tmp_path / "there"
    there.mkdir()
    (there / "adapter_config.json").write_bytes(config)
    any_hub.put("me/config", there)
    any_hub.repos["me/config"].private = True
    assert any_hub.push(adapter, "me/config", basis_repo="me/basis")["changed"] is True
    shutil.copy(basis / "basis.safetensors", there / "adapter_model.safetensors")
    any_hub.put("me/lora", there)
    refused = any_hub.push(adapter, "me/lora", basis_repo="me/basis", public=True)
    assert refused["text"].startswith("the repository holds another kind (peft) (me/lora).")


def test_only_what_belongs_there_is_sent(any_hub: Hub, adapter: Path) -> None:
    (adapter / "checkpoint-3").mkdir()
    for name in ("training_args.bin", ".env", "checkpoint-3/adapter.safetensors"):
        (adapter / name).write_bytes(b"secret")
    said = any_hub.start(CLI, "push", adapter, "--repo", "me/a", "--with-basis")[1]
    assert "  skipped  training_args.bin" in said.splitlines()
    assert sorted(any_hub.files("me/a")) == [
        *("README.md", "SHA256SUMS", "adapter.safetensors", "adapter_config.json", "basis.safetensors"),
        "basis_config.json",
    ]
    config = json.loads(any_hub.content("me/a", "adapter_config.json"))
    assert config["basis"]["source"] == "embedded"


def test_a_pickle_on_the_hub_is_not_fetched(any_hub: Hub, basis: Path) -> None:
    any_hub.push(basis, "me/basis")
    files = {**any_hub.files("me/basis"), "evil.bin": any_hub.files("me/basis")["README.md"]}
    any_hub.repos["me/basis"].commit("main", files, "by hand")
    listing = "from lorasb_export.fetch import MARK_FILES, resolve_folder\n"
    listing += "print(*sorted(path.name for path in resolve_folder('me/basis', MARK_FILES)[0].iterdir()))"
    assert any_hub.run(listing) == "basis_config.json"
    assert not [line for line in any_hub.requests if "evil" in line]


def test_a_dry_run_is_refused_as_the_push_would_be(any_hub: Hub, basis: Path, adapter: Path) -> None:
    wrong = {"HF_TOKEN": "hf_wrong"}
    refused = any_hub.push(basis, "me/basis", wrong, dry_run=True)
    assert refused == any_hub.push(basis, "me/basis", wrong)
    assert "asks for a valid token" in refused["text"]
    assert any_hub.push(basis, "me/basis", {"HF_ENDPOINT": "http://127.0.0.1:9"}, dry_run=True)["reached"] is False

    assert any_hub.push(adapter, "me/a", basis_repo="me/new", dry_run=True)["basis"] == "me/new"  # to be pushed yet
    any_hub.push(basis, "me/new")
    refused = any_hub.push(adapter, "me/a", basis_repo="me/new@none", dry_run=True)
    assert refused == any_hub.push(adapter, "me/a", basis_repo="me/new@none")
    assert "the adapter's basis: the Hub has no such repository or revision" in refused["text"]


@pytest.mark.parametrize("source", ["me/none", "me/basis@none"])
def test_loading_what_is_not_there(any_hub: Hub, basis: Path, source: str) -> None:
    any_hub.push(basis, "me/basis")
    load = "import sys; from lorasb_export import Basis\ntry: Basis.load(sys.argv[1])\n"
    load += "except ValueError as error: print(type(error).__name__, error)"
    assert any_hub.run(load, source) == (
        "ArtifactError no such folder, and the Hub has no such repository or revision, or hides it "
        f"({source}). Check the name; if it is private, log in"
    )


def test_a_dry_run_reads_and_writes_nothing(any_hub: Hub, basis: Path) -> None:
    plan = any_hub.push(basis, "me/basis", dry_run=True)
    assert (plan["parent"], plan["reached"], plan["private"]) == (None, True, True)
    assert {file["change"] for file in plan["files"]} == {"added"}
    assert "me/basis" not in any_hub.repos

    commit = any_hub.push(basis, "me/basis")["commit"]
    (basis / "README.md").write_text("Ours.\n")
    any_hub.requests.clear()
    plan = any_hub.push(basis, "me/basis", dry_run=True, message="Say who made it")
    assert (plan["parent"], plan["message"]) == (commit, "Say who made it")
    changes = {file["path"]: file["change"] for file in plan["files"]}
    assert changes.pop("README.md") == "changed"
    assert changes == dict.fromkeys(["SHA256SUMS", "basis.safetensors", "basis_config.json"], "same")
    assert "+Ours." in plan["card_diff"].splitlines()
    assert plan["card_diff"].count("\n+") < 6
    assert [line for line in any_hub.requests if not line.startswith(("GET ", "HEAD "))] == []
    shown = any_hub.start(CLI, "push", basis, "--repo", "me/basis", "--dry-run")[1]
    assert "changed  README.md" in shown
    assert "same     basis.safetensors" in shown
    assert "+Ours." in shown


def test_the_server_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with HubServer(tmp_path) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert httpx2.post(f"{server.url}/api/anything", trust_env=False).status_code == 501
        assert httpx2.put(f"{server.url}/lfs/{'0' * 64}?size=1", content=b"x", trust_env=False).status_code == 400
        server.shutdown()
        assert len(server.violations) == 2
        assert os.listdir(server.store.blobs) == []


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

    assert changed() == dict.fromkeys(everything, False)
    # A new card of the basis is a new commit there; the adapters still name the one that holds their basis.
    (basis / "README.md").write_text("Ours.\n")
    shutil.rmtree(project / "adapters" / "b")
    make_adapter(project / "adapters" / "b", basis, seed=6)
    assert changed() == {"me/basis-lorasb": True, "me/a-lorasb": False, "me/b-lorasb": True}
    alone = any_hub.lorasb(*words, project / "adapters" / "a")
    assert (alone["repo"], alone["changed"], alone["kind"]) == ("me/a-lorasb", False, "adapter")
    said = any_hub.lorasb_fails(*words, "--repo", "me/one")
    assert said.startswith("Error: a project needs a repository for its basis and for each adapter (me/one).")


def test_a_project_says_whether_its_repositories_are_public(any_hub: Hub, adapter: Path, basis: Path) -> None:
    """As `--public` does, of a whole project and of one folder of it."""
    project = basis.parent
    (project / "lorasb.toml").write_text('[hub]\nrepo = "me/{name}-lorasb"\npublic = true\n')
    words = ["push", "--config", project / "lorasb.toml"]
    assert any_hub.lorasb(*words, basis)["private"] is False
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
    alone = any_hub.lorasb(*words, "b", "--revision", "exp")  # its basis is not on main
    assert alone["basis"] == f"me/basis-lorasb@{refs()['me/basis-lorasb']['exp']}"

    any_hub.lorasb(*words, basis)
    assert [changed for _, changed in pushed("--create-pr")] == [False, True, True]
    assert set(refs()["me/a-lorasb"]) == {"main", "exp", "refs/pr/1"}


def test_one_more_task_costs_its_r(hub: Hub, adapter: Path, basis: Path) -> None:
    """All bytes of all requests; `bench push` counts the same at the size of a real task."""
    hub.push(basis, "me/basis")
    before = hub.bytes_received()
    hub.push(adapter, "me/a", basis_repo="me/basis")
    r_bytes = (adapter / "adapter.safetensors").stat().st_size
    assert hub.bytes_received() - before <= 1.1 * r_bytes + 100_000
