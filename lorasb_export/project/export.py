"""Which rows an export of a project's adapters is compared on with torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..adapter import Adapter
from ..choices import MAX_COMPARED
from ..data.task import TaskData, load_held_out, load_task
from ..errors import DataError
from .project import Project

logger = logging.getLogger(__name__)


def tasks_to_compare(project: Project, folders: Sequence[str], data: str | None) -> dict[str, TaskData]:
    """The task of each adapter that is compared, by the adapter's name, of those whose data is found.

    Args:
        folders: folders or Hub ids of adapters, of which the first few are compared.
        data: the rows, if not the task's own.

    Raises:
        DataError: of `data`: it cannot be read, or has no held-out rows; what is wrong with others is a warning.
        ArtifactError: an adapter is damaged.
    """
    found = {}
    for folder in folders[:MAX_COMPARED]:
        loaded = Adapter.load(folder)
        name, source = project.task_of(loaded, data)
        task = None
        if data is not None:
            task = load_held_out(name, source or data)
            task.rows(task.held_out())  # or what was asked for would be left out in silence
        elif source is not None and (name in project.tasks or Path(str(source)).exists()):
            try:
                task = load_task(name, source)
            except DataError as error:
                logger.warning("The data of %s cannot be read: %s", name, error)
        if task is not None and task.splits.get(task.held_out()):
            found[loaded.name or ""] = task
        else:
            compared = "the graph is compared on built-in prompts only (--data names them)"
            logger.warning("No held-out rows for %s: %s", name, compared)
    return found
