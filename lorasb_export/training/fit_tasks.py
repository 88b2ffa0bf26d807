"""Fit several tasks of a project: base and basis are loaded once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from .. import distributed, project_basis
from ..adapter import Adapter
from ..base import BaseModel
from ..choices import CAUSAL_LM
from ..data import load_task
from ..errors import OF_ONE_ITEM, LoraSBError, SettingsError, TrainingError
from ..output import expanded, refuse_existing
from ..project import OWN_BASIS, Project
from ..settings import CalibrationSettings, FitSettings
from .fit import fit, train_together
from .requirements import require_fitting

logger = logging.getLogger(__name__)

_THERE = "Name the tasks that are left, or pass --resume to keep it, or --overwrite to train it anew"


def fit_tasks(
    project: Project,
    names: Sequence[str],
    settings: FitSettings,
    *,
    model: str | None = None,
    data: str | None = None,
    basis: str | None = None,
    out: str | None = None,
    together: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[str, Adapter | LoraSBError]]:
    """Train the named tasks. The project's shared basis is calibrated first if there is none.

    The rows of all tasks are checked before anything is made, and read again for the training of each: all of them, or
    all R, may be more than memory holds. Nothing is done before the first task is asked for.

    Args:
        data, out: for a single task: its data, where the project does not name it, and its adapter folder.
        basis: a folder or Hub id for all tasks, or `own`: each task's own, which then lies in its adapter.
        together: in mixed batches (`fit_together`) instead of one after another.
        resume: go on with interrupted tasks, keep finished ones.

    Yields:
        each task's name and adapter, once that is written; or its error, where the task alone is at fault (its rows, a
        loss that is not finite, an adapter in its place that was trained otherwise): the next one is trained all the
        same. Of tasks together that is so where the loss or R is not finite; any other error ends all of them. The
        error of a single task is raised; so is, under torchrun, one that not all processes may meet: of data or of an
        artifact, which each reads for itself.

    Raises:
        OutputError: an adapter is there already; nothing was trained.
        DataError, MissingPackageError: see `require_fitting`; nothing was trained.
        SettingsError: `data` or `out` with several tasks; tasks of different bases, or a single one, together; the
            project's basis is not as its file has it.
    """
    if len(names) > 1 and (data or out):
        raise SettingsError("--data and --out take one task", fix="Name the task they are for")
    distributed.start()
    targets = {name: expanded(out) if out else project.adapter_folder(name) for name in names}
    if not resume:
        for target in targets.values():  # before the first of them is trained
            refuse_existing(target, overwrite, _THERE)
    places = {name: data or project.task_source(name) for name in names}
    generates = {_task_type(name, source, settings) for name, source in places.items()} == {CAUSAL_LM}
    base = BaseModel.resolve(model or project.require_model())
    as_trained = {"dtype": settings.dtype, "max_length": settings.max_length}
    calibration = CalibrationSettings(**{**as_trained, **project.calibration})
    sources = {name: basis or project_basis.find(project, name) for name in places}
    if together and (len(places) < 2 or len(set(sources.values())) > 1 or OWN_BASIS in sources.values()):
        raise SettingsError(
            "together takes two or more tasks of one shared basis", fix="Name such tasks, or leave --together out"
        )
    same = calibration.dtype == settings.dtype
    network = base.load(dtype=settings.dtype) if generates and same else None
    shared = {
        source: project_basis.load_or_make(
            project,
            source,
            base,
            {name: path for name, path in places.items() if sources[name] == source},
            calibration,
            network,
        )
        for source in sorted(set(sources.values()) - {OWN_BASIS})
    }
    if generates and not same and OWN_BASIS not in sources.values():  # now: beside the one for a basis it might not fit
        network = base.load(dtype=settings.dtype)
    if together:
        (found,) = shared.values()
        tasks = {name: load_task(name, source) for name, source in places.items()}
        options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "network": network}
        outcomes = train_together(base, found, tasks, targets[names[0]].parent, settings, **options)
        yield from zip(places, outcomes, strict=True)
        return
    for name, source in places.items():
        task_basis = calibration if sources[name] == OWN_BASIS else shared[sources[name]]
        outcome: Adapter | LoraSBError
        try:
            outcome = fit(
                base,
                task_basis,
                load_task(name, source),
                targets[name],
                settings,
                resume=resume,
                overwrite=overwrite,
                network=network,
            )
        except OF_ONE_ITEM as error:
            met_by_all = distributed.world_size() == 1 or isinstance(error, TrainingError)
            if len(places) == 1 or not met_by_all:  # the other processes wait for this one within their training
                raise
            logger.warning("%s is left out: %s", name, error)
            outcome = error.alone()
        yield name, outcome


def _task_type(name: str, source: str, settings: FitSettings) -> str:
    """Read a task to check it; only its type is kept."""
    task = load_task(name, source)
    require_fitting([task], settings)
    return task.task_type
