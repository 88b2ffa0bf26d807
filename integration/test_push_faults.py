"""What a push and a pull do when the Hub fails: they go on, or say so clearly; nothing is ever half published."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from integration.hub_client import Hub, make_adapter, make_basis, make_merged
from integration.hub_faults import FAULTS
from integration.hub_server import Fault
from lorasb_export.files.storage import sha256_file

SEEDS = itertools.count(100)  # fresh weights for every test: what was uploaded once is not uploaded again


BOTH = pytest.mark.parametrize("hub", ["xet", "lfs"], indirect=True)
# Which transport it is, huggingface_hub alone knows: over LFS is tried what meets the data, or comes when it is sent.
OVER_LFS = (
    "500 at the upload",
    "503 when asked where to upload",
    "429 with retry-after at the upload",
    "connection cut in mid-upload",
    "wrong hash",
    "expired token when asked where to upload",
    "500 at the commit",
)


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    found: Hub = request.getfixturevalue(getattr(request, "param", "xet"))
    found.clear()
    yield found
    assert found.violations == []


@pytest.fixture
def basis(tmp_path: Path, llama: Path) -> Path:
    return make_basis(tmp_path / "basis", llama, seed=next(SEEDS))


@pytest.mark.parametrize(
    ("hub", "what"),
    [*(("xet", what) for what in FAULTS), *(("lfs", what) for what in OVER_LFS)],
    indirect=["hub"],
)
def test_a_fault_ends_in_a_retry_or_a_clear_word(hub: Hub, basis: Path, what: str) -> None:
    FAULTS[what](hub, basis)


def test_a_pull_request_is_not_tried_twice(hub: Hub, basis: Path, llama: Path) -> None:
    """The failure may be of the answer alone: a second request would open a second one."""
    head = hub.push(basis, "me/basis")["commit"]
    hub.requests.clear()
    hub.faults.append(Fault("POST .*/commit/", status=500, times=9))
    other = make_basis(basis.parent / "other", llama, seed=next(SEEDS))
    refused = hub.push(other, "me/basis", create_pr=True)
    assert refused["error"] == "ServerError"
    assert "the Hub fails (500) (me/basis). Try again later" in refused["text"]
    assert len([line for line in hub.requests if line.startswith("POST ") and "/commit/" in line]) == 1
    assert hub.repos["me/basis"].refs == {"main": head}


def test_two_pushers_at_once(hub: Hub, basis: Path, llama: Path) -> None:
    """Somebody else's commit lands after this push has looked and before it commits, even behind a failure."""
    hub.push(basis, "me/basis")
    repo = hub.repos["me/basis"]

    for faults in ([], [Fault("POST .*/commit/", status=500)]):
        theirs: list[str] = []

        def commit(theirs: list[str] = theirs) -> None:
            theirs.append(repo.commit("main", dict(repo.commits[repo.refs["main"]]), "somebody else's"))

        hub.requests, hub.faults = Watched("/preupload/", commit), list(faults)
        refused = hub.push(make_basis(basis.parent / f"other-{len(faults)}", llama, seed=next(SEEDS)), "me/basis")
        hub.requests = []
        assert refused["error"] == "ServerError"
        assert "the repository changed meanwhile; nothing" in refused["text"]
        assert [repo.refs["main"]] == theirs


class Watched(list[str]):
    """The requests of a server; `then` is called once, when one of them has `word` in it and before it is answered."""

    def __init__(self, word: str, then: Callable[[], object]) -> None:
        super().__init__()
        self.word, self.then = word, then

    def append(self, line: str) -> None:
        super().append(line)
        if self.word in line:
            self.word = "\0"
            self.then()


