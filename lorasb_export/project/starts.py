"""The adapters that the training of a project's tasks goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ..adapter import Adapter, describe
from ..errors import Problems, SettingsError, some
from ..files.kind import BASIS_CONFIG
from ..files.storage import absolute
from ..format import read_basis_config
from ..hub.ids import is_mistyped_path, parse_hub_folder
from ..names import PLACE, look_up_adapter
from .project import OWN_BASIS, Project

logger = logging.getLogger(__name__)


class Starts:
    """What each task starts from: one adapter for all, each its own, or none.

    Args:
        word: as users give it: an adapter's name in the project, a folder or Hub id; with `{name}` in it, another one
            for each task, and a task that has no such folder starts from the beginning.
        targets: task name → where its adapter goes.

    Attributes:
        differ: whether each task has its own.
        one: the adapter of all, if they do not.

    Raises:
        SettingsError: there is none of that name, or none for any task; what one task replaces is another's start.
        ArtifactError: it is damaged, or cannot be fetched.
    """

    def __init__(self, project: Project, word: str | None, targets: Mapping[str, Path]) -> None:
        self.differ = PLACE in (word or "")
        self.one: Adapter | None = None
        self._each: dict[str, Adapter] = {}  # without their R, which may be more than memory holds
        self._last: tuple[str, Adapter] | None = None
        if not word:
            return
        self._shared, self._shared_sha256 = _shared_basis(project)
        if self.differ:
            self._each = _found(project, word, targets)
        else:
            self.one = Adapter.load(project.find_adapter(word))
        owners = {absolute(target): name for name, target in targets.items()}
        for name in targets:
            start = self.described(name)
            owner = owners.get(start.folder, name) if start and start.folder else name
            if owner != name:
                others = f"{name} is" if self.differ else "the others are"
                what = f"{owner} is to be replaced, and {others} to start from it"
                fix = f"Train it alone, start from a copy, or each from its own: --start-from '{PLACE}'"
                raise SettingsError(what, fix=fix)

    def described(self, name: str) -> Adapter | None:
        """As `of`, but maybe without R and head."""
        return self._each.get(name, self.one)

    def of(self, name: str) -> Adapter | None:
        """The adapter that a task starts from; where each has its own, only the last is held."""
        if name not in self._each:
            return self.one
        if self._last is None or self._last[0] != name:
            found = self._each[name]
            self._last = name, Adapter.load(found.hub_source or str(found.folder))
        return self._last[1]

    def basis(self, name: str) -> str | None:
        """Where the basis of that adapter is: the project's shared one, if it is that; `own`, if it lies in one of many
        adapters. None without an adapter."""
        start = self.described(name)
        if start is None:
            return None
        if start.basis_sha256 == self._shared_sha256:
            return self._shared
        return start.basis_source or (OWN_BASIS if self.differ else str(start.find_basis()))


def _shared_basis(project: Project) -> tuple[str, str | None]:
    """Where the project's shared basis is to be, and its hash, if it is there."""
    folder = project.basis_folder
    is_there = (folder / BASIS_CONFIG).is_file()
    return str(folder), read_basis_config(folder)[0]["sha256"] if is_there else None


def _found(project: Project, pattern: str, names: Mapping[str, Path]) -> dict[str, Adapter]:
    """The adapters of the tasks that have one."""
    found, fresh, problems = {}, list[str](), Problems()
    for name in names:
        with problems:
            source = _source(project, pattern.replace(PLACE, name))
            if source is None:
                fresh.append(name)
            else:
                found[name], *_ = describe(source)
        if problems.is_full:
            break
    problems.raise_all("nothing was trained")
    if not found and pattern != PLACE:
        raise SettingsError("no task has an adapter to start from", where=pattern, fix="Leave out --start-from")
    if fresh:
        logger.warning("%s: trained from the beginning, for there is no %s", some(fresh), pattern)
    return found


def _source(project: Project, word: str) -> str | None:
    """As `Project.find_adapter`, but None where it is the name or the path of none."""
    found = look_up_adapter(word, project.adapters_folder)
    if found is None:
        return None
    source = str(found)
    is_of_hub = parse_hub_folder(source) is not None and not is_mistyped_path(source)
    return source if is_of_hub or Path(source).exists() else None
