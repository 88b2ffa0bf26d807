"""What a fit of a project's tasks would do: trained, resumed, kept or refused, and why; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .. import distributed
from ..base.given import require_positions
from ..base.model import BaseModel
from ..choices import CAUSAL_LM
from ..data.task import load_task
from ..errors import LoraSBError, TrainingError, some
from ..files.output import is_free
from ..settings import FitSettings
from ..training.checkpoints import working_folder
from ..training.fit import job_without_network
from ..training.requirements import check_requirements
from .basis import load_if_there, shared_folder
from .fit import inputs_of, leaves_others, refuse_there
from .project import OWN_BASIS, Project


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
) -> dict[str, dict[str, Any]]:
    """What `fit_tasks` would do with each task, by its adapter and checkpoints.

    No weights are loaded, and nothing in the project is written; a base of the Hub is fetched, to be compared. What
    shows only in training (rows that are too long, a loss that is not finite) is not foreseen.

    Args: as for `fit_tasks`.

    Returns:
        of each task, by name, `action`, `step`, `why` and `out`. The action is `train`, `resume` (from `step`), `keep`
        or `refuse`, where `why` is the error, of its rows or of what is in its place; or `wait`: it would be trained or
        resumed, but that the refusal of another, which `why` names, ends the run before.

    Raises:
        LoraSBError: the base, a basis or the adapter to start from cannot be read, or is not what it has to be;
            `data` or `out` with several tasks.
    """
    distributed.start()
    targets, places, sources, started = inputs_of(project, names, data, basis, start, out)
    base = BaseModel.resolve(model or project.require_model())
    settings_of = {name: (own or {}).get(name, settings) for name in names}
    empty = cache(base.load_empty)

    def check(name: str) -> None:
        """What a fit does with all tasks before it trains the first."""
        refuse_there(targets[name], together=False, resume=resume, overwrite=overwrite)
        task = load_task(name, places[name])
        check_requirements([task], settings_of[name])
        if task.task_type == CAUSAL_LM and base.generates:
            require_positions(empty(CAUSAL_LM, num_labels=None), settings_of[name].max_length)

    refused = {}
    for name in names:
        try:
            check(name)
        except LoraSBError as error:
            refused[name] = error
    load = cache(lambda source: None if source == OWN_BASIS else load_if_there(project, source, base))
    for source in sources.values():
        load(source)

    def look(name: str) -> tuple[str, int | None, str | None]:
        """What a fit does when it is a task's turn."""
        if name in refused:
            raise refused[name]
        there = not is_free(targets[name]) or working_folder(targets[name]).exists()
        if resume and there and sources[name] != OWN_BASIS and not load(sources[name]):
            raise TrainingError(
                "what is there may be of the basis that a fit would make first, or of another",
                where=shared_folder(project),
                fix="Make it with lorasb calibrate, and look again",
            )
        task, of_task = load_task(name, places[name]), settings_of[name]
        base.require_task(task.task_type)
        without_weights = empty(task.task_type, num_labels=task.num_labels)
        made = load(sources[name]) or project.calibration_settings(of_task)
        job = job_without_network(base, made, task, targets[name], of_task, started, without_weights)
        return job.foreseen(without_weights, resume=resume, overwrite=overwrite)

    found, ended_by = {}, list(refused)
    for name in names:
        try:
            action, step, why = look(name)
        except LoraSBError as error:
            action, step, why = "refuse", None, str(error)
            if not (ended_by or leaves_others(error)):
                ended_by = [name]
        if ended_by and action in ("train", "resume"):
            action, step, why = "wait", None, f"the run ends before, by what refuses {some(ended_by)}"
        found[name] = {"action": action, "step": step, "why": why, "out": str(targets[name])}
    return found
