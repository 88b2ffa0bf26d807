"""Push and read back over the loopback Hub: real client, real processes, both transports.

HF_ENDPOINT and HF_HUB_DISABLE_XET are read when huggingface_hub is imported, so every step is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from integration.hub_server import TOKEN, Entry, HubServer
from lorasb_export import environment
from lorasb_export.artifact import Adapter, Basis
from lorasb_export.base import BaseRef
from lorasb_export.format import ModuleBasis
from lorasb_export.storage import sha256_file, write_json

PUSH = """
import json, sys
from lorasb_export import push
from lorasb_export.errors import LoraSBError
try:
    print(json.dumps(push(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
except LoraSBError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""
DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download as get; print(get(*sys.argv[1:2], revision=sys.argv[2]))"
)
RANK, MODULES = 4, {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.up_proj": (32, 16)}


class Hub(HubServer):
    """The loopback Hub and the clients that talk to it, each with an empty cache."""

    def __init__(self, root: Path, **changes: str) -> None:
        super().__init__(root / "server")
        self.root, self.changes, self.runs = root, changes, 0

    def run(self, code: str, *args: object, **changes: str) -> str:
        self.runs += 1
        changed = self.environment(self.root / f"home-{self.runs}", **{**self.changes, **changes})
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            env={**environment.child_environment(), **changed},
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.root,
        )
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    def push(self, folder: Path, repo: str, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.run(PUSH, folder, repo, json.dumps(options), **(env or {})))
        return result

    def files(self, repo: str, ref: str = "main") -> dict[str, Entry]:
        found = self.repos[repo]
        return {path: e for path, e in found.commits[found.refs[ref]].items() if path != ".gitattributes"}

    def content(self, repo: str, path: str, ref: str = "main") -> bytes:
        return self.store.path(self.files(repo, ref)[path].sha256).read_bytes()


@pytest.fixture(params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    yield from _serve(tmp_path, {"HF_HUB_DISABLE_XET": "1"} if request.param == "lfs" else {})


@pytest.fixture
def any_hub(tmp_path: Path) -> Iterator[Hub]:
    """For what does not depend on the transport."""
    yield from _serve(tmp_path, {})


def _serve(root: Path, changes: dict[str, str]) -> Iterator[Hub]:
    with Hub(root, **changes) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        assert server.violations == []
        other = "/xet-" if changes else "/lfs/"
        assert not [line for line in server.requests if other in line], "the other transport was used"


@pytest.fixture
def basis(tmp_path: Path) -> Path:
    return make_basis(tmp_path / "basis")


@pytest.fixture
def adapter(tmp_path: Path, basis: Path) -> Path:
    return make_adapter(tmp_path / "adapters" / "a", basis)


def make_basis(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleBasis(
            torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0].contiguous(),
            torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous(),
            torch.ones(RANK),
        )
        for name, (rows, columns) in MODULES.items()
    }
    Basis(BaseRef("owner/base", None, "f" * 64), RANK, modules, {"samples": 1}).save(folder)
    return folder


def make_adapter(folder: Path, basis: Path, seed: int = 1) -> Path:
    generator, found = torch.Generator().manual_seed(seed), Basis.load(basis)
    R = {name: torch.randn(RANK, RANK, generator=generator) for name in MODULES}
    Adapter(found.base, found.sha256, found.source, R, training={"steps": 3}).save(folder)
    return folder


def make_merged(folder: Path, shard: str = "5GB") -> Path:
    environment.hide_broken_packages()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder, max_shard_size=shard)
    base = {"name_or_path": "owner/base", "revision": None, "fingerprint": "f" * 64}
    write_json(folder / "lorasb.json", {"kind": "merged", "base": base, "adapter": {"name": "a", "sha256": "0" * 64}})
    return folder


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
    result = hub.push(adapter, "me/a")
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
from lorasb_export.environment import hide_broken_packages
hide_broken_packages()
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
found, expected = AutoModelForCausalLM.from_pretrained("me/merged").state_dict(), load_file(sys.argv[1])
assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
print("equal")
"""
    assert hub.run(load, merged / "model.safetensors") == "equal"


CLI = "import runpy, sys; sys.argv[0] = 'lorasb'; runpy.run_module('lorasb_cli', run_name='__main__')"


def test_the_verb_as_typed_in_a_project(any_hub: Hub, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text('[tasks.a]\ndata = "data/a"\n[hub]\nrepo = "me/a-lorasb"\n')
    result = json.loads(any_hub.run(CLI, "push", "--json"))
    assert (result["kind"], result["private"], result["changed"]) == ("adapter", True, True)
    assert any_hub.run(CLI, "push").startswith("Already there: ")
    assert any_hub.repos["me/a-lorasb"].private
    moved = json.loads(any_hub.run(CLI, "push", "basis", "--repo", "me/basis", "--public", "--json"))
    assert (moved["kind"], moved["private"]) == ("basis", False)


def test_pushing_again_commits_nothing(hub: Hub, adapter: Path) -> None:
    first, second = hub.push(adapter, "me/a"), hub.push(adapter, "me/a")
    assert second["changed"] is False
    assert second["commit"] == first["commit"]
    assert len([line for line in hub.requests if "/commit/" in line]) == 1


def test_pull_request_and_branch_leave_main_alone(hub: Hub, basis: Path) -> None:
    head = hub.push(basis, "me/basis")["commit"]
    make_basis(basis.parent / "other", seed=7)
    pull = hub.push(basis.parent / "other", "me/basis", create_pr=True)
    assert pull["url"] == f"{hub.url}/me/basis/discussions/1"
    branch = hub.push(basis.parent / "other", "me/basis", revision="try/this")
    assert branch["url"] == f"{hub.url}/me/basis/tree/try/this"
    refs = hub.repos["me/basis"].refs
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
    any_hub.push(adapter, "me/a")
    result = any_hub.push(adapter, "me/a", basis_repo="me/basis")
    assert result["basis"] == f"me/basis@{commit}"
    assert not [path for path in any_hub.files("me/a") if path.startswith("basis")]  # the embedded one is gone
    load = "from lorasb_export import Adapter; print(Adapter.load('me/a').load_basis().source)"
    assert any_hub.run(load) == f"me/basis@{commit}"

    make_basis(basis.parent / "other", seed=7)
    any_hub.push(basis.parent / "other", "me/other")
    refused = any_hub.push(adapter, "me/a", basis_repo="me/other")
    assert refused["error"] == "ArtifactError"
    assert "the basis there is" in refused["text"]


def test_stale_weights_go_in_the_same_commit(any_hub: Hub, tmp_path: Path) -> None:
    any_hub.push(make_merged(tmp_path / "sharded", shard="8KB"), "me/merged")
    assert "model.safetensors.index.json" in any_hub.files("me/merged")
    any_hub.push(make_merged(tmp_path / "whole"), "me/merged")
    weights = [path for path in any_hub.files("me/merged") if "safetensors" in path]
    assert weights == ["model.safetensors"]
    assert len(any_hub.repos["me/merged"].commits) == 3


def test_another_kind_is_not_overwritten(any_hub: Hub, basis: Path, adapter: Path) -> None:
    any_hub.push(basis, "me/basis")
    refused = any_hub.push(adapter, "me/basis")
    assert refused["error"] == "OutputError"
    assert refused["text"].startswith("the repository holds another kind (basis) (me/basis).")


def test_only_what_belongs_there_is_sent(any_hub: Hub, adapter: Path) -> None:
    (adapter / "checkpoint-3").mkdir()
    for name in ("training_args.bin", ".env", "checkpoint-3/adapter.safetensors"):
        (adapter / name).write_bytes(b"secret")
    any_hub.push(adapter, "me/a")
    assert sorted(any_hub.files("me/a")) == [
        *("README.md", "adapter.safetensors", "adapter_config.json", "basis.safetensors", "basis_config.json")
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


@pytest.mark.parametrize(
    ("repo", "env", "text"),
    [
        ("me/a", {"HF_TOKEN": ""}, "the Hub asks for a valid token (me/a). Run `hf auth login`, or set HF_TOKEN"),
        (
            "me/a",
            {"HF_TOKEN": "hf_wrong"},
            "the Hub asks for a valid token (me/a). Run `hf auth login`, or set HF_TOKEN",
        ),
        ("you/a", {}, "this token may not do that (you/a). Use a token with write access to that repository"),
        (
            "me/a",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "the Hub cannot be reached (me/a). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ),
        (
            "me/a",
            {"HF_HUB_OFFLINE": "1"},
            "the Hub cannot be reached (me/a). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ),
    ],
)
def test_what_the_user_is_told(any_hub: Hub, basis: Path, repo: str, env: dict[str, str], text: str) -> None:
    assert any_hub.push(basis, repo, env) == {"error": "ServerError", "text": text}
    assert any_hub.repos == {}


def test_a_repository_that_changes_meanwhile(any_hub: Hub, basis: Path) -> None:
    any_hub.push(basis, "me/basis")
    repo = any_hub.repos["me/basis"]

    class Racing(list[str]):
        """Somebody else's commit lands after this push has looked, before it commits."""

        def append(self, line: str) -> None:
            super().append(line)
            if "/preupload/" in line:
                theirs.append(repo.commit("main", dict(repo.commits[repo.refs["main"]]), "somebody else's"))

    theirs: list[str] = []
    any_hub.requests = Racing()
    refused = any_hub.push(make_basis(basis.parent / "other", seed=7), "me/basis")
    assert refused == {
        "error": "ServerError",
        "text": "the repository changed meanwhile; nothing was committed (me/basis). Push again: no file is sent twice",
    }
    assert [repo.refs["main"]] == theirs


@pytest.mark.parametrize("source", ["me/none", "me/basis@none"])
def test_loading_what_is_not_there(any_hub: Hub, basis: Path, source: str) -> None:
    any_hub.push(basis, "me/basis")
    load = "import sys; from lorasb_export import Basis\ntry: Basis.load(sys.argv[1])\n"
    load += "except ValueError as error: print(type(error).__name__, error)"
    assert any_hub.run(load, source) == (
        "ArtifactError no such folder, and the Hub has no such repository or revision, or hides it "
        f"({source}). Check the name; if it is private, log in"
    )


def test_dry_run_asks_the_hub_nothing(any_hub: Hub, adapter: Path) -> None:
    assert any_hub.push(adapter, "me/a", dry_run=True)["url"] == f"{any_hub.url}/me/a"
    assert any_hub.requests == []


def test_the_server_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with Hub(tmp_path) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        code = "import sys, httpx2; print(httpx2.post(sys.argv[1]).status_code)"
        assert server.run(code, f"{server.url}/api/anything") == "501"
        put = "import sys, httpx2; print(httpx2.put(sys.argv[1], content=b'x').status_code)"
        assert server.run(put, f"{server.url}/lfs/{'0' * 64}?size=1") == "400"
        server.shutdown()
        assert len(server.violations) == 2
        assert os.listdir(server.store.blobs) == []
