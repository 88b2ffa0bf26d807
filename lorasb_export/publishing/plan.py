"""What a push is told, and what it says beforehand."""

from __future__ import annotations

import difflib
from typing import Any

from ..errors import SettingsError
from ..hub.fetch import is_hub_id, parse_hub_folder
from .outgoing import Files, size_of
from .repository import Head, Repository, compare


def check_target(repo: str, revision: str | None, create_pr: bool) -> None:
    """Raise SettingsError for what is no repository, or options that exclude each other."""
    if not is_hub_id(repo):
        fix = "Give owner/name"
        if (found := parse_hub_folder(repo)) and found.path:
            fix = f"Push the project to {found.repo}"
        raise SettingsError("not a Hub repository", where=repo, fix=fix)
    if create_pr and revision is not None:
        raise SettingsError("create_pr and revision exclude each other", fix="Leave one out")


def planned(repository: Repository, files: Files, head: Head, kind: str, public: bool, message: str) -> dict[str, Any]:
    """What `push` returns of its files and its commit."""
    changes = compare(files, head)
    sizes = {path: size_of(file) for path, file in sorted(files.items())}

    def change(path: str) -> str:
        if path not in changes.written:
            return "same"
        return "changed" if path in head.files else "added"

    return {
        "repo": repository.name,
        "url": repository.url,
        "kind": kind,
        "private": head.stays_private(public),
        "files": [{"path": path, "bytes": size, "change": change(path)} for path, size in sizes.items()],
        "deleted": changes.deleted,
        "bytes": sum(sizes.values()),
        "sent": sum(sizes[path] for path in changes.written),
        "message": message,
        "parent": head.commit,
    }


def card_change(theirs: str, text: str, head: Head) -> dict[str, Any]:
    """What a dry run says beside its plan."""
    diff = difflib.unified_diff(theirs.splitlines(), text.splitlines(), "on the Hub", "to be pushed", lineterm="")
    return {"card_diff": "\n".join(diff), "reached": head.reached}
