"""A project that is pushed to one repository of the loopback Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.hub_client import Hub, make_adapter

REPO = "me/support"


@pytest.fixture
def project(adapter: Path, basis: Path) -> Path:
    """With two adapters in one basis."""
    make_adapter(basis.parent / "adapters" / "b", basis, seed=5)
    (basis.parent / "lorasb.toml").write_text(f'[hub]\nrepo = "{REPO}"\n')
    return basis.parent


def pushed(hub: Hub, project: Path, *more: object) -> dict[str, Any]:
    """What `lorasb push` says of the one repository."""
    [result] = hub.lorasb("push", "--config", project / "lorasb.toml", *more)["pushed"]
    return dict(result)


def copied(hub: Hub, to: Path) -> Path:
    """All files of the repository, as a clone has them."""
    for path in hub.files(REPO):
        there = to / path
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(hub.content(REPO, path))
    return to
