"""From a loaded base, a basis and tasks to trained R: one run, or one at each learning rate and the best of them."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..adapter import Adapter, copy_tensors
from ..base.model import BaseModel
from ..basis import Basis
from ..data.encoding import Encoded, encode_split
from ..data.task import TaskData
from ..data.trained_template import recorded_template
from ..errors import TrainingError
from ..evaluation.inference import asked_of
from ..evaluation.metrics import better
from ..files.storage import read_json
from ..layers.head import load_head
from ..settings import FitSettings
from ..stack import Stack
from .callbacks import Evaluations, NothingToTrain, Progress, checkpoint_at_sigterm
from .checkpoints import COMPLETE, drop_run, identity_of, rate_folder, to_resume
from .order import RowOrder
from .record import Entries, summary
from .row_warnings import warn_of_rows
from .task_run import TaskRun
from .trackers import run_of_its_own, tracker_callbacks
from .trainer import RTrainer
from .validation import Validation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A task as a run at one learning rate has left it; `value` is the metric's, None without valid rows."""

    run: TaskRun
    training: dict[str, Any]
    entries: Entries
    identity: Mapping[str, Any]
    value: float | None


class TrainingRuns:
    """The runs of one `fit`, in its working folder.

    Args:
        folder: takes the checkpoints of the one run, or a folder of them for each learning rate.
        events: the folder that TensorBoard's files go to.
        start: the adapter that R, and a head, start as; None for what `settings.init` says.
        overwrite: drop an interrupted run of other settings or data instead of refusing it.

    Raises:
        TrainingError: what is to be resumed had other settings or data.
        SettingsError: of several processes not all have read the same.
    """

    def __init__(
        self,
        base: BaseModel,
        network: PreTrainedModel,
        basis: Basis,
        tasks: Sequence[TaskData],
        settings: FitSettings,
        folder: Path,
        events: Path,
        start: Adapter | None,
        *,
        overwrite: bool,
    ) -> None:
        self.start = start
        self.base, self.network, self.basis, self.tasks = base, network, basis, tasks
        self.settings, self.folder, self.events = settings, folder, events
        self._fresh_head: dict[str, torch.Tensor] = {}
        distributed.require_same_inputs(self._inputs)
        self._begun = distributed.on_main(lambda: self._to_resume(overwrite))

    def _inputs(self) -> dict[str, Any]:
        """What R depends on, as this process has read it."""
        tokens = hashlib.sha256()
        for rows, _ in self._encoded:
            for row in rows:
                labels = row["labels"] if isinstance(row["labels"], list) else [row["labels"]]
                tokens.update(array("q", row["input_ids"]).tobytes() + array("d", labels).tobytes())
        identity = identity_of(self.settings, self.tasks, self.base, self.basis, self.start)
        read = {"base": [self.base.revision, self.base.fingerprint(self.basis.modules)], "tokens": tokens.hexdigest()}
        return {name.removesuffix("_sha256").replace("_", " "): value for name, value in (identity | read).items()}

    def _to_resume(self, overwrite: bool) -> dict[float, Path]:
        """As the function; of another run, which only `overwrite` drops, none."""
        try:
            return to_resume(self.folder, self.settings, self.tasks, self.base, self.basis, self.start)
        except TrainingError as other:
            if not overwrite:
                raise
            drop_run(self.folder, other)
            return {}

    def best(self) -> list[Outcome | TrainingError]:
        """Every task as the best of the learning rates has left it; or its error, where none has left it finite."""
        rates = self.settings.rates
        best: list[Outcome | TrainingError] = []
        values: list[dict[str, float | None]] = [dict.fromkeys(map(str, rates)) for _ in self.tasks]
        for rate in rates:
            try:
                found = self._at_rate(rate)
            finally:  # for the run at the next rate; and the network may be the caller's
                load_head(self.network, self._fresh_head)
            for of_task, outcome in zip(values, found, strict=True):
                if isinstance(outcome, Outcome):
                    of_task[str(rate)] = outcome.value
                elif len(rates) > 1:
                    logger.warning("Learning rate %g left out: %s", rate, outcome.what)
            best = [self._better(old, new) for old, new in zip(best or found, found, strict=True)]
        for of_task, outcome in zip(values, best, strict=True):
            if isinstance(outcome, Outcome):
                outcome.training["learning_rates"] = of_task if len(rates) > 1 else None
        return best

    def _better(self, old: Outcome | TrainingError, new: Outcome | TrainingError) -> Outcome | TrainingError:
        if isinstance(old, TrainingError):
            return new
        if isinstance(new, TrainingError) or old.value is None or new.value is None:
            return old
        return new if better(self.settings.metric, new.value, old.value) else old

    def _at_rate(self, rate: float) -> list[Outcome | TrainingError]:
        """Train all tasks to their ends, from the last checkpoint at this rate if there is one."""
        settings, folder = replace(self.settings, learning_rate=rate), rate_folder(self.folder, rate, self.settings)
        checkpoint = self._begun.get(rate)
        identity = identity_of(settings, self.tasks, self.base, self.basis, self.start)
        trainer = self._trainer(settings, folder, identity)
        if checkpoint is not None and read_json(checkpoint / COMPLETE)["finished"]:
            trainer.restore_finished(checkpoint)
        else:
            for run in trainer.runs:
                steps = run.order.steps
                logger.info("%s: %d rows, %d steps at learning rate %g", run.task.name, len(run.rows), steps, rate)
            with checkpoint_at_sigterm(trainer), run_of_its_own(settings.report_to), suppress(NothingToTrain):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        distributed.barrier()  # the first process writes the best R, which all of them read
        outcomes: list[Outcome | TrainingError] = []
        for k, run in enumerate(trainer.runs):
            history = trainer.history(k)
            entries, steps = history.entries(), history.steps_done(trainer.state.global_step)
            best = trainer.restore_best(k) if settings.keep == "best" else None
            if k in trainer.diverged or not run.has_finite_tensors():
                outcomes.append(trainer.diverged.get(k) or run.diverged("R", "at the end"))
                continue
            training = {**summary(run, entries, steps, best), "settings": asdict(settings)}
            training |= recorded_template(self.base.folder, run.task)
            training["start"] = self.start and f"{self.start.name}, sha256 {self.start.sha256[:12]}"
            if best == 0:
                logger.warning("%s: no step was better than the adapter to start from, whose R it keeps", run.task.name)
            adapter = run.adapter  # lets go of the model: the run at the next rate trains the same head
            adapter.R = {name: R.detach().cpu() for name, R in adapter.R.items()}
            adapter.head = {name: parameter.detach().cpu().clone() for name, parameter in adapter.head.items()}
            outcomes.append(Outcome(run, training, entries, identity, history.kept()))
        return outcomes

    def _trainer(self, settings: FitSettings, folder: Path, identity: Mapping[str, Any]) -> RTrainer:
        fresh: dict[str, Any] = {"scaling": settings.scaling, "init": settings.init}
        if len(self.tasks) > 1:
            adapters = [Adapter.fresh(self.basis, **fresh) for _ in self.tasks]
            stack = Stack(self.network, dict(zip((task.name for task in self.tasks), adapters, strict=True)))
        else:
            adapters, stack = [Adapter.attach(self.network, self.basis, **fresh)], None
            self._fresh_head = {name: parameter.detach().clone() for name, parameter in adapters[0].head.items()}
        if self.start is not None:
            for adapter in adapters:
                copy_tensors(self.start.tensors(), adapter)
        runs = [
            TaskRun(task, adapter, rows, RowOrder([len(row["input_ids"]) for row in rows], settings), validation)
            for task, adapter, (rows, validation) in zip(self.tasks, adapters, self._encoded, strict=True)
        ]
        title = self.tasks[0].name if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        title = f"{title} at {settings.learning_rate}" if len(self.settings.rates) > 1 else title
        events = self.events / folder.relative_to(self.folder)
        callbacks = [Progress(title), *tracker_callbacks(settings.report_to, events, self._about(settings))]
        trainer = RTrainer(self.network, self.base.tokenizer, runs, stack, settings, folder, identity, callbacks)
        trainer.add_callback(Evaluations(trainer))
        return trainer

    def _about(self, settings: FitSettings) -> dict[str, Any]:
        """What a tracker's table of runs can be sorted and filtered by."""
        basis, tasks = self.basis, [task.name for task in self.tasks]
        of_basis = {"rank": basis.rank, "modules": len(basis.modules), "basis_sha256": basis.sha256}
        of_base = {"base": self.base.name_or_path, "directions": basis.directions}
        return {"tasks": tasks, **of_base, **of_basis, **asdict(settings)}

    @cached_property
    def _encoded(self) -> list[tuple[Sequence[Encoded], Validation | None]]:
        """The training rows of every task, and how it is validated."""
        encoded = [(self._rows(task, "train"), self._validation(task)) for task in self.tasks]
        for task, (rows, _) in zip(self.tasks, encoded, strict=True):
            warn_of_rows(task, rows, self.base.tokenizer, self.network)
        return encoded

    def _rows(self, task: TaskData, split: str) -> Sequence[Encoded]:
        return encode_split(self.base, task, split, task.labels, self.settings.max_length)

    def _validation(self, task: TaskData) -> Validation | None:
        if not task.splits.get("valid"):
            return None
        encoded, tokenizer = self._rows(task, "valid"), self.base.tokenizer
        if self.settings.metric != "exact_match":
            return Validation(encoded, tokenizer)
        asked = asked_of(self.network, tokenizer, task.rows("valid"), task.unit("valid"))
        return Validation(encoded, tokenizer, asked)
