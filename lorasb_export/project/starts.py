"""The adapters that the training of a project's tasks goes on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from .. import basis_source
from ..adapter import Adapter
from ..errors import Problems, SettingsError, some
from ..hub.fetch import ADAPTER_FILES, resolve_folder
from ..hub.ids import is_mistyped_path, parse_hub_folder
from ..names import PLACE
from .project import OWN_BASIS, Project

logger = logging.getLogger(__name__)


class Starts:
    """What each task starts from: one adapter for all, each its own, or none.

    Args:
        word: as users give it: an adapter's name in the project, a folder or Hub id; with `{name}` in it, another one
            for each task, and a task that has none there starts from the beginning.
        targets: task name → where its adapter goes.

    Raises:
        SettingsError: there is none of that name, or of `{name}` for any task; one of several tasks is to replace the
            one that all start from.
        ArtifactError: it is damaged, or cannot be fetched.
    """

    def __init__(self, project: Project, word: str | None, targets: Mapping[str, Path]) -> None:
        self.differ = word is not None and PLACE in word
        self.one: Adapter | None = None
        self._each: dict[str, tuple[str, str]] = {}  # only where they lie: R of all may be more than memory holds
        if word is None:
            return
        if self.differ:
            self._each = _found(project, word, targets)
            return
        self.one = Adapter.load(project.find_adapter(word))
        if len(targets) > 1 and self.one.folder in [target.absolute() for target in targets.values()]:
            what = f"{self.one.name} is to be replaced, and the others are to start from it"
            raise SettingsError(what, fix=f"Train it alone, start from a copy, or each from its own: {PLACE}")

    def of(self, name: str) -> Adapter | None:
        """The adapter that a task starts from, where `{name}` is given read anew."""
        return Adapter.load(self._each[name][0]) if name in self._each else self.one

    def basis(self, name: str) -> str | None:
        """Where the basis of that adapter is; `own`: in it, and in no other. None without an adapter."""
        if self.one is not None:
            return str(self.one.find_basis())
        return self._each[name][1] if name in self._each else None


def _found(project: Project, pattern: str, names: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Of each task that has one: the adapter's folder or Hub id, and the place of its basis."""
    found, fresh, problems = {}, list[str](), Problems()
    for name in names:
        with problems:
            source = _source(project, pattern.replace(PLACE, name))
            if source is None:
                fresh.append(name)
            else:
                folder, found_at = resolve_folder(source, ADAPTER_FILES)
                hub_source = None if found_at == str(folder) else found_at
                found[name] = source, basis_source.of_adapter(folder, hub_source) or OWN_BASIS
    problems.raise_all("nothing was trained")
    if not found:
        raise SettingsError("no task has an adapter to start from", where=pattern, fix="Leave out --start-from")
    if fresh:
        logger.warning("%s: trained from the beginning, for there is no %s", some(fresh), pattern)
    return found


def _source(project: Project, word: str) -> str | None:
    """As `Project.find_adapter`, but None where it is the name or the path of none."""
    try:
        source = project.find_adapter(word)
    except SettingsError:
        return None
    is_of_hub = parse_hub_folder(source) is not None and not is_mistyped_path(source)
    return source if is_of_hub or Path(source).exists() else None
