"""Fit several tasks of a project: base and basis are loaded once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import distributed
from ..adapter import Adapter
from ..bars import progress_bar
from ..base.given import require_positions
from ..base.loaded import LastLoaded
from ..base.model import BaseModel
from ..calibration.calibrate import MAX_MEASURED
from ..choices import CAUSAL_LM
from ..data.source import AnySource
from ..data.task import load_task
from ..errors import PER_ITEM_ERRORS, LoraSBError, Problems, SettingsError, TrainingError, is_out_of_memory, some
from ..files.output import is_free, refuse_existing
from ..files.storage import expanded
from ..settings import CalibrationSettings, FitSettings
from ..training.checkpoints import refuse_begun, working_folder
from ..training.fit import fit, job_without_network, train_together
from ..training.requirements import check_requirements
from . import basis as project_basis
from .project import OWN_BASIS, Project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_THERE = "Name the tasks that are left, or pass --resume to keep it, or --overwrite to train it anew"
_HOLD_OUT = "To hold some out, set hold_out = 0.1 in [data] of lorasb.toml, or in a task's table, before you train"


class Inputs(NamedTuple):
    """What tasks are fitted from, and where to, by name; read from nothing but the project and the adapter to start
    from."""

    targets: Mapping[str, Path]
    places: Mapping[str, AnySource]
    bases: Mapping[str, str]  # where each task's basis is, or `own`
    start: Adapter | None


def inputs_of(
    project: Project, names: Sequence[str], data: str | None, basis: str | None, start: str | None, out: str | None
) -> Inputs:
    """What `fit_tasks` makes of these arguments.

    Raises:
        SettingsError: `data` or `out` with several tasks; one of several is to replace `start`.
    """
    if len(names) > 1 and (data or out):
        raise SettingsError("--data and --out take one task", fix="Name the task they are for")
    targets = {name: expanded(out) if out else project.adapter_folder(name) for name in names}
    places = {name: project.other_source(name, data) if data else project.task_source(name) for name in names}
    started = Adapter.load(start) if start else None
    if started is not None and len(targets) > 1 and started.folder in [path.absolute() for path in targets.values()]:
        what = f"{started.name} is to be replaced, and the others are to start from it"
        raise SettingsError(what, fix="Train it alone, or start from a copy")
    of_start = "" if started is None or basis else str(started.find_basis())
    bases = {name: basis or of_start or project_basis.basis_of_task(project, name) for name in names}
    return Inputs(targets, places, bases, started)


def refuse_there(target: Path, *, together: bool, resume: bool, overwrite: bool) -> None:
    """Raise OutputError, before any task is trained, where what lies in an adapter's place is not to be replaced."""
    refuse_existing(target, overwrite or resume, _THERE, kind="adapter")
    if not (overwrite or resume or together):
        refuse_begun(working_folder(target))


def leaves_others(error: Exception) -> bool:
    """Whether the error of a task is its alone, and the next is trained all the same; under torchrun only one that all
    processes meet: of others they would wait within their training."""
    return isinstance(error, PER_ITEM_ERRORS if distributed.world_size() == 1 else TrainingError)


