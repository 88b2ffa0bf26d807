"""Fit several tasks of a project: base and basis are loaded once."""

from __future__ import annotations

import gc
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..adapter import Adapter
from ..bars import progress_bar, time_left
from ..base.given import require_positions
from ..base.loaded import LastLoaded
from ..basis import Basis
from ..calibration.calibrate import MAX_MEASURED
from ..choices import CAUSAL_LM, SEQ_CLS
from ..errors import PER_ITEM_ERRORS, BusyError, LoraSBError, Problems, SettingsError, TrainingError, some
from ..files.output import is_free
from ..names import PLACE
from ..out_of_memory import is_out_of_memory
from ..settings import CalibrationSettings
from ..training.fit import fit, train_together
from ..training.requirements import check_requirements
from .basis import is_shared, load_or_make, shared_folder
from .project import OWN_BASIS
from .request import FitRequest, Kind, one_network_at_a_time

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_HOLD_OUT = "To hold some out, set hold_out = 0.1 in [data] of lorasb.toml, or in a task's table, before you train"
_BY_ITSELF = "Fit it by itself, with a smaller --batch-size or --max-length"
Fitted = Adapter | LoraSBError


def leaves_others(error: Exception) -> bool:
    """Whether the error of a task is its alone, and the next is trained all the same; under torchrun only one that all
    processes meet, as a lock's, which the first one takes for all: of others they would wait within their training."""
    return isinstance(error, PER_ITEM_ERRORS if distributed.world_size() == 1 else (BusyError, TrainingError))


def fit_tasks(request: FitRequest, *, together: bool = False) -> Iterator[tuple[str, Fitted]]:
    """Train the tasks of a request. The project's shared basis is calibrated first if there is none.

    The rows of all tasks are checked before anything is made, and read again for the training of each: all of them, or
    all R, may be more than memory holds. Nothing is done before the first task is asked for.

    Args:
        together: in mixed batches (`fit_together`) instead of one after another.

    Yields:
        each task's name and adapter, once that is written, those of one network (a type, a number of labels) one after
        another; or its error, where the task alone is at fault (its rows, a loss that is not finite, an adapter in its
        place that was trained otherwise, memory that sufficed for others): the next one is trained all the same. Of
        tasks together that is so where the loss or R is not finite; any other error ends all of them. The error of a
        single task is raised; so is, under torchrun, one that not all processes may meet: of data or of an artifact,
        which each reads for itself.

    Raises:
        OutputError: an adapter, or an interrupted run, is there already; or, even with `resume` or `overwrite`, what is
            no adapter; nothing was trained.
        DataError, MissingPackageError: see `check_requirements`; nothing was trained.
        SettingsError: tasks of different bases or settings, or a single one, together; the project's basis is not as
            its file has it; rows of a task may be longer than the base's learned positions reach.
    """
    distributed.start()
    for name in request.targets:
        request.refuse_there(name, together=together)
    fitting = _Fitting(request, kinds=_kinds(request))
    yield from fitting.together() if together else fitting.in_turn()


def _kinds(request: FitRequest) -> dict[str, Kind]:
    """The kinds of the tasks, all of which are read to be checked. Up to ten bad ones are told at once."""
    for used in set(request.settings_of.values()):
        check_requirements([], used)  # what is wrong with no task is told once
    kinds, unscored, problems = dict[str, Kind](), list[str](), Problems()
    for name in progress_bar(request.places, desc="check"):
        with problems:
            task = request.checked(name)
            kinds[name] = task.task_type, task.num_labels
            if not task.has_held_out and request.project.task(name).hold_out is None:
                unscored.append(name)
        if problems.is_full:
            break
    problems.raise_all("nothing was trained")
    if new := [name for name in unscored if not (request.resume and request.is_begun(name))]:
        logger.warning("No rows are held out to score %s on. %s", some(new), _HOLD_OUT)
    return kinds


