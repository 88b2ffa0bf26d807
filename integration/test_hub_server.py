"""The loopback Hub itself: it refuses what it does not know."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2

from integration.hub_server import HubServer


def test_the_server_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with HubServer(tmp_path).running() as server:
        assert httpx2.post(f"{server.url}/api/anything", trust_env=False).status_code == 501
        assert httpx2.put(f"{server.url}/lfs/{'0' * 64}?size=1", content=b"x", trust_env=False).status_code == 400
    assert len(server.violations) == 2
    assert os.listdir(server.store.blobs) == []
