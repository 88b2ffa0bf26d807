"""Each way the Hub may fail a push, and what must come of it: shared by the tests and the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from integration.hub_client import Hub, make_adapter
from integration.hub_server import Fault
from lorasb_export.files.storage import sha256_file

UPLOAD = r"^PUT /lfs/|^GET .*/xet-write-token/"  # the way of the data, over either transport


PASSING = {  # after these the push itself goes on
    "500 when asked what is there": Fault("GET /api/models/me/basis$", status=500),
    "500 when the repository is made": Fault("POST /api/repos/create", status=500),
    "500 at the upload": Fault(UPLOAD, status=500),
    "500 at the commit": Fault("POST .*/commit/", status=500, times=2),
    "503 when asked where to upload": Fault("POST .*/preupload/", status=503),
    "429 with retry-after at the commit": Fault("POST .*/commit/", status=429, headers={"Retry-After": "1"}),
    "429 with retry-after at the upload": Fault(UPLOAD, status=429, headers={"Retry-After": "1"}),
    "429 with ratelimit at the commit": Fault("POST .*/commit/", status=429, headers={"RateLimit": '"api";r=0;t=1'}),
    "connection cut in mid-upload": Fault("^PUT /lfs/|POST .*/preupload/", "cut"),
    "connection cut in mid-commit": Fault("POST .*/commit/", "cut"),
    "the answer to the commit is lost": Fault("POST .*/commit/", "lost"),
}

LASTING = {  # the push ends, saying this
    "500 that stays": (
        Fault("POST .*/commit/", status=500, times=9),
        "the Hub fails (500) (me/basis). Try again later",
    ),
    "wrong hash": (Fault(r"^PUT /lfs/|POST .*/commit/", "damage", times=9), "the Hub does not take it"),
    "expired token": (
        Fault("POST .*/commit/", status=401, times=9),
        "the Hub asks for a valid token (me/basis). Run `hf auth login`, or set HF_TOKEN",
    ),
    "expired token when asked where to upload": (
        Fault(r"^POST .*/info/lfs/|^GET .*/xet-write-token/", status=401, times=9),
        "the Hub asks for a valid token (me/basis). Run `hf auth login`, or set HF_TOKEN",
    ),
    "429 that stays": (
        Fault("POST .*/commit/", status=429, headers={"Retry-After": "1"}, times=99),
        "the Hub's rate limit is reached (me/basis). Wait a few minutes, then try again",
    ),
    "429 for an hour": (
        Fault("POST .*/commit/", status=429, headers={"Retry-After": "3600"}),
        "the Hub's rate limit is reached (me/basis). Wait a few minutes, then try again",
    ),
    "429 for an hour, said by ratelimit": (
        Fault("POST .*/commit/", status=429, headers={"RateLimit": '"api";r=0;t=3600'}),
        "the Hub's rate limit is reached (me/basis). Wait a few minutes, then try again",
    ),
    "stale parent": (
        Fault("POST .*/commit/", status=412, times=9),
        "the repository changed meanwhile; nothing was committed (me/basis). Push again: no file is sent twice",
    ),
    "no right to write": (
        Fault("POST .*/commit/", status=403, times=9),
        "this token may not do that: fault (me/basis). Use a token that may, with write access for a push",
    ),
}


def _passes(fault: Fault, hub: Hub, basis: Path) -> None:
    """The push waits, goes on and publishes everything in one commit."""
    hub.faults.append(here := replace(fault))
    result = hub.push(basis, "me/basis")
    assert here.times == 0, "the fault never came"
    assert "error" not in result, result
    assert result["changed"] is True
    assert result["commit"] == hub.repos["me/basis"].refs["main"]
    assert hub.commits("me/basis") == 1
    stored = hub.store.path(hub.files("me/basis")["basis.safetensors"].sha256)
    assert sha256_file(stored) == sha256_file(basis / "basis.safetensors")


def _stays(fault: Fault, text: str, hub: Hub, basis: Path) -> None:
    """The push ends in a clear word with nothing published, and goes on once the fault is gone."""
    hub.faults.append(replace(fault))
    refused = hub.push(basis, "me/basis")
    assert refused["error"] == "ServerError"
    assert text in refused["text"], refused
    assert "\n" not in refused["text"]
    assert hub.files("me/basis") == {}, "half published"
    hub.faults.clear()
    assert hub.push(basis, "me/basis")["changed"] is True
    assert hub.commits("me/basis") == 1


def _renamed(hub: Hub, basis: Path) -> None:
    """A push says the new name and makes no second repository under the old one; a pull follows."""
    commit = hub.push(basis, "me/old")["commit"]
    hub.repos["me/new"] = hub.repos.pop("me/old")
    hub.moved["me/old"] = "me/new"
    refused = hub.push(basis, "me/old")
    assert refused == {"error": "OutputError", "text": "the repository was renamed (me/old). Push to me/new"}
    assert sorted(hub.repos) == ["me/new", "owner/base"]
    assert hub.lorasb("inspect", "me/old")["path"] == f"me/old@{commit}"


def _gated(hub: Hub, basis: Path) -> None:
    """Neither pulled, nor named by an adapter, as long as access is not granted."""
    hub.push(basis, "me/gated")
    hub.repos["me/gated"].gated = True
    access = "the repository is gated (me/gated). Ask for access on its page, then try again"
    assert hub.lorasb_fails("inspect", "me/gated").endswith(access)
    refused = hub.push(make_adapter(basis.parent / "a", basis), "me/a", basis_repo="me/gated")
    assert refused["text"] == f"the adapter's basis: {access}"
    assert "me/a" not in hub.repos


FAULTS: dict[str, Callable[[Hub, Path], None]] = {
    **{name: partial(_passes, fault) for name, fault in PASSING.items()},
    **{name: partial(_stays, fault, text) for name, (fault, text) in LASTING.items()},
    "renamed repository": _renamed,
    "gated repository": _gated,
}
