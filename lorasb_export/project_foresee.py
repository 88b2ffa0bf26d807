"""What a fit of a project's tasks would do: trained, resumed, kept or refused, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from .adapter import Adapter
from .base import BaseModel
from .data import load_task
from .errors import LoraSBError
from .project import OWN_BASIS, Project
from .project_basis import basis_of_task, load_if_there
from .settings import FitSettings
from .storage import expanded
from .training.fit import job_without_network


def foresee_tasks(
    project: Project,
    names: Sequence[str],
    settings: FitSettings,
    *,
    own: Mapping[str, FitSettings] | None = None,
    model: str | None = None,
    data: str | None = None,
    basis: str | None = None,
    start: str | None = None,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What `fit_tasks` would do with each task, by its adapter and checkpoints. No weights are loaded, nothing written.

    What shows only in training (rows that are too long, a loss that is not finite) is not foreseen.

    Args: as for `fit_tasks`.

    Yields:
        each task's name, and `action`, `step`, `why` and `out`: `train`, `resume` (from `step`), `keep`, or `refuse`,
        where `why` is the error, of its rows or of what is in its place.

    Raises:
        LoraSBError: the base, a basis or the adapter to start from cannot be read, or is not what it has to be.
    """
    base = BaseModel.resolve(model or project.require_model())
    started = Adapter.load(start) if start else None
    of_start = "" if started is None or basis else str(started.find_basis())
    empty = cache(base.load_empty)
    load = cache(lambda source: None if source == OWN_BASIS else load_if_there(project, source, base))
    for name in names:
        folder = expanded(out) if out else project.adapter_folder(name)
        source, of_task = basis or of_start or basis_of_task(project, name), (own or {}).get(name, settings)
        found = load(source)
        try:
            task = load_task(name, project.other_source(name, data) if data else project.task_source(name))
            made = found or project.calibration_settings(of_task)
            without_weights = empty(task.task_type, num_labels=task.num_labels)
            job = job_without_network(base, made, task, folder, of_task, started, without_weights)
            action, step, why = job.foreseen(resume=resume, overwrite=overwrite)
        except LoraSBError as error:
            action, step, why = "refuse", None, str(error)
        yield name, {"action": action, "step": step, "why": why, "out": str(folder)}
