"""Training R: data + basis → adapter folders, one task at a time or several together, resumable at any moment."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import distributed, environment
from .adapter import Adapter
from .base import CAUSAL_LM, SEQ_CLS, BaseModel
from .basis import Basis, made_once
from .batches import encode
from .calibrate import calibrate
from .callbacks import Progress, checkpoint_at_sigterm
from .capture import capture, is_little, overview, recorded, words
from .checkpoints import (
    COMPLETE,
    RESUME,
    check_identity,
    last_complete,
    open_folder,
    refuse_run_of_others,
    together_folder,
)
from .data import TaskData, load_task, question_and_answer, refuse_single_class
from .errors import DataError, MissingPackageError, SettingsError
from .inference import fitting_metric, max_answer_tokens
from .lock import only_writer
from .network import require_positions
from .order import RowOrder
from .output import atomic_folder, cannot_write, refuse_existing, replaced_file
from .settings import RANDOM, CalibrationSettings, FitSettings
from .stack import Stack
from .storage import read_json, write_json
from .trainer import RTrainer, TaskRun
from .training_record import summary, write_record
from .validation import Validation

environment.hide_broken_packages()  # before transformers looks for them
from transformers import TrainerCallback  # noqa: E402
from transformers.integrations.integration_utils import TensorBoardCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def fit(
    model: str | BaseModel,
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
        basis: a basis folder, a Hub id, or a loaded Basis; or the settings to calibrate the task's own basis with,
            which then lies in the adapter.
        data: folder, file, Hub dataset id, or loaded task.
        resume: go on from the last complete checkpoint of an interrupted run with the same settings and data;
            from the beginning where there is none.
        network: the loaded base, where the caller already has it; its adapters are replaced.

    Raises:
        OutputError: another process is writing `out`; it exists, or an interrupted run does, and neither `resume` nor
            `overwrite` is given.
        TrainingError: other settings or data than the interrupted run's, or a loss that is not finite.
        DataError, BaseModelError, ArtifactError, SettingsError: the inputs are bad or do not belong together.
        Terminated: SIGTERM came; a checkpoint was saved.
    """
    out = Path(os.path.abspath(out))
    task = data if isinstance(data, TaskData) else load_task(out.name, data)
    run = _Run(model, basis, [task], [out], out.parent / f".{out.name}.run", settings or FitSettings(), network)
    return run.train(resume=resume, overwrite=overwrite)[0]


