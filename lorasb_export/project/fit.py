"""Fit several tasks of a project: base and basis are loaded once."""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..adapter import Adapter
from ..bars import progress_bar
from ..base.given import require_positions
from ..base.loaded import LastLoaded
from ..base.model import BaseModel
from ..basis import Basis
from ..calibration.calibrate import MAX_MEASURED
from ..choices import CAUSAL_LM, SEQ_CLS
from ..data.task import TaskData, load_task
from ..errors import (
    PER_ITEM_ERRORS,
    ArtifactError,
    BusyError,
    LoraSBError,
    Problems,
    SettingsError,
    TrainingError,
    is_out_of_memory,
    some,
)
from ..files.output import is_free, refuse_existing
from ..files.storage import absolute, expanded
from ..names import PLACE
from ..settings import CalibrationSettings, FitSettings
from ..training.checkpoints import refuse_begun, working_folder
from ..training.fit import fit, train_together
from ..training.job import Job
from ..training.requirements import check_requirements, require_same_task
from ..training.run_basis import with_rate
from .basis import basis_of_task, is_shared, load_or_make, shared_folder
from .project import OWN_BASIS, Project
from .starts import Starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_THERE = "Name the tasks that are left, or pass --resume to keep it, or --overwrite to train it anew"
_HOLD_OUT = "To hold some out, set hold_out = 0.1 in [data] of lorasb.toml, or in a task's table, before you train"
_BY_ITSELF = "Fit it by itself, with a smaller --batch-size or --max-length"
Outcome = Adapter | LoraSBError


class FitRequest:
    """What `fit_tasks` is asked to do, or `foresee_tasks` to foresee. To make one reads only the project and `start`.

    Args:
        own: of tasks that are trained otherwise, but in the same dtype and with the same seed.
        data, out: for a single task: its data, where the project does not name it, and its adapter folder.
        basis: a folder or Hub id for all tasks, or `own`: each task's own, which then lies in its adapter.
        start: an adapter to go on from (`fit`), or with `{name}` one for each task: the word of `Starts`. A task is
            trained in the basis of that, unless `basis` names one.
        resume: go on with interrupted tasks, keep finished ones.

    Raises:
        SettingsError: `data` or `out` with several tasks; or see `Starts`.
        ArtifactError: see `Starts`.
    """

    def __init__(
        self,
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
    ) -> None:
        if len(names) > 1 and (data or out):
            raise SettingsError("--data and --out take one task", fix="Name the task they are for")
        self.project, self.settings, self.own, self._model = project, settings, own or {}, model
        self.resume, self.overwrite = resume, overwrite
        self.settings_of = {name: self.own.get(name, settings) for name in names}
        self.targets = {name: expanded(out) if out else project.adapter_folder(name) for name in names}
        self.places = {name: project.other_source(name, data) if data else project.task_source(name) for name in names}
        if start and basis == OWN_BASIS:
            raise SettingsError("R of another basis to start from, and a basis of its own", fix="Leave out either")
        self.starts, self._basis = Starts(project, start, self.targets), basis
        # Where the basis of each task is, or `own`.
        self.bases = {name: basis or self.starts.basis(name) or basis_of_task(project, name) for name in names}
        if basis is None:
            self._check_bases_of_starts()

    def _check_bases_of_starts(self) -> None:
        """Raise ArtifactError where the shared basis is gone that adapters to start from are in: another would be made.
        Of those in a basis that is not the project's it is told."""
        started = [name for name in self.bases if self.starts.basis(name) is not None]
        folder = self.project.path(self.project.basis_path)
        if gone := [name for name in started if self.bases[name] == str(folder) and is_free(folder)]:
            fix = "Restore it, or leave out --start-from"
            raise ArtifactError(f"the basis that {some(gone)} start from is gone", where=folder, fix=fix)
        ours = OWN_BASIS, str(folder)
        others = [name for name in started if self.bases[name] not in (*ours, basis_of_task(self.project, name))]
        if others and self.starts.differ:
            logger.warning("%s: in the basis of what they start from, which is not the project's", some(others))

    @cached_property
    def base(self) -> BaseModel:
        return BaseModel.resolve(self._model or self.project.require_model())

    @cached_property
    def load_empty(self) -> Callable[..., PreTrainedModel]:
        """As that of `base`, once for all tasks of as many labels."""
        return cache(self.base.load_empty)

    def refuse_there(self, name: str, *, together: bool = False) -> None:
        """Raise OutputError where what lies in the place of a task's adapter is not to be replaced."""
        refuse_existing(self.targets[name], self.overwrite or self.resume, _THERE, kind="adapter")
        if not (self.overwrite or self.resume or together):
            refuse_begun(working_folder(self.targets[name]))

    def is_begun(self, name: str) -> bool:
        """Whether a task's adapter, or an interrupted run of it, is there."""
        return not is_free(self.targets[name]) or working_folder(self.targets[name]).exists()

    def task(self, name: str) -> TaskData:
        """The rows of a task; anew each time, for all of them may be more than memory holds."""
        return load_task(name, self.places[name])

    def checked(self, name: str) -> TaskData:
        """A task that its settings suit, and what it starts from. Raises as `load_task`, `check_requirements` and
        `require_same_task`."""
        task = self.task(name)
        check_requirements([task], self.settings_of[name])
        if start := self.starts.described(name):
            require_same_task(start, replace(task, label_order=start.labels), self.settings_of[name])
        return task

    def basis_for(self, name: str, shared: Mapping[str, Basis | None]) -> Basis | CalibrationSettings:
        """A task's basis among `shared`, those that are there, by their places; otherwise how it is made."""
        if self._basis is None and self.bases[name] == OWN_BASIS and (start := self.starts.of(name)):
            return start.load_basis()
        return shared.get(self.bases[name]) or self.project.calibration_settings(self.settings_of[name])

    def job(self, task: TaskData, basis: Basis | CalibrationSettings) -> Job:
        """What `fit` would do with `task`, to be asked what that comes to; no weights are loaded."""
        empty, out = self.load_empty(task.task_type, num_labels=task.num_labels), absolute(self.targets[task.name])
        settings = with_rate(self.settings_of[task.name], self.base, basis, task, empty)
        start = self.starts.of(task.name)
        return Job(self.base, basis, [task], [out], working_folder(out), settings, None, False, start)


