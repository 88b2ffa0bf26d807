"""What settings ask for and a machine or a task may not have."""

from __future__ import annotations

from collections.abc import Sequence

from .. import distributed
from ..adapter import Adapter
from ..basis import Basis
from ..belonging import check_same_basis
from ..choices import SEQ_CLS
from ..data.task import TaskData, refuse_single_class
from ..environment import accelerate_uses, require_packages
from ..errors import DataError, SettingsError, some
from ..evaluation.evaluate import metric_for, require_same_kind
from ..settings import FitSettings
from .trackers import refuse_upload_of_base


def _check_launcher() -> None:
    """Raise SettingsError where `accelerate launch` asks for a way to shard: the Trainer would put other tensors in the
    place of R."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if accelerate_uses(name):
            fix = "Start it by torchrun, or attach an adapter in a loop of your own"
            raise SettingsError(f"fit does not train under {name}", where=f"ACCELERATE_USE_{name}", fix=fix)


def check_requirements(tasks: Sequence[TaskData], settings: FitSettings) -> None:
    """Raise where `settings` ask for what this machine or one of `tasks` does not have. Loads no model.

    Raises:
        DataError: every row of a classifier has one label; a task has no valid rows, and they are needed.
        MissingPackageError: the reporter is not installed.
        SettingsError: the metric does not fit the rows; a batch has fewer rows than there are processes; the reporter
            would upload the base.
    """
    _check_launcher()
    if settings.report_to != "none":
        require_packages(settings.report_to, fix=f"pip install {settings.report_to}, or leave report_to out")
        refuse_upload_of_base(settings.report_to)
    if distributed.world_size() > settings.batch_size:
        raise SettingsError(
            f"batch_size is {settings.batch_size}, fewer rows than the {distributed.world_size()} processes",
            fix="The processes share a batch: give at least one row for each",
        )
    for task in tasks:
        check_rows(task, settings)


def check_rows(task: TaskData, settings: FitSettings) -> None:
    """Raise where `settings` ask for what the rows of a task do not have.

    Raises:
        DataError: every row of a classifier has one label; the task has no valid rows, and they are needed.
        SettingsError: the metric does not fit the rows.
    """
    if task.task_type == SEQ_CLS and not task.regression:
        refuse_single_class(task.labels, task.source)
    if task.splits.get("valid"):
        if settings.metric != "loss":
            metric_for(task, settings.metric)
    else:
        _refuse_without_valid_rows(task, settings)


def two_bases() -> SettingsError:
    """The error of what is to start from an adapter, and in a basis of its own."""
    what = "R of another basis to start from, and a basis of its own: the adapter to start from fixes the basis"
    return SettingsError(what, fix="Leave out either")


def require_start(start: Adapter, basis: Basis, tasks: Sequence[TaskData], settings: FitSettings) -> None:
    """Raise where tasks cannot go on from the adapter `start`.

    Raises:
        ArtifactError: it was trained in another basis.
        DataError: it is for another kind of task, or for other labels.
        SettingsError: its scaling is another.
    """
    check_same_basis(start, basis)
    for task in tasks:
        require_same_task(start, task, settings)


def require_same_task(start: Adapter, task: TaskData, settings: FitSettings) -> None:
    """As `require_start`, but for the basis; R and head need not be there."""
    require_same_kind(start, task)
    if task.labels != start.labels:
        what = f"the data has labels {some(task.labels)}, the adapter to start from {some(start.labels)}"
        raise DataError(what, where=task.source, fix="Start from an adapter of the same labels")
    if settings.scaling != start.scaling:
        what = f"scaling is {settings.scaling:g}, and {start.scaling:g} in the adapter to start from"
        raise SettingsError(what, where=start.folder, fix=f"Set scaling = {start.scaling:g}")


def _refuse_without_valid_rows(task: TaskData, settings: FitSettings) -> None:
    for asked, what, fix in (
        (settings.patience is not None, "patience has nothing to count", "leave patience out"),
        (len(settings.rates) > 1, "learning rates cannot be compared", "give one rate"),
        (settings.metric != "loss", f"{settings.metric} cannot be measured", "leave metric out"),
    ):
        if asked:
            fix = f"Add valid.jsonl or hold_out, or {fix}"
            raise DataError(f"task {task.name} has no valid rows, so {what}", where=task.source, fix=fix)
