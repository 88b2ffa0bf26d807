"""Push a project: its basis once, and every adapter, each to a repository of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import SettingsError
from ..fetch import BASIS_FILES
from ..kind import artifact_kind
from ..output import expanded
from ..project import Project
from .hub import push

PLACE = "{name}"  # in the name of a repository: stands for the adapter's, or for `basis`
BASIS = "basis"


def push_project(project: Project, repo: str, *, with_basis: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Push the project's shared basis, if an adapter uses it, and then all its adapters.

    Each is compared with its repository first, so only what changed is sent. Stopped anywhere, the same call again
    goes on: an adapter is never published before its basis.

    Args:
        repo: `owner/{name}-lorasb`, where {name} becomes `basis` or the adapter's name.
        with_basis: put the basis inside every adapter instead.
        options: of `push`.

    Returns:
        what `push` returns, of the basis first.

    Raises:
        SettingsError: there is no adapter, `repo` names a single repository, or a pull request would bring a new basis.
        and what `push` raises.
    """
    names = project.adapter_names()
    if not names:
        raise project.lacks("no adapter in this project", "Run lorasb fit, or name a folder")
    if PLACE not in repo:
        fix = f"Write {PLACE} in it, as in me/{PLACE}-lorasb, or name the folder to push"
        raise SettingsError("a project needs a repository for its basis and for each adapter", where=repo, fix=fix)
    if BASIS in names:
        raise SettingsError("an adapter is called `basis`", where=project.folder, fix="Rename its task")
    adapters = [project.adapter_folder(name) for name in names]
    if with_basis or not any(_uses_shared_basis(project, folder) for folder in adapters):
        return [push_folder(project, folder, repo, with_basis=with_basis, **options) for folder in adapters]
    basis = project.path(project.basis_path)
    if options.get("create_pr") and _would_change(push_folder(project, basis, repo, **{**options, "dry_run": True})):
        what = "a pull request cannot bring a new basis: until it is merged no adapter can name it"
        fix = "Push that folder alone first; or push everything to a branch, with --revision"
        raise SettingsError(what, where=basis, fix=fix)
    pushed = push_folder(project, basis, repo, **options)
    to_come = _would_change(pushed)
    return [pushed, *(push_folder(project, folder, repo, basis_to_come=to_come, **options) for folder in adapters)]


def _would_change(plan: Mapping[str, Any]) -> bool:
    """Whether this is a dry run that found another basis on the Hub, or none; the cards may differ."""
    return plan.get("reached", False) and any(f["path"] in BASIS_FILES and f["change"] != "same" for f in plan["files"])


def push_folder(
    project: Project,
    folder: str | Path,
    repo: str,
    *,
    with_basis: bool = False,
    basis_repo: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Push one folder to the repository that `repo` names for it, where it also looks for an adapter's shared basis.

    Args and errors: as for `push_project` and `push`.
    """
    folder = Path(os.path.abspath(expanded(folder)))
    is_basis = folder == project.path(project.basis_path)
    undecided = PLACE in repo and not with_basis and basis_repo is None
    if undecided and _uses_shared_basis(project, folder):
        basis_repo = repo.replace(PLACE, BASIS)
    target = repo.replace(PLACE, BASIS if is_basis else folder.name)
    return push(folder, target, with_basis=with_basis, basis_repo=basis_repo, **options)


def _uses_shared_basis(project: Project, folder: Path) -> bool:
    """Whether this is an adapter that names the project's basis folder."""
    if artifact_kind(folder) != "adapter":
        return False
    return Adapter.load(folder).basis_source == str(project.path(project.basis_path))
