"""Training R: data + basis → adapter folders, one task at a time or several together, resumable at any moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..adapter import Adapter
from ..base.model import AnyBase
from ..basis import Basis
from ..choices import CAUSAL_LM
from ..data.source import AnySource
from ..data.task import TaskData, load_task, load_tasks
from ..errors import Problems, SettingsError, TrainingError
from ..files.output import is_free
from ..files.storage import absolute
from ..settings import CalibrationSettings, FitSettings
from .checkpoints import TOGETHER, refuse_run_of_others, runs_begun, together_folder, working_folder
from .job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit(
    base: AnyBase,
    basis: str | Path | Basis | CalibrationSettings,
    data: AnySource | TaskData,
    out: str | Path,
    settings: FitSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: PreTrainedModel | None = None,
    measure: bool = True,
    start: Adapter | None = None,
) -> Adapter:
    """Train one task's R in a frozen basis and write the adapter folder `out`.

    While it runs, checkpoints lie in the hidden sibling `.NAME.run`; it is removed once `out` is in place.

    Args:
        base: folder, Hub id, or a resolved BaseModel.
        basis: a basis folder, a Hub id, or a loaded Basis; or the settings to calibrate the task's own basis with,
            which then lies in the adapter.
        data: folder, file, Hub dataset id, or loaded task. Its name is that of the folder `out`, or the loaded
            task's own.
        resume: go on from the last complete checkpoint of an interrupted run with the same settings (but for
            `gradient_checkpointing`, `checkpoint_every` and `report_to`) and data;
            from the beginning where there is none. An adapter that they made is kept. A run of others is refused, or
            with `overwrite` dropped.
        network: the loaded base, as `BaseModel.load` gives it, where the caller already has it; its weights are not
            compared with `base`. It is returned in eval mode, without an adapter (`Adapter.inject` puts the
            new one on), with `requires_grad` flags and classifier head restored. It is moved to the first GPU, if any.
            If `resume` finds a finished run, it is not touched.
        measure: how much of the task's gradient the basis holds, where its calibration has not. That is a pass over
            some rows with the gradients of whole weights, and an SVD of each module.
        start: an adapter of the same basis, kind of task and labels to go on from: R, and a classifier's head, start as
            its own, and `settings.init` says nothing.

    Returns:
        the adapter that was written, with `folder`, R on the CPU, and in `training` what the run found: `steps`,
        `best_step`, `train_loss`, `valid_loss`, `valid_metrics`, `settings` with the learning rate it took, `capture`,
        `rows` and more. One that `resume` found finished is loaded.

    Raises:
        OutputError: another process is writing `out`; it exists, or an interrupted run does, and neither `resume` nor
            `overwrite` is given; or it holds the basis.
        TrainingError: other settings or data than those of the run, or the adapter, that `resume` finds; a loss or R
            that is not finite.
        DataError, BaseModelError, ArtifactError, SettingsError: the inputs are bad or do not belong together.
        MissingPackageError: `report_to` names one that is not installed.
        Terminated: SIGTERM came; a checkpoint was saved.
    """
    out = absolute(out)
    task = data if isinstance(data, TaskData) else load_task(out.name, data)
    working, settings = working_folder(out), settings or FitSettings()
    job = Job(base, basis, [task], [out], working, settings, network, measure, start)
    (outcome,) = job.train(resume=resume, overwrite=overwrite)
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def fit_together(
    base: AnyBase,
    basis: str | Path | Basis,
    tasks: Sequence[TaskData] | Mapping[str, AnySource | TaskData],
    folder: str | Path,
    settings: FitSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: PreTrainedModel | None = None,
    measure: bool = True,
    start: Adapter | None = None,
) -> list[Adapter]:
    """Train several tasks in one frozen basis at once, in mixed batches, and write `folder`/TASK for each.

    Every step takes `batch_size` rows of every task through one forward pass. Each task's loss is averaged over its
    own rows and each has its own optimizer state, gradient clip and schedule: its R is that of `fit` alone, unless
    the base has dropout, whose masks then differ.

    Args and errors: as for `fit`; also SettingsError for classification, where each task trains a head of its own. A
    task whose loss or R is not finite is left out: TrainingError comes when the others are trained and written.

    Args:
        tasks: loaded tasks of different names, or task name → folder, file, Hub dataset id or loaded task.

    Returns:
        the adapters in the order of `tasks`.
    """
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "network": network, "measure": measure}
    options["start"] = start
    outcomes = train_together(base, basis, tasks, folder, settings or FitSettings(), **options)
    adapters = [outcome for outcome in outcomes if isinstance(outcome, Adapter)]
    failed = Problems(outcome for outcome in outcomes if isinstance(outcome, TrainingError))
    failed.raise_all(f"{len(adapters)} of {len(outcomes)} adapters were written")
    return adapters


def train_together(
    base: AnyBase,
    basis: str | Path | Basis,
    tasks: Sequence[TaskData] | Mapping[str, AnySource | TaskData],
    folder: str | Path,
    settings: FitSettings,
    *,
    resume: bool,
    overwrite: bool,
    network: PreTrainedModel | None,
    measure: bool,
    start: Adapter | None,
) -> list[Adapter | TrainingError]:
    """As `fit_together`, with the error of a task that was left out in the place of its adapter."""
    if not tasks:
        raise SettingsError("no task to fit", fix="Give at least one")
    tasks = list(load_tasks(tasks)) if isinstance(tasks, Mapping) else tasks
    if any(task.task_type != CAUSAL_LM for task in tasks):
        raise SettingsError(
            "classifiers do not train together: each has its own head", fix="Fit them one after another"
        )
    folder = absolute(folder)
    distributed.start()
    ordered = sorted(tasks, key=lambda task: task.name)  # the same run in whatever order they are named
    apart = distributed.on_main(lambda: _finished_before(folder, ordered) if resume else set())
    before, others = ([task for task in ordered if (task.name in apart) == there] for there in (True, False))

    def job(group: Sequence[TaskData]) -> Job:
        working = together_folder(folder, group)
        if resume and not working.exists():
            refuse_run_of_others(folder, group)
        outs = [folder / task.name for task in group]
        return Job(base, basis, group, outs, working, settings, network, measure, start)

    done: dict[str, Adapter | TrainingError] = {}
    if before:
        done |= job(before).finished(overwrite=overwrite)
    replaced = [task for task in before if task.name not in done]
    # A group is found again by its tasks: were those to be replaced interrupted before the others are done, all of them
    # would be taken for one.
    for group in filter(None, (others, replaced)):
        outcomes = job(group).train(resume=resume, overwrite=overwrite)
        done |= {task.name: outcome for task, outcome in zip(group, outcomes, strict=True)}
    return [done[task.name] for task in tasks]


def _finished_before(folder: Path, tasks: Sequence[TaskData]) -> set[str]:
    """The tasks whose adapters are there and whose run is over, so that the others train without them."""
    interrupted = {sha256 for run in runs_begun(folder, TOGETHER).values() for sha256 in run["data_sha256"]}
    return {task.name for task in tasks if task.sha256 not in interrupted and not is_free(folder / task.name)}