def fit_tasks(
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
    together: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[tuple[str, Adapter | LoraSBError]]:
    """Train the named tasks. The project's shared basis is calibrated first if there is none.

    The rows of all tasks are checked before anything is made, and read again for the training of each: all of them, or
    all R, may be more than memory holds. Nothing is done before the first task is asked for.

    Args:
        own: of tasks that are trained otherwise, but in the same dtype and with the same seed.
        data, out: for a single task: its data, where the project does not name it, and its adapter folder.
        basis: a folder or Hub id for all tasks, or `own`: each task's own, which then lies in its adapter.
        start: folder or Hub id of an adapter to go on from (`fit`), in its basis unless `basis` names one.
        together: in mixed batches (`fit_together`) instead of one after another.
        resume: go on with interrupted tasks, keep finished ones.

    Yields:
        each task's name and adapter, once that is written; or its error, where the task alone is at fault (its rows, a
        loss that is not finite, an adapter in its place that was trained otherwise, memory that sufficed for others):
        the next one is trained all the same. Of tasks together that is so where the loss or R is not finite; any other
        error ends all of them. The error of a single task is raised; so is, under torchrun, one that not all processes
        may meet: of data or of an artifact, which each reads for itself.

    Raises:
        OutputError: an adapter, or an interrupted run, is there already; or, even with `resume` or `overwrite`, what is
            no adapter; nothing was trained.
        DataError, MissingPackageError: see `check_requirements`; nothing was trained.
        SettingsError: `data` or `out` with several tasks; tasks of different bases or settings, or a single one,
            together; the project's basis is not as its file has it.
    """
    distributed.start()
    targets, places, sources, started = inputs_of(project, names, data, basis, start, out)
    for target in targets.values():
        refuse_there(target, together=together, resume=resume, overwrite=overwrite)
    own = own or {}
    types, unscored = _checked(places, settings, own)
    generates = types == {CAUSAL_LM}
    unscored = [name for name in unscored if project.task(name).hold_out is None]
    begun = [name for name in unscored if not is_free(targets[name]) or working_folder(targets[name]).exists()]
    if new := [name for name in unscored if not (resume and name in begun)]:
        logger.warning("No rows are held out to score %s on. %s", some(new), _HOLD_OUT)
    base = BaseModel.resolve(model or project.require_model())
    calibration = project.calibration_settings(settings)
    if together and own:
        what, fix = f"{some(sorted(own))} cannot be trained together", "Leave --together out, or [tasks.NAME.fit]"
        raise SettingsError(f"{what} with settings of their own", fix=fix)
    if together and (len(places) < 2 or len(set(sources.values())) > 1 or OWN_BASIS in sources.values()):
        raise SettingsError(
            "together takes two or more tasks of one shared basis", fix="Name such tasks, or leave --together out"
        )
    if any(project_basis.is_shared(project, source) for source in sources.values()):
        project_basis.shared_folder(project)  # before the base is loaded
    same = calibration.dtype == settings.dtype
    loaded = LastLoaded(dtype=settings.dtype, seed=settings.seed)

    def network() -> PreTrainedModel | None:
        """What all tasks are trained on, if the basis can be made with it too."""
        if not (generates and same):
            return None
        found = loaded.get(base, CAUSAL_LM)
        require_positions(found, max(own.get(name, settings).max_length for name in names))
        return found

    if trains := not resume or any(map(is_free, targets.values())):  # else maybe nothing is to be trained
        network()
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
    empty = cache(base.load_empty)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "measure": len(places) <= MAX_MEASURED}
    options["start"] = started
    if together:
        (found,) = shared.values()
        tasks = {name: load_task(name, source) for name, source in places.items()}
        if not trains:
            loaded.drop()  # what a basis was made with: the job loads its own, if it has to train
        options["network"] = loaded.get(base, CAUSAL_LM) if generates and trains else None
        outcomes = train_together(base, found, tasks, targets[names[0]].parent, settings, **options)
        yield from zip(places, outcomes, strict=True)
        return

    def fit_one(name: str) -> Adapter:
        task, of_task = load_task(name, places[name]), own.get(name, settings)
        task_basis = shared.get(sources[name]) or project.calibration_settings(of_task)
        if resume and distributed.on_main(lambda: not is_free(targets[name])):
            without_weights = empty(task.task_type, num_labels=task.num_labels)
            job = job_without_network(base, task_basis, task, targets[name], of_task, started, without_weights)
            if found := job.kept(overwrite=overwrite):
                return found[0]
        if isinstance(task_basis, CalibrationSettings) and not same:
            loaded.drop()  # its basis takes a base of its own, in another dtype
            return fit(base, task_basis, task, targets[name], of_task, **options)
        of_type = loaded.get(base, task.task_type, task.num_labels)
        return fit(base, task_basis, task, targets[name], of_task, network=of_type, **options)

    one_is_done = False
    for name in places:
        outcome: Adapter | LoraSBError
        was_there = resume and not is_free(targets[name])
        try:
            outcome = fit_one(name)
            one_is_done = one_is_done or not was_there
        except Exception as error:
            alone = distributed.world_size() == 1
            full = alone and one_is_done and is_out_of_memory(error)  # of the first the base may be what does not fit
            if len(places) == 1 or not (full or leaves_others(error)):
                raise
            logger.warning("%s is left out: %s", name, error)
            outcome = error.alone() if isinstance(error, LoraSBError) else _out_of_memory(name)
        if isinstance(outcome, LoraSBError):
            gc.collect()  # what the error's frames hold, if it lies in a cycle with them
        yield name, outcome


def _out_of_memory(name: str) -> TrainingError:
    return TrainingError(
        "out of memory", where=name, fix="Fit it by itself, with a smaller --batch-size or --max-length"
    )


def _checked(
    places: Mapping[str, AnySource], settings: FitSettings, own: Mapping[str, FitSettings]
) -> tuple[set[str], list[str]]:
    """Read every task to check it. Up to ten bad ones are told at once.

    Returns:
        the types of the tasks, and the names of those without held-out rows.
    """
    for used in {own.get(name, settings) for name in places}:
        check_requirements([], used)  # what is wrong with no task is told once
    types, unscored, problems = set(), list[str](), Problems()
    for name, source in progress_bar(places.items(), desc="check"):
        with problems:
            task = load_task(name, source)
            check_requirements([task], own.get(name, settings))
            types.add(task.task_type)
            if not task.splits.get(task.held_out()):
                unscored.append(name)
        if problems.is_full:
            break
    problems.raise_all("nothing was trained")
    return types, unscored
