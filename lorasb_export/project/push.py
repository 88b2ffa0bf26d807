"""Push a project: its basis once, and every adapter, each to a repository of its own or all to one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import basis_source
from ..bars import progress_bar
from ..errors import ArtifactError, LoraSBError, SettingsError
from ..files.kind import BASIS_FILES, artifact_kind
from ..files.storage import absolute
from ..format import read_adapter_config
from ..hub.ids import ADAPTERS, BASES, BASIS
from ..names import PLACE, adapters_in, ours_in
from ..publishing.folder_card import Licences
from ..publishing.project_repository import push_parts
from ..publishing.push import push
from ..publishing.repository import is_of_one
from .project import Project

logger = logging.getLogger(__name__)


def push_project(
    project: Project, repo: str, *, only: str | Path | None = None, with_basis: bool = False, **options: Any
) -> Iterator[tuple[str, dict[str, Any] | LoraSBError]]:
    """Push the bases that lie on this disk beside the adapters, and then all adapters of the project.

    Each is compared with its repository first, so only what changed is sent. Stopped anywhere, the same call again
    goes on: an adapter is never published before its basis. Nothing is done before the first result is asked for.

    Args:
        repo: `owner/{name}-lorasb`, where {name} becomes the adapter's name; `basis` for the project's own basis, the
            folder's name for another. Without {name}: one repository for all, as `push_parts` fills it.
        only: to one repository: this adapter, and its basis, instead of all.
        with_basis: put the basis inside every adapter instead.
        options: of `push`.

    Yields:
        the bases and then the adapters: what {name} became, and what `push` returns; or its error, where an adapter or
        its repository alone is at fault: the next one is pushed all the same. The error of a single adapter is raised.
        Of one repository: the adapters that are left out, with their errors, and then `repo` and what `push` returns.

    Raises:
        SettingsError: there is no adapter, `only` is none of the project's, two folders would go to one place, a pull
            request would bring a new basis, or `with_basis` for one repository.
        and what `push` raises.
    """
    names = (ours_in if only is None else adapters_in)(project.adapters_folder)
    if not names:
        raise project.lacks("no adapter in this project", "Run lorasb fit, or name a folder")
    if PLACE not in repo and with_basis:
        fix = f"Leave out --with-basis, or write {PLACE} in it, for a repository for each adapter"
        raise SettingsError("in one repository the basis lies beside the adapters", where=repo, fix=fix)
    adapters = [project.adapter_folder(name) for name in names]
    if only is not None:
        if absolute(only) not in adapters:
            fix = "Pass --repo owner/name for this folder, or name an adapter of the project"
            raise SettingsError(f"{repo} is for the project's basis and adapters", where=only, fix=fix)
        adapters = [absolute(only)]
    basis_of: dict[Path, Path | None] = dict.fromkeys(adapters)
    for folder in () if with_basis else adapters:
        with suppress(ArtifactError):  # it is told in its turn
            basis_of[folder] = _local_basis(folder)
    bases = list(dict.fromkeys(basis for basis in basis_of.values() if basis))
    if PLACE not in repo:
        yield from _push_to_one(project, repo, bases, basis_of, options)
        return
    folders = [*bases, *adapters]
    _refuse_same(project, folders)
    options["licences"] = Licences()
    for basis in bases if options.get("create_pr") else ():
        if _would_change(push_folder(project, basis, repo, **{**options, "dry_run": True})):
            what = "a pull request cannot bring a new basis: until it is merged no adapter can name it"
            fix = "Push that folder alone first; or push everything to a branch, with --revision"
            raise SettingsError(what, where=basis, fix=fix)
    to_come: set[Path | None] = set()  # bases that a dry run does not find on the Hub
    for number, folder in enumerate(progress_bar(folders, desc="push", leave=False), 1):
        logger.info("%d of %d: %s", number, len(folders), os.path.relpath(folder, project.folder))
        outcome: dict[str, Any] | LoraSBError
        try:
            comes = basis_of.get(folder) in to_come
            outcome = push_folder(project, folder, repo, with_basis=with_basis, basis_to_come=comes, **options)
        except LoraSBError as error:
            if number <= len(bases) or len(adapters) == 1 or not is_of_one(error):
                raise
            logger.warning("%s is left out: %s", folder.name, error)
            outcome = error.alone()
        else:
            if _would_change(outcome):
                to_come.add(folder)
        yield _name(project, folder), outcome


def _push_to_one(
    project: Project, repo: str, bases: Sequence[Path], basis_of: Mapping[Path, Path | None], options: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any] | LoraSBError]]:
    _refuse_same(project, bases, "folder")
    place = {basis: BASIS if _name(project, basis) == BASIS else f"{BASES}/{basis.name}" for basis in bases}
    place |= {adapter: f"{ADAPTERS}/{adapter.name}" for adapter in basis_of}
    beside = {place[adapter]: place[basis] for adapter, basis in basis_of.items() if basis}
    done, failed = push_parts({part: folder for folder, part in place.items()}, beside, repo, **options)
    yield from failed.items()
    yield repo, done


def _refuse_same(project: Project, folders: Sequence[Path], place: str = "repository") -> None:
    """Raise SettingsError where two of `folders` would go to one place."""
    of_name: dict[str, Path] = {}
    for folder in folders:
        name = _name(project, folder)
        if name in of_name:
            what, fix = f"{of_name[name]} and {folder} would go to one {place}", "Rename a task, or a basis's folder"
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
    folder = absolute(folder)
    undecided = PLACE in repo and not with_basis and basis_repo is None
    if undecided and (basis := _local_basis(folder)):
        basis_repo = repo.replace(PLACE, _name(project, basis))
    target = repo.replace(PLACE, _name(project, folder))
    return push(folder, target, with_basis=with_basis, basis_repo=basis_repo, **options)


def _name(project: Project, folder: Path) -> str:
    return BASIS if folder == project.basis_folder else folder.name


def _local_basis(folder: Path) -> Path | None:
    """The folder of the basis that this adapter names; None of one on the Hub or inside, and of what is no adapter."""
    if artifact_kind(folder) != "adapter":
        return None
    source = basis_source.resolved(read_adapter_config(folder)["basis"]["source"], folder, None)
    return Path(source) if source is not None and Path(source).is_absolute() else None