def fit_together(
    model: str | BaseModel,
    basis: str | Path | Basis,
    tasks: Sequence[TaskData],
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
    the base has dropout, which falls otherwise.

    Args and errors: as for `fit`; also SettingsError for classification, where each task trains a head of its own.
    """
    if any(task.task_type != CAUSAL_LM for task in tasks):
        raise SettingsError(
            "classifiers do not train together: each has its own head", fix="Fit them one after another"
        )
    folder = Path(os.path.abspath(folder))
    outs = [folder / task.name for task in tasks]
    working = together_folder(folder, [task.name for task in tasks])
    if resume and not working.exists():
        refuse_run_of_others(folder, {task.sha256 for task in tasks})
    run = _Run(model, basis, tasks, outs, working, settings or FitSettings(), network)
    return run.train(resume=resume, overwrite=overwrite)


class _Run:
    """One call of `fit` or `fit_together`, from its inputs to the adapter folders."""

    def __init__(
        self,
        model: str | BaseModel,
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
        if settings.report_to != "none" and importlib.util.find_spec(settings.report_to) is None:
            raise MissingPackageError(
                f"{settings.report_to} is not installed",
                fix=f"pip install {settings.report_to}, or leave report_to out",
            )
        for task in tasks:
            if task.task_type == SEQ_CLS and not task.regression:
                refuse_single_class(task.labels, task.source)
            if task.splits.get("valid") and settings.metric != "loss":
                fitting_metric(task, settings.metric)
        if distributed.world() > settings.batch_size:
            raise SettingsError(
                f"batch_size is {settings.batch_size}, fewer rows than the {distributed.world()} processes",
                fix="The processes share a batch: give at least one row for each",
            )
        self.base = model if isinstance(model, BaseModel) else BaseModel.resolve(model)
        self._network, self._basis = network, basis
        if isinstance(basis, CalibrationSettings):
            directions = basis.directions
        else:
            self._basis = basis if isinstance(basis, Basis) else Basis.load(basis)
            self.base.verify(self._basis.base, self._basis.modules)
            directions = self._basis.directions
        self.settings = settings.for_task(tasks[0].task_type, directions)

    def train(self, *, resume: bool, overwrite: bool) -> list[Adapter]:
        with ExitStack() as locks:
            if distributed.is_main():
                for out in sorted(self.outs):
                    locks.enter_context(only_writer(out))
            interrupted = overwrite and self.folder.exists()  # while it was replacing what is there
            if resume and not interrupted and all(out.exists() for out in self.outs):  # finished before
                return [Adapter.load(out) for out in self.outs]
            locks.enter_context(cannot_write(self.folder, RESUME))
            if not resume:
                for out in self.outs:
                    refuse_existing(out, overwrite)
            if distributed.is_main():
                open_folder(self.folder, resume, overwrite)
            distributed.wait()
            network = self._network or self._load()
            with _left_as_found(network):
                return self._train(network, resume=resume, overwrite=overwrite)

    def _train(self, network: PreTrainedModel, *, resume: bool, overwrite: bool) -> list[Adapter]:
        basis = self._own_basis(network) if isinstance(self._basis, CalibrationSettings) else self._basis
        assert isinstance(basis, Basis)
        identity = {
            "settings": asdict(self.settings),
            "data_sha256": [task.sha256 for task in self.tasks],
            "basis_sha256": basis.sha256,
            "base_fingerprint": basis.base.fingerprint,
        }
        checkpoint = last_complete(self.folder)
        if checkpoint is not None:
            check_identity(checkpoint, identity)

        captured = [self._captured(network, basis, task) for task in self.tasks]
        trainer = self._trainer(network, basis, identity)
        if checkpoint is not None and read_json(checkpoint / COMPLETE)["finished"]:
            trainer.restore_finished(checkpoint)
        else:
            with checkpoint_at_sigterm(trainer):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        for k, found in enumerate(captured):
            run, history = trainer.runs[k], trainer.history(k)
            entries = history.entries()
            best = trainer.restore_best(k) if self.settings.keep == "best" else None
            adapter = run.adapter
            adapter.training = {
                **summary(run, entries, history.steps_done(trainer.state.global_step), best),
                "together": [task.name for task in self.tasks] if len(self.tasks) > 1 else None,
                "settings": asdict(self.settings),
                "capture": found and overview(found),
            }
            written = resume and not overwrite and self.outs[k].exists()  # before the interruption
            if distributed.is_main() and not written:
                seconds = round(time.monotonic() - self._started, 1)
                made = {**identity, "capture": found, "seconds": seconds}
                with atomic_folder(self.outs[k], overwrite=overwrite) as folder:
                    adapter.write_into(folder, self.outs[k])
                    write_record(folder, run, entries, made)
            adapter.folder = self.outs[k]
            adapter.R = {name: R.detach() for name, R in adapter.R.items()}  # lets go of the model
            adapter.head = {name: parameter.detach() for name, parameter in adapter.head.items()}
        distributed.wait()
        if distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)  # the adapters are in place
        return [run.adapter for run in trainer.runs]

    def _load(self) -> PreTrainedModel:
        task = self.tasks[0]
        return self.base.load(
            task.task_type, dtype=self.settings.dtype, num_labels=task.num_labels, seed=self.settings.seed
        )

    def _own_basis(self, network: PreTrainedModel) -> Basis:
        """The task's own basis, calibrated once for all resumptions of this run."""
        assert isinstance(self._basis, CalibrationSettings)
        (task,) = self.tasks
        made_from = json.dumps([asdict(self._basis), task.sha256])
        folder = self.folder / f"basis-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
        same = network if self._basis.dtype == self.settings.dtype else None
        basis = made_once(folder, partial(calibrate, self.base, {task.name: task}, self._basis, network=same))
        return replace(basis, source=None)  # it will lie in the adapter

    def _captured(self, network: PreTrainedModel, basis: Basis, task: TaskData) -> dict[str, Any] | None:
        """How much of the task's gradient the basis holds: recorded at calibration, or measured once for this run.

        None in a random basis, which has nothing to do with it.
        """
        if basis.directions == RANDOM:
            return None
        path = self.folder / f"capture-{task.sha256[:16]}.json"
        found = recorded(basis, task)
        if found is None and path.exists():
            found = read_json(path)
        elif found is None:
            found = capture(self.base, network, basis, task)
            distributed.wait()
            if distributed.is_main():
                with replaced_file(path) as temporary:
                    write_json(temporary, found)
        if is_little(found):
            logger.warning(
                "%s: %s. It will learn more slowly: try a higher --learning-rate, or --basis own",
                task.name,
                words(overview(found)),
            )
        return found

    def _trainer(self, network: PreTrainedModel, basis: Basis, identity: Mapping[str, Any]) -> RTrainer:
        settings, tokenizer = self.settings, self.base.load_tokenizer()
        require_positions(network, settings.max_length)
        rows = [encode(t.rows("train"), tokenizer, t.task_type, t.labels, settings.max_length) for t in self.tasks]
        start: dict[str, Any] = {"scaling": settings.scaling, "init": settings.init}
        if len(self.tasks) > 1:
            adapters = {task.name: Adapter.start(basis, **start) for task in self.tasks}
            stack = Stack(network, adapters)
        else:
            (task,), stack = self.tasks, None
            adapters = {task.name: Adapter.attach(network, basis, **start)}
        runs = [
            TaskRun(
                task,
                adapters[task.name],
                encoded,
                RowOrder([len(row["input_ids"]) for row in encoded], settings),
                self._validation(task, tokenizer),
            )
            for task, encoded in zip(self.tasks, rows, strict=True)
        ]
        callbacks = [Progress(self.tasks), *self._reporters()]
        return RTrainer(network, tokenizer, runs, stack, settings, self.folder, identity, callbacks)

    def _reporters(self) -> list[TrainerCallback]:
        """TensorBoard's files go beside the adapters, in `runs/`: the Trainer's own place is removed at the end."""
        if self.settings.report_to != "tensorboard" or not distributed.is_main():
            return []
        from torch.utils.tensorboard import SummaryWriter

        place = self.outs[0].parent / "runs" / "+".join(task.name for task in self.tasks)
        return [TensorBoardCallback(SummaryWriter(str(place)))]

    def _validation(self, task: TaskData, tokenizer: PreTrainedTokenizerBase) -> Validation | None:
        rows, settings = task.splits.get("valid"), self.settings
        if not rows:
            if settings.patience is not None:
                raise DataError(
                    f"task {task.name} has no valid rows, so patience has nothing to count",
                    where=task.source,
                    fix="Add valid.jsonl, or leave patience out",
                )
            return None
        encoded = encode(rows, tokenizer, task.task_type, task.labels, settings.max_length)
        if settings.metric != "exact_match":
            return Validation(encoded, tokenizer, every=settings.evaluate_every)
        asked = [question_and_answer(row, f"valid row {number}") for number, row in enumerate(rows, 1)]
        return Validation(encoded, tokenizer, asked, max_answer_tokens(tokenizer, rows), settings.evaluate_every)


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