def leaves_others(error: Exception) -> bool:
    """Whether the error of a task is its alone, and the next is trained all the same; under torchrun only one that all
    processes meet, as a lock's, which the first one takes for all: of others they would wait within their training."""
    return isinstance(error, PER_ITEM_ERRORS if distributed.world_size() == 1 else (BusyError, TrainingError))


def fit_tasks(
    project: Project, names: Sequence[str], settings: FitSettings, *, together: bool = False, **options: Any
) -> Iterator[tuple[str, Outcome]]:
    """Train the named tasks. The project's shared basis is calibrated first if there is none.

    The rows of all tasks are checked before anything is made, and read again for the training of each: all of them, or
    all R, may be more than memory holds. Nothing is done before the first task is asked for.

    Args:
        together: in mixed batches (`fit_together`) instead of one after another.
        options: of `FitRequest`.

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
        SettingsError: as `FitRequest`; tasks of different bases or settings, or a single one, together; the project's
            basis is not as its file has it; rows of a task may be longer than the base's learned positions reach.
    """
    distributed.start()
    request = FitRequest(project, names, settings, **options)
    for name in request.targets:
        request.refuse_there(name, together=together)
    fitting = _Fitting(request, types=_types(request))
    yield from fitting.together() if together else fitting.in_turn()


def _types(request: FitRequest) -> set[str]:
    """The types of the tasks, all of which are read to be checked. Up to ten bad ones are told at once."""
    for used in set(request.settings_of.values()):
        check_requirements([], used)  # what is wrong with no task is told once
    types, unscored, problems = set(), list[str](), Problems()
    for name in progress_bar(request.places, desc="check"):
        with problems:
            task = request.checked(name)
            types.add(task.task_type)
            if not task.splits.get(task.held_out()) and request.project.task(name).hold_out is None:
                unscored.append(name)
        if problems.is_full:
            break
    problems.raise_all("nothing was trained")
    if new := [name for name in unscored if not (request.resume and request.is_begun(name))]:
        logger.warning("No rows are held out to score %s on. %s", some(new), _HOLD_OUT)
    return types