@pytest.mark.parametrize(
    ("hub", "signal_number", "at", "committed"),
    [
        ("xet", signal.SIGKILL, "/preupload/", 0),
        ("xet", signal.SIGKILL, "/commit/", 1),
        ("xet", signal.SIGINT, "/preupload/", 0),
        ("lfs", signal.SIGKILL, "/commit/", 1),
    ],
    indirect=["hub"],
)
def test_a_killed_push_goes_on(hub: Hub, basis: Path, signal_number: signal.Signals, at: str, committed: int) -> None:
    """Before the commit nothing is published, after it everything is; the same command again says which."""
    words = ["push", basis, "--repo", "me/basis"]
    hub.requests = Watched(at, lambda: process.send_signal(signal_number))
    process = hub.begin(*words)
    said = process.communicate(timeout=120)[1]
    hub.requests = []
    with hub.lock:  # a request that came whole is carried out
        assert hub.commits("me/basis") == committed
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        last = "Interrupted. What was not finished is not published; the same command again sends what is missing."
        assert said.splitlines()[-1] == last
    assert hub.lorasb(*words)["pushed"][0]["changed"] is (committed == 0)
    assert hub.commits("me/basis") == 1
    assert sorted(hub.files("me/basis")) == ["README.md", "SHA256SUMS", "basis.safetensors", "basis_config.json"]


@BOTH
def test_an_interrupted_push_sends_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged", shard="8KB", seed=next(SEEDS))
    hub.faults.append(Fault("POST .*/commit/", status=401, times=9))  # everything is uploaded, nothing is published
    assert hub.push(merged, "me/merged")["error"] == "ServerError"
    hub.faults.clear()
    hub.requests.clear()
    before = hub.store.xet_bytes()
    assert hub.push(merged, "me/merged")["changed"] is True
    assert hub.store.xet_bytes() < before + 2_000  # xet describes the files anew, and sends none of their chunks
    assert not [line for line in hub.requests if line.startswith("PUT ")]
    assert len([path for path in hub.files("me/merged") if path.endswith(".safetensors")]) == 3


DAMAGED = Fault(r"^GET /me/a/resolve/.*/adapter\.safetensors|^GET /me/a/resolve/.*adapter_config\.json", "damage")


@BOTH
def test_what_arrives_damaged_is_fetched_again(hub: Hub, basis: Path, tmp_path: Path) -> None:
    hub.push(basis, "me/basis")
    adapter = make_adapter(tmp_path / "a", basis, seed=next(SEEDS))
    commit = hub.push(adapter, "me/a", basis_repo="me/basis")["commit"]
    hub.faults.append(damaged := replace(DAMAGED))
    assert hub.lorasb("inspect", "me/a")["sha256"] == sha256_file(adapter / "adapter.safetensors")
    assert damaged.times == 0
    where = hub.home / "hub" / "models--me--a" / "snapshots" / commit / "adapter_config.json"
    config = json.loads(where.read_text())
    where.write_text(json.dumps(config | {"scaling": 2.0}))  # on the disk, later
    assert hub.lorasb("inspect", "me/a")["scaling"] == 1.0


@BOTH
def test_a_damaged_file_in_a_folder_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged", seed=next(SEEDS))
    template = "additional_chat_templates/rag.jinja"
    (merged / template).parent.mkdir()
    (merged / template).write_text("{{ x }}")
    commit = hub.push(merged, "me/merged")["commit"]
    files = hub.lorasb("inspect", "me/merged", "--verify")["verified"]["files"]
    with (hub.home / "hub" / "models--me--merged" / "snapshots" / commit / template).open("a") as cached:
        cached.write("!")
    assert hub.lorasb("inspect", "me/merged", "--verify")["verified"]["files"] == files


@BOTH
@pytest.mark.parametrize("fault", [Fault("GET /api/models/me/basis", status=500), Fault("GET /me/basis/", "cut")])
def test_a_pull_waits_too(hub: Hub, basis: Path, fault: Fault) -> None:
    hub.push(basis, "me/basis")
    hub.faults.append(here := replace(fault))
    assert hub.lorasb("inspect", "me/basis")["kind"] == "basis"
    assert here.times == 0
