"""How often the Hub is asked for the newest commit of a repository."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

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
