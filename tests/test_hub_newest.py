"""How often the Hub is asked for the newest commit of a repository."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

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
