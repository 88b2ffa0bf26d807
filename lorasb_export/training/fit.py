"""Training R: data + basis → adapter folders, one task at a time or several together, resumable at any moment."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import distributed
from ..adapter import Adapter
from ..base import CAUSAL_LM, SEQ_CLS, AnyBase, BaseModel
from ..basis import Basis
from ..calibration.capture import overview
from ..data import TaskData, load_task, load_tasks, refuse_single_class
from ..errors import DataError, MissingPackageError, SettingsError, TrainingError
from ..evaluation import fitting_metric
from ..lock import only_writer
from ..network import refuse_spread, require_dtype, require_outputs, require_positions
from ..output import atomic_folder, cannot_write, expanded, refuse_existing, refuse_own_input
from ..settings import CalibrationSettings, FitSettings
from .checkpoints import (
    RESUME,
    SAME,
    open_folder,
    refuse_run_of_others,
    together_folder,
)
from .finished import differences
from .record import write_record
from .run_basis import captured_once, own_basis, share_of_layers
from .runs import TrainingRuns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def fit(
    model: AnyBase,
    basis: str | Path | Basis | CalibrationSettings,
    data: str | Path | TaskData,
    out: str | Path,
    settings: FitSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: PreTrainedModel | None = None,
) -> Adapter:
    """Train one task's R in a frozen basis and write the adapter folder `out`.

    While it runs, checkpoints lie in the hidden sibling `.NAME.run`; it is removed once `out` is in place.

    Args:
        model: folder, Hub id, or a resolved BaseModel.
        basis: a basis folder, a Hub id, or a loaded Basis; or the settings to calibrate the task's own basis with,
            which then lies in the adapter.
        data: folder, file, Hub dataset id, or loaded task. Its name is that of the folder `out`, or the loaded
            task's own.
        resume: go on from the last complete checkpoint of an interrupted run with the same settings and data;
            from the beginning where there is none. An adapter that they made is kept.
        network: the loaded base, as `BaseModel.load` gives it, where the caller already has it; its weights are not
            compared with `model`. It ends with the new adapter in place of its own, in eval mode; a classifier's head
            is as it was. `remove` takes the adapter off.

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
        Terminated: SIGTERM came; a checkpoint was saved.
    """
    out = Path(os.path.abspath(expanded(out)))
    task = data if isinstance(data, TaskData) else load_task(out.name, data)
    run = _Run(model, basis, [task], [out], out.parent / f".{out.name}.run", settings or FitSettings(), network)
    return run.train(resume=resume, overwrite=overwrite)[0]


def fit_together(
    model: AnyBase,
    basis: str | Path | Basis,
    tasks: Sequence[TaskData] | Mapping[str, str | Path | TaskData],
    folder: str | Path,
    settings: FitSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: PreTrainedModel | None = None,
) -> list[Adapter]:
    """Train several tasks in one frozen basis at once, in mixed batches, and write `folder`/TASK for each.

    Every step takes `batch_size` rows of every task through one forward pass. Each task's loss is averaged over its
    own rows and each has its own optimizer state, gradient clip and schedule: its R is that of `fit` alone, unless
    the base has dropout, whose masks then differ.

    Args and errors: as for `fit`; also SettingsError for classification, where each task trains a head of its own.

    Args:
        tasks: loaded tasks of different names, or task name → folder, file, Hub dataset id or loaded task.

    Returns:
        the adapters in the order of `tasks`.
    """
    if not tasks:
        raise SettingsError("no task to fit", fix="Give at least one")
    tasks = load_tasks(tasks) if isinstance(tasks, Mapping) else tasks
    if any(task.task_type != CAUSAL_LM for task in tasks):
        raise SettingsError(
            "classifiers do not train together: each has its own head", fix="Fit them one after another"
        )
    folder = Path(os.path.abspath(expanded(folder)))
    ordered = sorted(tasks, key=lambda task: task.name)  # the same run in whatever order they are named
    outs = [folder / task.name for task in ordered]
    working = together_folder(folder, [task.name for task in tasks])
    if resume and not working.exists():
        refuse_run_of_others(folder, {task.sha256 for task in tasks})
    run = _Run(model, basis, ordered, outs, working, settings or FitSettings(), network)
    trained = dict(zip(outs, run.train(resume=resume, overwrite=overwrite), strict=True))
    return [trained[folder / task.name] for task in tasks]


class _Run:
    """One call of `fit` or `fit_together`, from its inputs to the adapter folders."""

    def __init__(
        self,
        model: AnyBase,
        basis: str | Path | Basis | CalibrationSettings,
        tasks: Sequence[TaskData],
        outs: Sequence[Path],
        folder: Path,
        settings: FitSettings,
        network: PreTrainedModel | None,
    ) -> None:
        distributed.start()
        self.tasks, self.outs, self.folder = tasks, outs, folder
        self._started = time.monotonic()
        require_fitting(tasks, settings)
        self.base = BaseModel.resolve(model)
        self.base.refuse_merged()
        if network is not None:
            refuse_spread(network)
            require_dtype(network, settings.dtype)
            require_outputs(network, tasks[0].num_labels)
        if not isinstance(basis, CalibrationSettings):
            basis = basis if isinstance(basis, Basis) else Basis.load(basis)
            self.base.verify(basis.base, basis.modules)
            for out in outs:
                refuse_own_input(out, basis.source)
        self._network, self._basis = network, basis
        if settings.learning_rate is None:
            share = share_of_layers(self.base, basis, tasks[0], network) if settings.optimizer == "muon" else 1.0
            settings = settings.for_task(tasks[0].task_type, basis.directions, basis.rank, share)
        self.settings = settings

    def train(self, *, resume: bool, overwrite: bool) -> list[Adapter]:
        with ExitStack() as locks:
            if distributed.decided(lambda: self._open(locks, resume, overwrite)):
                return [Adapter.load(out) for out in self.outs]
            locks.enter_context(cannot_write(self.folder, RESUME))
            distributed.require_same_disk(self.folder)
            basis = self._basis
            if isinstance(basis, CalibrationSettings) and basis.dtype != self.settings.dtype:
                # Before the network is loaded, as it takes a base of its own: two at once might not fit.
                basis = own_basis(self.base, self.tasks[0], basis, self.folder, None)
            network = self._network or self._load()
            require_positions(network, self.settings.max_length)
            if self.settings.gradient_checkpointing and not network.supports_gradient_checkpointing:
                raise SettingsError(
                    f"{type(network).__name__} has no gradient checkpointing", fix="Leave gradient_checkpointing out"
                )
            with _left_as_found(network), _random_state_kept(network.device):
                return self._train(network, basis, resume=resume, overwrite=overwrite)

    def _open(self, locks: ExitStack, resume: bool, overwrite: bool) -> bool:
        """Take the targets and open the working folder; returns whether every adapter is finished and kept."""
        for out in sorted(self.outs):
            locks.enter_context(only_writer(out))
        interrupted = overwrite and self.folder.exists()  # while it was replacing what is there
        if resume and not interrupted and self._finished(overwrite):
            return True
        if not resume:
            for out in self.outs:
                refuse_existing(out, overwrite)
        with cannot_write(self.folder, RESUME):
            open_folder(self.folder, self.settings, resume, overwrite)
        return False

    def _finished(self, overwrite: bool) -> bool:
        """Whether every adapter is there; only `overwrite` admits one of other settings or data."""
        there = [(task, out) for task, out in zip(self.tasks, self.outs, strict=True) if out.exists()]
        for task, out in there:
            differing = differences(out, self.base, self._basis, task, self.settings)
            if differing and overwrite:
                return False
            if differing:
                replacing = "An interrupted run was to replace it: go on with that by --overwrite --resume"
                raise TrainingError(
                    f"the adapter that is there was trained otherwise: {', '.join(differing)}",
                    where=out,
                    fix=replacing if self.folder.exists() else SAME,
                )
        return len(there) == len(self.outs)

    def _train(
        self, network: PreTrainedModel, basis: Basis | CalibrationSettings, *, resume: bool, overwrite: bool
    ) -> list[Adapter]:
        if isinstance(basis, CalibrationSettings):
            basis = own_basis(self.base, self.tasks[0], basis, self.folder, network)
        names = [task.name for task in self.tasks]
        events = self.folder.parent / "runs" / self.folder.name.removeprefix(".").removesuffix(".run")
        runs = TrainingRuns(self.base, network, basis, self.tasks, self.settings, self.folder, events)
        captured = [captured_once(self.base, network, basis, task, self.folder) for task in self.tasks]
        outcomes = runs.best()
        for outcome, capture, out in zip(outcomes, captured, self.outs, strict=True):
            adapter = outcome.run.adapter
            together = names if len(names) > 1 else None
            adapter.training = {**outcome.training, "together": together, "capture": capture and overview(capture)}
            written = resume and not overwrite and out.exists()  # before the interruption
            if distributed.is_main() and not written:
                seconds = round(time.monotonic() - self._started, 1)
                rates = list(self.settings.rates)
                made = {**outcome.identity, "learning_rates": rates, "capture": capture, "seconds": seconds}
                with atomic_folder(out, overwrite=overwrite) as folder:
                    adapter.write_into(folder, out)
                    write_record(folder, outcome.run, outcome.entries, made)
            adapter.folder = out
        distributed.wait()
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)  # the adapters are in place
        return [outcome.run.adapter for outcome in outcomes]

    def _load(self) -> PreTrainedModel:
        task = self.tasks[0]
        return self.base.load(
            task.task_type, dtype=self.settings.dtype, num_labels=task.num_labels, seed=self.settings.seed
        )


def require_fitting(tasks: Sequence[TaskData], settings: FitSettings) -> None:
    """Raise where `settings` ask for what this machine or one of `tasks` does not have. Loads no model.

    Raises:
        DataError: every row of a classifier has one label; a task has no valid rows, and they are needed.
        MissingPackageError: the reporter is not installed.
        SettingsError: the metric does not fit the rows; a batch has fewer rows than there are processes.
    """
    if settings.report_to != "none" and importlib.util.find_spec(settings.report_to) is None:
        raise MissingPackageError(
            f"{settings.report_to} is not installed",
            fix=f"pip install {settings.report_to}, or leave report_to out",
        )
    if distributed.world() > settings.batch_size:
        raise SettingsError(
            f"batch_size is {settings.batch_size}, fewer rows than the {distributed.world()} processes",
            fix="The processes share a batch: give at least one row for each",
        )
    for task in tasks:
        if task.task_type == SEQ_CLS and not task.regression:
            refuse_single_class(task.labels, task.source)
        if task.splits.get("valid"):
            if settings.metric != "loss":
                fitting_metric(task, settings.metric)
        else:
            _refuse_without_valid_rows(task, settings)


def _refuse_without_valid_rows(task: TaskData, settings: FitSettings) -> None:
    for asked, what, fix in (
        (settings.patience is not None, "patience has nothing to count", "leave patience out"),
        (len(settings.rates) > 1, "learning rates cannot be compared", "give one rate"),
        (settings.metric != "loss", f"{settings.metric} cannot be measured", "leave metric out"),
    ):
        if asked:
            raise DataError(
                f"task {task.name} has no valid rows, so {what}", where=task.source, fix=f"Add valid.jsonl, or {fix}"
            )


@contextmanager
def _left_as_found(network: PreTrainedModel) -> Iterator[None]:
    """The Trainer sets these on the model and leaves them; the network may be the caller's, or the next task's."""
    caches, checkpoints = getattr(network.config, "use_cache", None), network.is_gradient_checkpointing
    try:
        yield
    finally:
        network.eval()
        if caches is not None:
            network.config.use_cache = caches
        if network.is_gradient_checkpointing and not checkpoints:
            network.gradient_checkpointing_disable()


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """The Trainer seeds python, numpy and torch, and so whatever the caller draws after it."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
