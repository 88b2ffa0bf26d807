"""The loopback Hub and the processes that talk to it, with folders to push.

HF_ENDPOINT and HF_HUB_DISABLE_XET are read when huggingface_hub is imported. So there is one long-lived client process
for each environment that a step needs; HF_TOKEN is read at each call, and comes with what is asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from integration.hub_server import TOKEN, Entry, HubServer
from integration.hub_server.store import Repo
from lorasb_export import environment
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel, BaseRef
from lorasb_export.basis import Basis
from lorasb_export.files.storage import write_json
from lorasb_export.layers.factors import ModuleBasis

RANK, MODULES = 4, ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")  # of tests.tiny
BASE = "owner/base"
Changes = tuple[tuple[str, str], ...]  # of a client's environment

_PUSH = """
import json, sys
from lorasb_export import push
from lorasb_export.errors import LoraSBError
try:
    print(json.dumps(push(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
except LoraSBError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""
CLI = "import runpy, sys; sys.argv[0] = 'lorasb'; runpy.run_module('lorasb_cli', run_name='__main__')"
# A wait before another try is cut short: how long it is, tests/test_hub_errors.py looks at.
CLIENT = """
import contextlib, io, json, os, sys, time, traceback
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))
for line in sys.stdin:
    asked, said, code = json.loads(line), io.StringIO(), 0
    sys.argv = ["-c", *asked["words"]]
    os.environ["HF_TOKEN"] = asked["token"]
    try:
        with contextlib.redirect_stdout(said):
            exec(asked["code"], {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    print(json.dumps({"code": code, "said": said.getvalue()}), flush=True)
"""


class Hub(HubServer):
    """A server of its own, and its clients. `home` is what they call HF_HOME; `owner/base` is there from the start."""

    def __init__(self, root: Path, base: Path, **changes: str) -> None:
        super().__init__(root / "server")
        self.root, self.home, self.base, self.changes = root, root / "home", base, changes
        self._errors = (root / "client.log").open("w+b")
        self._clients: dict[Changes, subprocess.Popen[str]] = {}
        self.clear()

    def clear(self) -> None:
        """As at the start, but for what clients have cached and uploaded. Those of other environments end."""
        self._stop_clients(key for key in self._clients if key)
        for container in (self.repos, self.moved, self.requests, self.violations, self.faults):
            container.clear()
        self.put(BASE, self.base)
        card = self.store.regular(b"---\nlicense: apache-2.0\n---\nA base.\n")
        self.repos[BASE].commit("main", {**self.files(BASE), "README.md": card}, "its card")

    def put(self, repo: str, folder: Path) -> str:
        """A public repository with the files of a folder, as somebody else made it; the commit."""
        found = self.repos.setdefault(repo, Repo(private=False))
        return found.commit("main", self.store.folder(folder), "by hand")

    def run(self, code: str, *words: object, **changes: str) -> str:
        """What `code` prints last, run by a client; it must not fail."""
        exit_code, said, errors = self.start(code, *words, **changes)
        assert exit_code == 0, errors
        return said.strip().splitlines()[-1]

    def start(self, code: str, *words: object, **changes: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `code`."""
        token = changes.pop("HF_TOKEN", TOKEN)
        found = self._ask(self._client(changes), token=token, code=code, words=[str(word) for word in words])
        assert TOKEN not in found[1] + found[2]
        return found

    def begin(self, *words: object) -> subprocess.Popen[str]:
        """A `lorasb` of its own that is running: to be killed."""
        command = [sys.executable, "-c", CLI, *map(str, words)]
        return subprocess.Popen(command, env=self._variables({}), stderr=subprocess.PIPE, text=True, cwd=self.root)

    def _client(self, changes: dict[str, str]) -> subprocess.Popen[str]:
        key = tuple(sorted(changes.items()))
        if key not in self._clients:
            self._clients[key] = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                env=self._variables(changes),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=self.root,
            )
        return self._clients[key]

    def _ask(self, client: subprocess.Popen[str], **asked: str | list[str]) -> tuple[int, str, str]:
        assert client.stdin is not None
        assert client.stdout is not None
        before = self._errors.seek(0, 2)
        try:
            client.stdin.write(json.dumps(asked) + "\n")
            client.stdin.flush()
            answer = json.loads(client.stdout.readline())
        except BaseException:  # its answer would be taken for that of the next
            self._stop_clients(self._clients)
            raise
        self._errors.seek(before)
        return answer["code"], answer["said"], self._errors.read().decode()

    def _variables(self, changes: dict[str, str]) -> dict[str, str]:
        return {**environment.child_environment(), **self.environment(self.home, **{**self.changes, **changes})}

    def stop(self) -> None:
        self._stop_clients(self._clients)
        self._errors.close()

    def _stop_clients(self, keys: Iterable[Changes]) -> None:
        for key in list(keys):
            client = self._clients.pop(key)
            client.kill()
            client.wait()

    def push(self, folder: Path, repo: str, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        """What `push` returns, or {"error": its type, "text": …}."""
        result: dict[str, Any] = json.loads(self.run(_PUSH, folder, repo, json.dumps(options), **(env or {})))
        return result

    def lorasb(self, *words: object, **changes: str) -> Any:
        """The object that the command prints with --json."""
        return json.loads(self.run(CLI, *words, "--json", **changes))

    def lorasb_fails(self, *words: object, **changes: str) -> str:
        """What the command says on stderr when it ends with exit code 1."""
        exit_code, _, errors = self.start(CLI, *words, **changes)
        assert exit_code == 1
        return errors[errors.index("Error: ") :].strip()

    def files(self, repo: str, ref: str = "main") -> dict[str, Entry]:
        found = self.repos[repo]
        return {path: e for path, e in found.commits[found.refs[ref]].items() if path != ".gitattributes"}

    def content(self, repo: str, path: str, ref: str = "main") -> bytes:
        return self.store.path(self.files(repo, ref)[path].sha256).read_bytes()

    def commits(self, repo: str) -> int:
        """How many there are beside the one that made the repository."""
        return len(self.repos[repo].commits) - 1


def serve(root: Path, base: Path, **changes: str) -> Iterator[Hub]:
    """A running Hub. At the end: no token is in any file that a client or the server wrote."""
    with Hub(root, base, **changes).running() as hub:
        yield hub
        hub.stop()
        files = [path for path in root.rglob("*") if path.is_file()]
        assert files
        assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def for_one_test(hub: Hub, other_transport: str) -> Iterator[Hub]:
    """A Hub as at the start; at the end: all that was asked of it is right, and came over the one transport."""
    hub.clear()
    yield hub
    assert hub.violations == []
    assert not [line for line in hub.requests if other_transport in line], "the other transport was used"


def make_basis(folder: Path, base: Path, seed: int = 0) -> Path:
    """A random basis for the base on the Hub, whose weights are those of the folder `base`."""
    generator, model = torch.Generator().manual_seed(seed), BaseModel.resolve(base)
    modules = {}
    for name in MODULES:
        rows, columns = model.tensors[f"{name}.weight"][1].shape
        modules[name] = ModuleBasis(
            torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0].contiguous(),
            torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous(),
            torch.ones(RANK),
        )
    ref = BaseRef(BASE, None, model.fingerprint(modules))
    Basis(ref, RANK, modules, {"samples": 1, "energy": {"a": 0.5}, "data": [], "reduction": "sign"}).save(folder)
    return folder


def make_adapter(folder: Path, basis: Path, seed: int = 1) -> Path:
    generator, found = torch.Generator().manual_seed(seed), Basis.load(basis)
    R = {name: torch.randn(RANK, RANK, generator=generator) for name in MODULES}
    Adapter(found.base, found.sha256, found.source, R, training={"task": folder.name, "steps": 3}).save(folder)
    return folder


def make_merged(folder: Path, shard: str = "5GB", seed: int = 0) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder, max_shard_size=shard)
    base = {"name_or_path": BASE, "revision": None, "fingerprint": "f" * 64}
    write_json(folder / "lorasb.json", {"kind": "merged", "base": base, "adapter": {"name": "a", "sha256": "0" * 64}})
    return folder
