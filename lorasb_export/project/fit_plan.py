"""What a fit of a project's tasks would do: trained, resumed, kept or refused, and why; nothing is trained."""

from __future__ import annotations

from typing import Any

from .. import distributed
from ..base.given import require_positions
from ..basis import Basis
from ..choices import CAUSAL_LM
from ..errors import LoraSBError, TrainingError, some
from .basis import check_to_be_made, load_if_there, shared_folder
from .fit import leaves_others
from .project import OWN_BASIS
from .request import FitRequest, Kind, one_network_at_a_time


def plan_fit(request: FitRequest) -> dict[str, dict[str, Any]]:
    """What `fit_tasks` would do with each task, by its adapter and checkpoints.

    No weights are loaded, and nothing in the project is written; a base of the Hub is fetched, to be compared. What
    shows only in training (rows that are too long, a loss that is not finite) is not foreseen.

    Returns:
        of each task, by name, `action`, `step`, `why` and `out`. The action is `train`, `resume` (from `step`), `keep`
        or `refuse`, where `why` is the error, of its rows or of what is in its place; or `wait`: it would be trained or
        resumed, but that the refusal of another, which `why` names, ends the run before.

    Raises:
        LoraSBError: the base, or a basis, cannot be read, or is not what it has to be; the shared basis cannot be made
            of these tasks.
    """
    distributed.start()
    project, base = request.project, request.base
    kinds, refused = dict[str, Kind](), dict[str, LoraSBError]()
    for name in request.targets:
        try:
            kinds[name] = _check(request, name)
        except LoraSBError as error:
            refused[name] = error.alone()  # or the rows of every such task would stay in memory
    sources = [source for source in dict.fromkeys(request.bases.values()) if source != OWN_BASIS]
    shared = {source: load_if_there(project, source, base) for source in sources}
    for source in (source for source, basis in shared.items() if basis is None and not refused):
        tasks = {name: place for name, place in request.places.items() if request.bases[name] == source}
        check_to_be_made(project, base, tasks, project.calibration_settings(request.settings))
    found, ended_by = dict[str, dict[str, Any]](), list(refused)
    for name in [*one_network_at_a_time(kinds), *refused]:  # in which one that is refused ends those after it
        try:
            if name in refused:
                raise refused[name]
            action, step, why = _look(request, name, shared)
        except LoraSBError as error:
            action, step, why = "refuse", None, str(error)
            if not (ended_by or leaves_others(error)):
                ended_by = [name]
        if ended_by and action in ("train", "resume"):
            action, step, why = "wait", None, f"the run ends before, by what refuses {some(ended_by)}"
        found[name] = {"action": action, "step": step, "why": why, "out": str(request.targets[name])}
    return {name: found[name] for name in request.targets}


def _check(request: FitRequest, name: str) -> Kind:
    """What a fit does with all tasks before it trains the first; returns the task's kind."""
    request.refuse_there(name)
    task = request.checked(name)
    if task.task_type != CAUSAL_LM or request.base.generates:
        empty = request.load_empty(task.task_type, num_labels=task.num_labels)
        require_positions(empty, request.settings_of[name].max_length, where=name)
    return task.task_type, task.num_labels


def _look(request: FitRequest, name: str, shared: dict[str, Basis | None]) -> tuple[str, int | None, str | None]:
    """What a fit does when it is a task's turn."""
    to_be_made = [source for source, basis in shared.items() if basis is None]
    if request.resume and request.is_begun(name) and request.bases[name] in to_be_made:
        what = "what is there may be of the basis that a fit would make first, or of another"
        fix = "Make it with lorasb calibrate, and look again"
        raise TrainingError(what, where=shared_folder(request.project), fix=fix)
    task = request.task(name)
    request.base.require_task(task.task_type)
    empty = request.load_empty(task.task_type, num_labels=task.num_labels)
    job = request.job(task, request.basis_for(name, shared))
    return job.plan(empty, resume=request.resume, overwrite=request.overwrite)