class _Fitting:
    """The training of tasks that have been checked, of `types`: the networks and bases that they share."""

    def __init__(self, request: FitRequest, types: set[str]) -> None:
        self._request, self._base, settings = request, request.base, request.settings
        self._calibration = request.project.calibration_settings(settings)
        self._generates, self._same_dtype = types == {CAUSAL_LM}, self._calibration.dtype == settings.dtype
        self._trains = not request.resume or any(map(is_free, request.targets.values()))  # else maybe all are kept
        self._loaded = LastLoaded(dtype=settings.dtype, seed=settings.seed)
        self._options: dict[str, Any] = {"resume": request.resume, "overwrite": request.overwrite}
        self._options["measure"] = len(request.places) <= MAX_MEASURED

    def together(self) -> Iterator[tuple[str, Outcome]]:
        request, sources = self._request, set(self._request.bases.values())
        if request.starts.differ:
            what = f"together all start from one adapter, not from {PLACE}"
            raise SettingsError(what, fix="Name one, or leave --together out")
        if request.own:
            what = f"{some(sorted(request.own))} cannot be trained together with settings of their own"
            raise SettingsError(what, fix="Leave --together out, or [tasks.NAME.fit]")
        if len(request.places) < 2 or len(sources) > 1 or OWN_BASIS in sources:
            fix = "Name such tasks, or leave --together out"
            raise SettingsError("together takes two or more tasks of one shared basis", fix=fix)
        (basis,) = self._bases().values()
        tasks = {name: request.task(name) for name in request.places}
        if not self._trains:
            self._loaded.drop()  # what a basis was made with: the job loads its own, if it has to train
        network = self._loaded.get(self._base, CAUSAL_LM) if self._generates and self._trains else None
        inputs = self._base, basis, tasks, request.project.adapters_folder, request.settings
        options = {**self._options, "start": request.starts.one}
        yield from zip(tasks, train_together(*inputs, network=network, **options), strict=True)

    def in_turn(self) -> Iterator[tuple[str, Outcome]]:
        request, shared, one_is_done = self._request, self._bases(), False
        for name, target in request.targets.items():
            outcome: Outcome
            was_there = request.resume and not is_free(target)
            try:
                outcome = self._fit(name, shared)
                one_is_done = one_is_done or not was_there
            except Exception as error:
                alone = distributed.world_size() == 1
                full = alone and one_is_done and is_out_of_memory(error)  # of the first it may be the base's fault
                if len(request.targets) == 1 or not (full or leaves_others(error)):
                    raise
                logger.warning("%s is left out: %s", name, error)
                outcome = TrainingError("out of memory", where=name, fix=_BY_ITSELF)
                if isinstance(error, LoraSBError):
                    outcome = error.alone()
            if isinstance(outcome, LoraSBError):
                gc.collect()  # what the error's frames hold, if it lies in a cycle with them
            yield name, outcome

    def _fit(self, name: str, shared: Mapping[str, Basis]) -> Adapter:
        request, target = self._request, self._request.targets[name]
        task, basis = request.task(name), request.basis_for(name, shared)
        is_there = request.resume and distributed.on_main(lambda: not is_free(target))
        if is_there and (kept := request.job(task, basis).kept(overwrite=request.overwrite)):
            return kept[0]
        network = None
        if isinstance(basis, CalibrationSettings) and not self._same_dtype:
            self._loaded.drop()  # its basis takes a base of its own, in another dtype
        else:
            network = self._loaded.get(self._base, task.task_type, task.num_labels)
        options = {**self._options, "start": request.starts.of(name)}
        return fit(self._base, basis, task, target, request.settings_of[name], network=network, **options)

    def _bases(self) -> dict[str, Basis]:
        """By their places, those that are no task's own; the project's is made where there is none."""
        request, project, sources = self._request, self._request.project, self._request.bases
        if any(is_shared(project, source) for source in sources.values()):
            shared_folder(project)  # before the base is loaded
        self._require_positions()
        bases = {}
        for source in sorted(set(sources.values()) - {OWN_BASIS}):
            tasks = {name: place for name, place in request.places.items() if sources[name] == source}
            bases[source] = load_or_make(project, source, self._base, tasks, self._calibration, self._network)
        return bases

    def _network(self) -> PreTrainedModel | None:
        """What all tasks are trained on, if the basis can be made with it too."""
        if not (self._generates and self._same_dtype):
            return None
        return self._loaded.get(self._base, CAUSAL_LM)

    def _require_positions(self) -> None:
        """Raise SettingsError, with the names of the tasks whose rows may be longer than the base's positions reach."""
        task_type = CAUSAL_LM if self._generates else SEQ_CLS  # where there are both: they share a body, that has them
        self._base.require_task(task_type)
        network = self._network() if self._trains else None
        network = network or self._request.load_empty(task_type, num_labels=None)
        names, problems = defaultdict[int, list[str]](list), Problems()
        for name, settings in self._request.settings_of.items():
            names[settings.max_length].append(name)
        for max_length, of_tasks in names.items():
            with problems:
                require_positions(network, max_length, where=some(of_tasks))
        problems.raise_all("nothing was trained")
