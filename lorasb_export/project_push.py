"""Push a project: its basis once, and every adapter, each to a repository of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .errors import SettingsError
from .fetch import BASIS_FILES
from .kind import artifact_kind
from .project import Project
from .publishing.hub import push
from .storage import expanded

PLACE = "{name}"  # in the name of a repository: stands for the adapter's, or for `basis`
BASIS = "basis"


def push_project(project: Project, repo: str, *, with_basis: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Push the bases that lie on this disk beside the adapters, and then all adapters of the project.

    Each is compared with its repository first, so only what changed is sent. Stopped anywhere, the same call again
    goes on: an adapter is never published before its basis.

    Args:
        repo: `owner/{name}-lorasb`, where {name} becomes the adapter's name; `basis` for the project's own basis, the
            folder's name for another.
        with_basis: put the basis inside every adapter instead.
        options: of `push`.

    Returns:
        what `push` returns, of the bases first.

    Raises:
        SettingsError: there is no adapter, `repo` names a single repository, two folders would go to one, or a pull
            request would bring a new basis.
        and what `push` raises.
    """
    names = project.adapter_names()
    if not names:
        raise project.lacks("no adapter in this project", "Run lorasb fit, or name a folder")
    if PLACE not in repo:
        fix = f"Write {PLACE} in it, as in me/{PLACE}-lorasb, or name the folder to push"
        raise SettingsError("a project needs a repository for its basis and for each adapter", where=repo, fix=fix)
    adapters = [project.adapter_folder(name) for name in names]
    basis_of = {folder: None if with_basis else _local_basis(folder) for folder in adapters}
    bases = list(dict.fromkeys(basis for basis in basis_of.values() if basis))
    _refuse_same(project, [*bases, *adapters])
    for basis in bases if options.get("create_pr") else ():
        if _would_change(push_folder(project, basis, repo, **{**options, "dry_run": True})):
            what = "a pull request cannot bring a new basis: until it is merged no adapter can name it"
            fix = "Push that folder alone first; or push everything to a branch, with --revision"
            raise SettingsError(what, where=basis, fix=fix)
    pushed = {basis: push_folder(project, basis, repo, **options) for basis in bases}
    options["with_basis"] = with_basis
    for folder, of in basis_of.items():
        to_come = of is not None and _would_change(pushed[of])
        pushed[folder] = push_folder(project, folder, repo, basis_to_come=to_come, **options)
    return list(pushed.values())


def _refuse_same(project: Project, folders: Sequence[Path]) -> None:
    """Raise SettingsError where two of `folders` would go to one repository."""
    of_name: dict[str, Path] = {}
    for folder in folders:
        name = _name(project, folder)
        if name in of_name:
            what, fix = f"{of_name[name]} and {folder} would go to one repository", "Rename a task, or a basis's folder"
            raise SettingsError(what, where=name, fix=fix)
        of_name[name] = folder


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
    """Push one folder to the repository that `repo` names for it; an adapter's basis is looked for where it names that.

    Args and errors: as for `push_project` and `push`.
    """
    folder = Path(os.path.abspath(expanded(folder)))
    undecided = PLACE in repo and not with_basis and basis_repo is None
    if undecided and (basis := _local_basis(folder)):
        basis_repo = repo.replace(PLACE, _name(project, basis))
    target = repo.replace(PLACE, _name(project, folder))
    return push(folder, target, with_basis=with_basis, basis_repo=basis_repo, **options)


def _name(project: Project, folder: Path) -> str:
    return BASIS if folder == project.path(project.basis_path) else folder.name


def _local_basis(folder: Path) -> Path | None:
    """The folder of the basis that this adapter names; None of one on the Hub or inside, and of what is no adapter."""
    if artifact_kind(folder) != "adapter":
        return None
    source = Adapter.load(folder).basis_source
    return Path(source) if source is not None and Path(source).is_absolute() else None
