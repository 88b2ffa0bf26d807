"""How often the Hub is asked for the newest commit of a repository."""

from __future__ import annotations

import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import close_session

from lorasb_export.errors import BaseModelError
from lorasb_export.hub.fetch import snapshot
from lorasb_export.hub.newest import asked_once, at_newest


def test_what_is_asked_once_is_known_to_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[str] = []
    fetched: list[str] = []

    def model_info(_: HfApi, name: str, **__: Any) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(sha=f"{len(asked)}" * 40)

    def fetch(revision: str) -> str:
        fetched.append(revision)
        folder = tmp_path / "snapshots" / revision
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with asked_once():
        at_newest("me/a", None, fetch)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(at_newest, "me/a", None, fetch).result()
    assert (asked, fetched) == (["me/a"], ["1" * 40] * 2)
    at_newest("me/a", None, fetch)
    assert fetched[-1] == "2" * 40


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_of_a_cache_that_is_only_read_the_older_commit_is_taken(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cluster's, that an administrator fills; not of one whose disk is full."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="b" * 40))
    old = tmp_path / ("a" * 40)
    old.mkdir()
    (old / "model.safetensors").touch()

    def fetch(*_: str, revision: str | None, local_files_only: bool = False, **__: Any) -> str:
        if not local_files_only:
            raise OSError(code, os.strerror(code), str(tmp_path))
        return str(old)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    if code == errno.ENOSPC:
        with pytest.raises(BaseModelError, match="No space left"):
            snapshot("me/full", ["*"], BaseModelError)
        return
    name = f"me/read-{code}"
    assert snapshot(name, ["*"], BaseModelError) == (name, old.name, old)
    assert (
        f"{name}: what is newer cannot be written into the cache ({os.strerror(code)}). Commit {old.name}"
        in caplog.text
    )
    # Then its weights, of that commit: something that the administrator's did not ask for is not there.
    assert snapshot(f"{name}@{old.name}", ["*"], BaseModelError, cached=old) == (name, old.name, old)


class Cache:
    """Of one repository; `fetch` takes what it is asked for, or what lies here, the commit `a…`."""

    def __init__(self, folder: Path, *, reached: bool = True) -> None:
        self.folder, self.reached = folder, reached
        self.fetched: list[str | None] = []

    def fetch(self, *, revision: str | None, local_files_only: bool = False) -> str:
        if not self.reached and not local_files_only:
            raise LocalEntryNotFoundError("not there")
        self.fetched.append(revision)
        folder = self.folder / "snapshots" / ("a" * 40 if local_files_only else str(revision))
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


def answers(monkeypatch: pytest.MonkeyPatch, *found: int | str | None) -> None:
    """The Hub gives these, one at a time: a commit, or none, or an error's status."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    left = iter(found)

    def model_info(*_: Any, **__: Any) -> SimpleNamespace:
        if not isinstance(answer := next(left), int):
            return SimpleNamespace(sha=answer)
        response = httpx2.Response(answer, request=httpx2.Request("GET", "http://hub"))
        raise HfHubHTTPError("refused", response=response)

    monkeypatch.setattr(HfApi, "model_info", model_info)


def test_one_command_takes_one_commit_also_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub fails where the first of two adapters is asked for, and answers for the second."""
    answers(monkeypatch, 403, "b" * 40)
    cache = Cache(tmp_path)
    with asked_once():
        found = [at_newest("me/twice", None, cache.fetch) for _ in range(2)]
    assert [Path(folder).name for folder in found] == ["a" * 40] * 2


def test_a_mirror_that_does_not_say_the_commit_is_asked_for_the_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, None)
    cache = Cache(tmp_path)
    at_newest("me/mirrored", "v1", cache.fetch)
    assert cache.fetched == ["v1"]


def test_what_cannot_be_fetched_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "b" * 40)
    assert Path(at_newest("me/cut-off", None, Cache(tmp_path, reached=False).fetch)).name == "a" * 40


def test_a_hub_that_answers_again_is_waited_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, *[503] * 5, "b" * 40, 503, "c" * 40)
    cache = Cache(tmp_path)
    found = [Path(at_newest("me/recovers", None, cache.fetch)).name for _ in range(3)]
    assert found == ["a" * 40, "b" * 40, "c" * 40]


@pytest.mark.parametrize(
    ("variable", "proxy", "said"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "the proxy cannot be used: socksio is not installed"),
        ("ALL_PROXY", "socks://127.0.0.1:9", "the proxy or HF_ENDPOINT cannot be used: Unknown scheme"),
        ("HTTPS_PROXY", "127.0.0.1:port", "the proxy or HF_ENDPOINT cannot be used: Invalid port"),
    ],
)
def test_with_a_proxy_that_the_client_refuses_the_cache_serves(
    variable: str,
    proxy: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(sys.modules, "socksio", None)
    for name in ("all_proxy", "http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(variable, proxy)
    close_session()  # which has read the variables of before
    cache = Cache(tmp_path)
    assert Path(at_newest("me/behind-a-proxy", None, cache.fetch)).name == "a" * 40
    assert said in caplog.text

    def nothing(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    with pytest.raises(BaseModelError, match=f"no such folder, and {said}.*ALL_PROXY"):
        snapshot("me/elsewhere", ["*"], BaseModelError)
    close_session()