class _Fitting:
    """The training of tasks that have been checked, of `kinds`: the networks and bases that they share."""

    _trained = 0
    _left: set[str]  # tasks that are still to be trained for sure; what is there may be kept
    _began: float

    def __init__(self, request: FitRequest, kinds: Mapping[str, Kind]) -> None:
        self._request, self._base, settings = request, request.base, request.settings
        self._calibration = request.project.calibration_settings(settings)
        self._kinds, self._same_dtype = kinds, self._calibration.dtype == settings.dtype
        self._generates = {task_type for task_type, _ in kinds.values()} == {CAUSAL_LM}
        self._trains = not request.resume or any(map(is_free, request.targets.values()))  # else maybe all are kept
        self._loaded = LastLoaded(dtype=settings.dtype, seed=settings.seed)
        self._options: dict[str, Any] = {"resume": request.resume, "overwrite": request.overwrite}
        self._options["measure"] = len(request.places) <= MAX_MEASURED

    def together(self) -> Iterator[tuple[str, Fitted]]:
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
        folder = next(iter(request.targets.values())).parent
        if any(target != folder / name for name, target in request.targets.items()):
            what = "adapters that are trained together lie in one folder, each under its task's name"
            raise SettingsError(what, fix=f"Write --out FOLDER/{PLACE}, or leave --together out")
        (basis,) = self._bases().values()
        tasks = {name: request.task(name) for name in request.places}
        if not self._trains:
            self._loaded.drop()  # what a basis was made with: the job loads its own, if it has to train
        network = self._loaded.get(self._base, CAUSAL_LM) if self._generates and self._trains else None
        inputs = self._base, basis, tasks, folder, request.settings
        options = {**self._options, "start": request.starts.one}
        yield from zip(tasks, train_together(*inputs, network=network, **options), strict=True)

    def in_turn(self) -> Iterator[tuple[str, Fitted]]:
        request, shared = self._request, self._bases()
        # One order for all processes, which compute together: rows may change while each reads them for itself.
        names = distributed.on_main(lambda: one_network_at_a_time(self._kinds))
        self._left = {name for name in names if is_free(request.targets[name]) or not request.resume}
        self._began = time.monotonic()
        for number, name in enumerate(progress_bar(names, desc="fit", leave=False) if len(names) > 1 else names, 1):
            outcome: Fitted
            try:
                outcome = self._fit(name, shared, f"{number} of {len(names)}")
            except Exception as error:
                alone = distributed.world_size() == 1
                full = alone and self._trained and is_out_of_memory(error)  # of the first it may be the base's fault
                if len(request.targets) == 1 or not (full or leaves_others(error)):
                    raise
                logger.warning("%s is left out: %s", name, error)
                outcome = TrainingError("out of memory", where=name, fix=_BY_ITSELF)
                if isinstance(error, LoraSBError):
                    outcome = error.alone()
            if isinstance(outcome, LoraSBError):
                gc.collect()  # what the error's frames hold, if it lies in a cycle with them
            self._left.discard(name)
            yield name, outcome

    def _fit(self, name: str, shared: Mapping[str, Basis], turn: str) -> Adapter:
        request, target = self._request, self._request.targets[name]
        task, basis = request.task(name), request.basis_for(name, shared)
        is_there = request.resume and distributed.on_main(lambda: not is_free(target))
        if is_there and (finished := request.job(task, basis).finished(overwrite=request.overwrite)):
            return finished[name]
        if len(request.targets) > 1:
            each = (time.monotonic() - self._began) / max(self._trained, 1)
            left = f", {time_left(each * len(self._left))}" if self._trained and self._left else ""
            logger.info("%s: %s%s", turn, name, left)
        network = None
        if isinstance(basis, CalibrationSettings) and not self._same_dtype:
            self._loaded.drop()  # its basis takes a base of its own, in another dtype
        else:
            network = self._loaded.get(self._base, task.task_type, task.num_labels)
        options = {**self._options, "start": request.starts.of(name)}
        adapter = fit(self._base, basis, task, target, request.settings_of[name], network=network, **options)
        self._trained += 1
        return adapter

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
