"""One training job: inputs checked, targets locked, R trained, adapter folders written."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import distributed
from ..adapter import Adapter
from ..adapter_folder import write_adapter
from ..base.device import default_device
from ..base.given import refuse_several_devices, require_first_device, require_loaded, require_positions
from ..base.model import AnyBase, BaseModel
from ..base.supported import refuse_merged
from ..basis import Basis
from ..belonging import basis_for_next
from ..calibration.capture import overview
from ..cards import card
from ..choices import NF4
from ..data.task import TaskData
from ..errors import ArtifactError, SettingsError, TrainingError, UnreadableError
from ..files.atomic import atomic_folder, discard, put_back
from ..files.kind import BASIS_CONFIG
from ..files.lock import only_writer
from ..files.output import cannot_write, is_free, refuse_existing, refuse_own_input
from ..hub.ids import parse_hub_folder
from ..settings import CalibrationSettings, FitSettings
from .checkpoints import RESUME, SAME, check_folder, open_folder, step_of, to_resume
from .finished import differences
from .record import write_training_record
from .requirements import check_requirements, require_start, two_bases
from .restored import accelerate_kept, left_as_found, random_state_kept
from .run_basis import captured_once, own_basis, with_rate
from .runs import TrainingRuns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_IN_FOUR_BITS = (
    "R is trained beside weights in four bits, and may score less beside the exact ones: merge it with "
    "--base-dtype nf4, and before you serve it compare `lorasb evaluate` with and without --dtype nf4"
)


class Job:
    """One call of `fit` or `fit_together`, from its inputs to the adapter folders; see there for the errors.

    Args:
        tasks, outs: in the same order; several are trained together.
        folder: the working folder, for checkpoints.
        start: the adapter whose R, and head, every task starts from.
    """

    def __init__(
        self,
        base: AnyBase,
        basis: str | Path | Basis | CalibrationSettings,
        tasks: Sequence[TaskData],
        outs: Sequence[Path],
        folder: Path,
        settings: FitSettings,
        network: PreTrainedModel | None,
        measure: bool,
        start: Adapter | None,
    ) -> None:
        distributed.start()
        self.outs, self.folder = outs, folder
        self._started = time.monotonic()
        check_requirements(tasks, settings)
        self.base = BaseModel.resolve(base)
        refuse_merged(self.base.folder)
        order = self.base.head_labels if start is None else start.labels  # of the head that training begins with
        self.tasks = tasks = [replace(task, label_order=order) for task in tasks]
        if distributed.world_size() == 1:
            require_first_device(default_device())
        if network is not None:
            require_loaded(network, self.base.tokenizer, settings.dtype, tasks[0].num_labels)
            if distributed.world_size() == 1:
                require_first_device(network.device)
            refuse_several_devices(network)
        if not isinstance(basis, CalibrationSettings):
            basis = basis if isinstance(basis, Basis) else Basis.load(basis)
            self.base.verify(basis.base, basis.modules)
            if start is not None:
                require_start(start, basis, tasks, settings)
                basis = basis_for_next(start, basis)
            for out in outs:
                refuse_own_input(out, basis.source)
        elif start is not None:
            raise two_bases()
        self._network, self._basis, self._measure, self._start = network, basis, measure, start
        self._damaged: dict[Path, str] = {}  # adapters that `overwrite` replaces, and what is wrong with them
        self.settings = with_rate(settings, self.base, basis, tasks[0], network)

    def finished(self, *, overwrite: bool) -> dict[str, Adapter]:
        """The adapters that a resumed `train` would find finished, by the names of their tasks; loads no network.

        Raises:
            OutputError, ArtifactError, TrainingError: `train` would refuse what is there.
        """
        with ExitStack() as locks:

            def look() -> set[str]:
                self._take(locks)
                return self._finished(True, overwrite)

            found = distributed.on_main(look)
            of_task = zip(self.tasks, self.outs, strict=True)
            return {task.name: Adapter.load(out) for task, out in of_task if task.name in found}

    def plan(self, empty: PreTrainedModel, *, resume: bool, overwrite: bool) -> tuple[str, int | None, str | None]:
        """What `train` would do with the only task: `train` it, `resume` it, from a step, or `keep` it; and why.

        Nothing is loaded or written.

        Args:
            empty: the network without weights.

        Raises:
            OutputError, ArtifactError, SettingsError, TrainingError: it would refuse to.
        """
        (task,), (out,) = self.tasks, self.outs
        if self._finished(resume, overwrite):
            return "keep", None, None
        self._require(empty)
        try:
            check_folder(self.folder, self.settings, resume, overwrite)
            step = self._step_of_run() if resume else None
        except TrainingError as other:
            if not overwrite:
                raise
            return "train", None, other.what  # that run is dropped
        if step is not None:
            return "resume", step, None
        if is_free(out):
            return "train", None, None
        differing = self._differing(task, out, overwrite) if resume else []
        return "train", None, ", ".join(differing) or "--overwrite replaces what is there"

    def _step_of_run(self) -> int | None:
        """Where the interrupted run of the only task is. Raises TrainingError: it had other settings, data or basis."""
        basis = None if isinstance(self._basis, CalibrationSettings) else self._basis
        begun = to_resume(self.folder, self.settings, self.tasks, self.base, basis, self._start)
        return step_of(list(begun.values())[-1]) if begun else None

    @torch.inference_mode(False)  # whatever the caller is in: what is loaded in there could not be trained
    @torch.enable_grad()
    def train(self, *, resume: bool, overwrite: bool) -> list[Adapter | TrainingError]:
        """Returns every task's adapter, or its error where it has diverged; if all have, the working folder stays."""
        with ExitStack() as locks:
            if distributed.on_main(lambda: self._open(locks, resume, overwrite)):
                return [Adapter.load(out) for out in self.outs]
            locks.enter_context(cannot_write(self.folder, RESUME))
            distributed.require_same_disk(self.folder)
            basis = self._basis
            if isinstance(basis, CalibrationSettings) and self._takes_another_base(basis):
                # Before the network is loaded: two at once might not fit.
                basis = own_basis(self.base, self.tasks[0], basis, self.folder, None)
            if self.settings.dtype == NF4:
                logger.warning(_IN_FOUR_BITS)
            task, settings = self.tasks[0], self.settings
            network = self._network or self.base.load(
                task.task_type, dtype=settings.dtype, num_labels=task.num_labels, seed=settings.seed
            )
            network.to(default_device())  # type: ignore[arg-type]  # as the Trainer would, when a Stack lies elsewhere
            self._require(network)
            with left_as_found(network), random_state_kept(network.device), accelerate_kept():
                return self._train(network, basis, resume=resume, overwrite=overwrite)

    def _require(self, network: PreTrainedModel) -> None:
        """Raise SettingsError where the settings ask for what `network`, with or without its weights, does not have."""
        require_positions(network, self.settings.max_length)
        if self.settings.gradient_checkpointing and not network.supports_gradient_checkpointing:
            raise SettingsError(
                f"{type(network).__name__} has no gradient checkpointing", fix="Leave gradient_checkpointing out"
            )

    def _takes_another_base(self, basis: CalibrationSettings) -> bool:
        """Whether the task's own basis is made with another network than it is trained with: in another dtype, or with
        a classifier's head that is drawn by another seed."""
        other_head = self.tasks[0].num_labels is not None and basis.seed != self.settings.seed
        return basis.dtype != self.settings.dtype or other_head

    def _open(self, locks: ExitStack, resume: bool, overwrite: bool) -> bool:
        """Take the targets and open the working folder; returns whether every adapter is finished and kept."""
        self._take(locks)
        if len(self._finished(resume, overwrite)) == len(self.outs):
            return True
        for out, what in self._damaged.items():
            logger.warning("%s is damaged (%s): it is replaced", out, what)
        with cannot_write(self.folder, RESUME):
            open_folder(self.folder, self.outs[0], self.settings, resume, overwrite)
        return False

    def _take(self, locks: ExitStack) -> None:
        for out in sorted(self.outs):
            locks.enter_context(only_writer(out))
            put_back(out)

    def _finished(self, resume: bool, overwrite: bool) -> set[str]:
        """The tasks whose adapters a resumed run finds finished; only `overwrite` admits some of other settings or
        data, or damaged ones.

        Raises where something lies in the place of one that may be neither kept nor replaced.
        """
        for out in self.outs:
            refuse_existing(out, overwrite or resume, kind="adapter")
            if overwrite:
                card.check(out)
        if not resume or (overwrite and self.folder.exists()):  # interrupted while it was replacing what is there
            return set()
        found = set()
        for task, out in zip(self.tasks, self.outs, strict=True):
            if is_free(out):
                continue
            differing = self._differing(task, out, overwrite)
            if differing and not overwrite:
                replacing = "An interrupted run was to replace it: go on with that by --overwrite --resume"
                raise TrainingError(
                    f"the adapter that is there was trained otherwise: {', '.join(differing)}",
                    where=out,
                    fix=replacing if self.folder.exists() else SAME,
                )
            if not differing:
                found.add(task.name)
        return found

    def _differing(self, task: TaskData, out: Path, overwrite: bool) -> list[str]:
        """As `differences`, but that a damaged adapter is another, where `overwrite` would replace it."""
        try:
            return differences(out, self.base, self._basis, task, self.settings, self._start)
        except ArtifactError as error:
            if not overwrite or isinstance(error, UnreadableError):
                raise
            self._damaged[out] = error.what
            return [f"damaged: {error.what}"]

    def _train(
        self, network: PreTrainedModel, basis: Basis | CalibrationSettings, *, resume: bool, overwrite: bool
    ) -> list[Adapter | TrainingError]:
        if isinstance(basis, CalibrationSettings):
            basis = own_basis(self.base, self.tasks[0], basis, self.folder, network)
        names = [task.name for task in self.tasks]
        events = self.folder.parent / "runs" / self.folder.name.removeprefix(".").removesuffix(".run")
        inputs = self.base, network, basis, self.tasks, self.settings
        runs = TrainingRuns(*inputs, self.folder, events, self._start, overwrite=overwrite)
        options = self.folder, self.settings, self._measure
        captured = [captured_once(self.base, network, basis, task, *options) for task in self.tasks]
        results: list[Adapter | TrainingError] = []
        outcomes = runs.best()
        is_lost = distributed.on_main(partial(_is_lost, basis))
        for outcome, capture, out in zip(outcomes, captured, self.outs, strict=True):
            if isinstance(outcome, TrainingError):
                results.append(outcome)
                continue
            adapter = outcome.run.adapter
            together = names if len(names) > 1 else None
            adapter.training = {**outcome.training, "together": together, "capture": capture and overview(capture)}
            written = resume and not overwrite and not is_free(out)  # before the interruption
            if is_lost and not written:
                logger.warning("%s is not there any more, or another basis: %s holds its own", basis.source, out)
                adapter.basis_source = None
            if distributed.is_main() and not written:
                seconds = round(time.monotonic() - self._started, 1)
                rates, used = list(self.settings.rates), outcome.training["settings"]  # those that decide nothing too
                made = {**outcome.identity, "settings": used, "learning_rates": rates}
                made |= {"capture": capture, "seconds": seconds, "start": self._start and self._start.name}
                with atomic_folder(out, overwrite=overwrite, kind="adapter") as folder:
                    write_adapter(adapter, folder, out)
                    write_training_record(folder, outcome.run, outcome.entries, made)
            adapter.folder = out
            results.append(adapter)
        distributed.barrier()
        if distributed.is_main() and any(isinstance(result, Adapter) for result in results):
            discard(self.folder, self.outs[0])  # the adapters are in place
        distributed.barrier()  # before another process exits with the error of a task: torchrun then ends all of them
        return results


def _is_lost(basis: Basis) -> bool:
    """Whether the folder that a basis was loaded from holds another one by now, or none."""
    if basis.source is None or parse_hub_folder(basis.source):
        return False
    config = Path(basis.source) / BASIS_CONFIG
    try:
        return basis.sha256 not in config.read_text(encoding="utf-8")  # of 10,000 tasks it has 2 MB: not parsed
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
