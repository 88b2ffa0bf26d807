"""What is named without a commit is the newest; where the Hub does not say, the cached one, with a warning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.hub_client import Hub
from integration.hub_server import Fault
from lorasb_export.files.storage import write_json

FETCH = """
import json, sys
from unittest.mock import patch
from lorasb_export.errors import LoraSBError
from lorasb_export.files.kind import BASIS_FILES
from lorasb_export.hub.fetch import resolve_folder
try:
    with patch("lorasb_export.hub.calls._WAITS", (0, 0, 0, 0)):  # else the last, of 8 s, is told
        print(resolve_folder(sys.argv[1], BASIS_FILES)[1])
except LoraSBError as error:
    print(error)
"""
LOOK_UP = r"GET /api/models/me/[\w-]+(/revision/[^/]+)?\?"


def made(hub: Hub, repo: str, folder: Path, number: int) -> str:
    """The commit of the `number`th version of a repository."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "basis_config.json", {"number": number})
    return f"{repo}@{hub.put(repo, folder)}"


def fetch(hub: Hub, source: str, **changes: str) -> tuple[str, str]:
    """What came of it, and what was warned of."""
    exit_code, said, errors = hub.start(FETCH, source, **changes)
    assert exit_code == 0, errors
    lines = [line for line in re.split(r"[\r\n]+", errors) if line and not line.startswith("Fetching ")]  # its bars
    return said.strip(), "\n".join(lines)


def test_the_newest_is_asked_for_once_and_is_what_is_used_offline(any_hub: Hub, tmp_path: Path) -> None:
    first = made(any_hub, "me/newest", tmp_path / "a", 1)
    assert fetch(any_hub, "me/newest") == (first, "")
    any_hub.requests.clear()
    assert fetch(any_hub, "me/newest") == (first, "")
    assert any_hub.requests == ["GET /api/models/me/newest?expand=sha"]
    second = made(any_hub, "me/newest", tmp_path / "a", 2)
    assert fetch(any_hub, "me/newest") == (second, "")
    any_hub.requests.clear()
    assert fetch(any_hub, "me/newest", HF_HUB_OFFLINE="1") == (second, "")
    assert any_hub.requests == []


ONCE = f"""
import sys
from lorasb_export import push
from lorasb_export.hub.newest import asked_once
load = {FETCH!r}
with asked_once():
    exec(load)
    exec(load)
    if len(sys.argv) > 2:
        push(sys.argv[2], sys.argv[1], public=True)
        exec(load)
"""


def fetch_once(hub: Hub, source: str, *pushed: Path) -> list[str]:
    exit_code, said, errors = hub.start(ONCE, source, *pushed)
    assert exit_code == 0, errors
    return said.split()


def test_what_is_asked_once_is_asked_anew_after_a_push_and_by_the_next(
    any_hub: Hub, basis: Path, tmp_path: Path
) -> None:
    first = made(any_hub, "me/once", tmp_path / "a", 1)
    assert fetch_once(any_hub, "me/once") == [first, first]
    assert any_hub.requests.count("GET /api/models/me/once?expand=sha") == 1
    second = made(any_hub, "me/once", tmp_path / "a", 2)
    *before, after = fetch_once(any_hub, "me/once", basis)
    assert before == [second, second]
    assert after == f"me/once@{any_hub.repos['me/once'].refs['main']}" != second


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (401, {}, "the Hub asks for a valid token"),
        (403, {}, "this token may not do that"),
        (404, {"X-Error-Code": "RepoNotFound"}, "the Hub has no such repository or revision, or hides it"),
        (429, {}, "the Hub's rate limit is reached"),
        (429, {"Retry-After": "3600"}, "the Hub's rate limit is reached"),
        (503, {}, "the Hub fails (503)"),
    ],
)
def test_yesterdays_is_taken_with_a_warning(
    any_hub: Hub, tmp_path: Path, status: int, headers: dict[str, str], reason: str
) -> None:
    repo = f"me/of-{status}-{len(headers)}"
    first = made(any_hub, repo, tmp_path / "a", 1)
    fetch(any_hub, repo)
    second = made(any_hub, repo, tmp_path / "a", 2)
    fault = Fault(LOOK_UP, status=status, headers=headers, times=99)
    any_hub.faults.append(fault)
    found, warned = fetch(any_hub, repo)
    assert found == first
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    text = rf"{repo}: {re.escape(reason)}.*\. Commit {first.partition('@')[2]}, fetched {when}, is taken from the cache"
    assert re.search(text, warned), warned
    assert len(warned.splitlines()) == 1
    asked = fault.times
    assert fetch(any_hub, repo) == (first, "")  # told once
    assert fault.times == asked - 1  # and not waited for again
    any_hub.faults.clear()
    assert fetch(any_hub, repo) == (second, "")


def test_a_hub_that_fails_for_a_moment_is_asked_again(any_hub: Hub, tmp_path: Path) -> None:
    made(any_hub, "me/moment", tmp_path / "a", 1)
    fetch(any_hub, "me/moment")
    second = made(any_hub, "me/moment", tmp_path / "a", 2)
    any_hub.faults.append(fault := Fault(LOOK_UP, status=503, times=2))
    assert fetch(any_hub, "me/moment") == (second, "")
    assert fault.times == 0


def test_without_a_connection(any_hub: Hub, tmp_path: Path) -> None:
    first = made(any_hub, "me/far", tmp_path / "a", 1)
    fetch(any_hub, "me/far")
    far = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    found, warned = fetch(any_hub, "me/far", **far)
    assert found == first
    assert "me/far: the Hub cannot be reached. Commit " in warned
    assert "the Hub cannot be reached (me/none)" in fetch(any_hub, "me/none", **far)[0]


def test_what_the_cache_has_not_is_an_error_that_says_why(any_hub: Hub, tmp_path: Path) -> None:
    made(any_hub, "me/uncached", tmp_path / "a", 1)
    any_hub.faults.append(Fault(LOOK_UP, status=503, times=99))
    assert "the Hub fails (503) (me/uncached)" in fetch(any_hub, "me/uncached")[0]


def test_a_commit_is_that_commit_and_a_branch_that_is_gone_is_missed(any_hub: Hub, tmp_path: Path) -> None:
    pinned = made(any_hub, "me/pinned", tmp_path / "a", 1)
    any_hub.repos["me/pinned"].refs["old"] = any_hub.repos["me/pinned"].refs["main"]
    assert fetch(any_hub, "me/pinned@old") == (pinned, "")
    made(any_hub, "me/pinned", tmp_path / "a", 2)
    any_hub.requests.clear()
    assert fetch(any_hub, pinned) == (pinned, "")
    assert any_hub.requests == []
    del any_hub.repos["me/pinned"].refs["old"]
    assert "no such repository or revision" in fetch(any_hub, "me/pinned@old")[0]
