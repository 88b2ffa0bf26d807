"""Push and read back over the loopback Hub: the real client, in real processes, over both transports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.hub_client import CLI, Hub, for_one_test, make_adapter, make_basis, make_merged
from integration.hub_server import Fault
from lorasb_export.files.storage import sha256_file

DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download as get; print(get(*sys.argv[1:2], revision=sys.argv[2]))"
)


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


def test_a_merged_model_is_loadable_with_transformers(any_hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged")
    any_hub.push(merged, "me/merged")
    load = """
import sys, torch
import lorasb_export
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
found, expected = AutoModelForCausalLM.from_pretrained("me/merged").state_dict(), load_file(sys.argv[1])
assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
print("equal")
"""
    assert any_hub.run(load, merged / "model.safetensors") == "equal"


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_a_merged_model_comes_back_byte_for_byte(hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged")
    folder = Path(hub.run(DOWNLOAD, "me/merged", hub.push(merged, "me/merged")["commit"]))
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (merged / name).read_bytes()


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

    again = any_hub.push(adapter, "me/a", basis_repo="me/basis", public=True)  # me/a is there, and stays private
    assert (again["private"], again["basis"]) == (True, f"me/basis@{commit}")


def test_a_basis_is_named_at_a_commit_that_is_there(any_hub: Hub, adapter: Path, basis: Path) -> None:
    """The one named before is in the cache still, though its history was squashed."""
    old = any_hub.push(basis, "me/basis")["commit"]
    any_hub.push(adapter, "me/a", basis_repo="me/basis")
    repo = any_hub.repos["me/basis"]
    new = repo.commit("main", dict(repo.commits[old]), "squashed")
    del repo.commits[old]
    for words in ({"dry_run": True, "basis_to_come": True}, {"dry_run": True}, {}):
        named = "me/basis" if "basis_to_come" in words else f"me/basis@{new}"
        assert any_hub.push(adapter, "me/a", basis_repo="me/basis", **words)["basis"] == named
    del any_hub.repos["me/basis"]
    refused = any_hub.push(adapter, "me/a", basis_repo="me/basis")
    assert refused["text"].startswith("the adapter's basis: the Hub has no such repository")


def test_a_basis_just_pushed_is_found_though_the_hub_fails_for_a_moment(
    any_hub: Hub, adapter: Path, basis: Path
) -> None:
    """The cache would say what main was before."""
    any_hub.push(basis, "me/basis")
    any_hub.push(adapter, "me/a", basis_repo="me/basis")
    other = make_basis(basis.with_name("other"), any_hub.base, seed=7)
    commit = any_hub.push(other, "me/basis")["commit"]
    any_hub.faults.append(Fault("GET /api/models/me/basis", status=503))
    any_hub.faults.append(Fault("HEAD /me/basis/resolve/main/", status=503, times=99))
    of_other = make_adapter(adapter.with_name("b"), other)
    assert any_hub.push(of_other, "me/b", basis_repo="me/basis")["basis"] == f"me/basis@{commit}"


def test_what_a_gitignore_there_names_is_sent_too(any_hub: Hub, basis: Path) -> None:
    any_hub.push(basis, "me/basis")
    make_basis(basis.with_name("other"), any_hub.base, seed=7)
    repo = any_hub.repos["me/basis"]
    ignored = {".gitignore": any_hub.store.regular(b"*.safetensors\n*.json\n")}
    repo.commit("main", {**repo.commits[repo.refs["main"]], **ignored}, "web")
    any_hub.push(basis.with_name("other"), "me/basis")
    for name in ("basis.safetensors", "basis_config.json"):
        assert any_hub.content("me/basis", name) == (basis.with_name("other") / name).read_bytes()


def test_what_main_has_is_sent_to_a_branch_that_lacks_it(any_hub: Hub, basis: Path) -> None:
    make_basis(basis.with_name("other"), any_hub.base, seed=7)
    any_hub.push(basis, "me/basis")
    any_hub.push(basis.with_name("other"), "me/basis", revision="exp")
    any_hub.push(basis, "me/basis", revision="exp")
    assert any_hub.files("me/basis", "exp") == any_hub.files("me/basis")


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
from lorasb_export.publishing import push as hub
from lorasb_export import push
from lorasb_export.errors import ArtifactError
adapter, folder, other, name = sys.argv[1:]
function = getattr(hub, name)
def replace_before(*args):
    shutil.rmtree(folder)
    Path(other).rename(folder)
    return function(*args)
setattr(hub, name, replace_before)
try:
    push(adapter, "me/a", with_basis=True)
except ArtifactError as error:
    print(error)
finally:
    setattr(hub, name, function)  # the process goes on
"""
    said = any_hub.run(replace, adapter, replaced, other, "Repository" if what == "adapter" else "folder_card")
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
    listing = "from lorasb_export.files.kind import MARK_FILES\nfrom lorasb_export.hub.fetch import resolve_folder\n"
    listing += "print(*sorted(path.name for path in resolve_folder('me/basis', MARK_FILES)[0].iterdir()))"
    assert any_hub.run(listing) == "basis_config.json"
    assert not [line for line in any_hub.requests if "evil" in line]


@pytest.mark.parametrize("source", ["me/none", "me/basis@none"])
def test_loading_what_is_not_there(any_hub: Hub, basis: Path, source: str) -> None:
    any_hub.push(basis, "me/basis")
    load = "import sys; from lorasb_export import Basis\ntry: Basis.load(sys.argv[1])\n"
    load += "except ValueError as error: print(type(error).__name__, error)"
    assert any_hub.run(load, source) == (
        "ArtifactError no such folder, and the Hub has no such repository or revision, or hides it "
        f"({source}). Check the name; if it is private, log in"
    )


def test_one_more_task_costs_its_r(hub: Hub, adapter: Path, basis: Path) -> None:
    """All bytes of all requests; `bench push` counts the same at the size of a real task."""
    hub.push(basis, "me/basis")
    before = hub.bytes_received()
    hub.push(adapter, "me/a", basis_repo="me/basis")
    r_bytes = (adapter / "adapter.safetensors").stat().st_size
    assert hub.bytes_received() - before <= 1.1 * r_bytes + 100_000
