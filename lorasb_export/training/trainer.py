"""The loop: a transformers Trainer over the R of one task, or of several tasks in mixed batches.

Its dataset is the list of optimizer steps. A step's rows, and how many labels each task has in it, are known beforehand
(`mixed.MixedSteps`), so that every task's loss is the mean over its own labels whatever the split of a step into
forward passes, tasks and processes. What goes back through the base is the sum: it becomes the mean in R's gradient,
which is float32, since a mean over thousands of labels would vanish in a float16 base.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from .. import distributed
from ..base.nf4 import as_if_with_peft
from ..data.batches import row_losses
from ..errors import OutputError, TrainingError, first_line, some
from ..files.atomic import atomic_file, fsync
from ..files.storage import write_json
from ..settings import FitSettings
from ..stack import Stack
from ..tensors import save_tensors
from .arguments import trainer_arguments
from .checkpoints import COMPLETE, RESUME, remove_old, restore_tensors
from .history import History
from .mixed import MixedSteps
from .optimizer import make_optimizer, make_scheduler
from .task_run import TaskRun
from .trackers import run_name
from .window import LossWindow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"


class RTrainer(Trainer):
    """Trains, saves and resumes R (and a classifier's head) and nothing else.

    Checkpoints hold R, the optimizer, the scheduler, the RNG and the position in the data; never the base.

    Attributes:
        told_to_stop: set by a signal, at any moment.
        stopping: the same, agreed by all processes: the run ends after this step; its evaluation is done on resume.
        diverged: task → its error. It is left out from then on; no other task's R depends on it.
    """

    told_to_stop = stopping = False
    _rates: dict[int, float]

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        runs: Sequence[TaskRun],
        stack: Stack | None,
        settings: FitSettings,
        folder: Path,
        identity: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """`stack` holds the adapters of several `runs`, in their order; the one adapter of one run is attached."""
        self.runs, self.stack, self.settings, self.identity = runs, stack, settings, identity
        self._network = network
        dtype = torch.promote_types(network.dtype, torch.float32)
        self._mixed = MixedSteps([(run.rows, run.order) for run in runs], tokenizer.pad_token_id, dtype)
        self._prefixes = [f"{run.task.name}/" if stack else "" for run in runs]
        if stack:  # one parameter for each task, in the memory that the layers' stacks are views of
            self._parameters = [[torch.nn.Parameter(values)] for values in stack.values]
        else:
            self._parameters = [[p for p in runs[0].adapter.tensors().values() if isinstance(p, torch.nn.Parameter)]]
        distributed.send_only_trained(network)
        steps = max(run.order.steps for run in runs)
        name = run_name(settings.report_to, [run.task.name for run in runs], identity)
        with as_if_with_peft(network):
            super().__init__(
                model=network,
                args=trainer_arguments(settings, folder, steps, name),
                train_dataset=range(steps),
                callbacks=list(callbacks),
            )
        self.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        self._window = LossWindow(len(runs), self.args.device)
        self._stopped: set[int] = set()
        self.diverged: dict[int, TrainingError] = {}

    # The data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process builds every step and takes its share of it: nothing is left to a distributed sampler."""
        trainer: RTrainer = weakref.proxy(self)  # which keeps the loader, as it does `Evaluations`
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=1,
            pin_memory=self.args.device.type == "cuda",
            collate_fn=lambda steps: trainer._mixed.batches(steps[0], trainer.active(steps[0])),
        )

    def active(self, step: int) -> list[int]:
        """Tasks that train in `step`: neither at their end, nor stopped early, nor diverged."""
        out = self._stopped | self.diverged.keys()
        return [k for k, run in enumerate(self.runs) if step < run.order.steps and k not in out]

    def read_log(self, k: int) -> None:
        """Read the log of task `k`, after its evaluation or a resumption: not at every step, for it may be long."""
        if self.history(k).has_stopped():
            self._stopped.add(k)
        if divergence := self.history(k).divergence():
            self.diverged[k] = self.runs[k].diverged(*divergence)

    # One step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        groups = self.optimizer.param_groups  # type: ignore[union-attr]
        self._rates = {group["task"]: group["lr"] for group in groups if group["orthogonal"]}
        losses = torch.zeros(len(self.runs), dtype=torch.float32, device=self.args.device)
        for number, batch in enumerate(inputs["batches"], 1):
            batch = {key: v.to(self.args.device, non_blocking=v.is_pinned()) for key, v in batch.items()}
            weights, tasks, labels = (batch.pop(key) for key in ("weights", "tasks", "labels"))
            if self.stack:
                self.stack.use_rows(tasks)
            last = number == len(inputs["batches"])
            with nullcontext() if last else self.accelerator.no_sync(model), self.compute_loss_context_manager():
                of_rows = row_losses(model(**batch).logits, labels)[0]
                weighted = of_rows * weights
                self.accelerator.backward(weighted.sum())
            losses.index_add_(0, tasks, weighted.detach().to(losses.dtype))
        if self.stack:
            gradients = self.stack.gradients()
            for k, (parameter,) in enumerate(self._parameters):  # without a gradient a task is left alone
                parameter.grad = gradients[k] if k in inputs["to_means"] else None
        for k, factor in inputs["to_means"].items():
            torch._foreach_mul_([p.grad for p in self._parameters[k] if p.grad is not None], factor)
            losses[k].mul_(factor)
        self._window.add(losses, inputs["step"], inputs["to_means"])
        return losses.nan_to_num(0, 0, 0).sum()  # of no use but to the Trainer, which would log its mean

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Each task's gradient by itself; returns the largest norm. A task that has ended has none."""
        limit = self.args.max_grad_norm
        training = [group for group in self._parameters if any(p.grad is not None for p in group)]
        return torch.stack([torch.nn.utils.clip_grad_norm_(group, limit) for group in training]).max()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.settings.gradient_checkpointing:
            # Switched on just now, with a gradient of the embeddings, which only the reentrant kind needs: through what
            # lies before the first R nothing goes back.
            self._network.disable_input_require_grads()
        heads = {id(p) for run in self.runs for p in run.adapter.head.values()}
        self.optimizer = make_optimizer(self._parameters, heads, self.settings, self.args.device)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.stack:
            self.stack.bind()  # the model has been prepared, and maybe copied
        steps = [run.order.steps for run in self.runs]
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = make_scheduler(optimizer, steps, self.settings)
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not reported

    # The log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, but with the loss of each task by itself."""
        if "loss" in logs:
            self._leave_out_diverged()
            logs = {"grad_norm": logs["grad_norm"]} if "grad_norm" in logs and not self.stack else {}
            for k, mean in self._window.means().items():
                if k not in self.diverged:
                    prefix = self._prefixes[k]
                    logs |= {f"{prefix}loss": mean, f"{prefix}learning_rate": self._rates[k]}
            self._window = LossWindow(len(self.runs), self.args.device)
        super().log({key: value for key, value in logs.items() if not key.endswith("_per_second")}, *args, **kwargs)

    def _leave_out_diverged(self) -> None:
        """Take out every task of which a loss since the last log was not finite, on whichever process."""
        for k, step in self._window.first_bad_steps().items():
            if k not in self.diverged:
                run = self.runs[k]
                rows = [run.rows[i]["row"] for part in run.order.step(step) for i in part]
                self._leave_out(k, "the loss", f"at step {step + 1}, on training rows {some(rows, 16)}")

    def _leave_out(self, k: int, what: str, place: str) -> None:
        """Task `k` has diverged; the others train on."""
        entry: dict[str, Any] = {"step": self.state.global_step, f"{self._prefixes[k]}diverged": (what, place)}
        self.state.log_history.append(entry)
        self.read_log(k)
        if self.stack:
            logger.warning("%s; the task is left out of this run", self.diverged[k].what)

    def history(self, k: int) -> History:
        """What was logged of task `k`."""
        return History(self.state.log_history, self._prefixes[k], self.runs[k].order, self.settings)

    # Evaluation and the best checkpoint

    def evaluate_task(self, k: int) -> None:
        """Log the valid split's loss and metrics; keep this R if it is the best so far; or be told to stop."""
        run = self.runs[k]
        assert run.validation is not None
        if self.stack:
            self.stack.use(run.task.name)
        found = run.validation.run(self._network, self.settings.batch_size, lambda: self.told_to_stop)
        if found is None:
            self.stopping = True
            return
        if not math.isfinite(found["loss"]):
            self._leave_out_diverged()  # of the training loss it is known at which step, and on which rows
            if k not in self.diverged:
                self._leave_out(k, "the valid loss", f"after step {self.state.global_step}")
            return
        self.log({f"{self._prefixes[k]}eval_{name}": value for name, value in found.items()})
        self.read_log(k)
        if self.history(k).last_is_best() and distributed.is_main():
            with atomic_file(self._best_file(k, self.state.global_step)) as path:
                save_tensors(run.adapter.tensors(), path)  # in the dtype they are trained in

    def evaluations_left(self) -> list[int]:
        """Tasks whose evaluation is due at the step at hand."""
        step, from_another = self.state.global_step, self.identity["start_sha256"] is not None
        validated = [k for k in self.active(step - 1) if self.runs[k].validation]
        return [k for k in validated if self.history(k).is_due(step, from_another=from_another)]

    def restore_best(self, k: int) -> int | None:
        """Put the best evaluated R back into task `k`'s adapter; returns its step, None without evaluations."""
        step = self.history(k).best_step()
        if step is not None:
            restore_tensors(self.runs[k].adapter, self._best_file(k, step))
        return step

    def _best_file(self, k: int, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"best-{k}-{step}.safetensors"

    def _remove_surpassed(self) -> None:
        """The best R of the last checkpoint must stay until the next one: a resumed run may not come to better ones."""
        steps = {k: self.history(k).best_step() for k in range(len(self.runs))}
        kept = {self._best_file(k, step) for k, step in steps.items() if step is not None}
        for path in set(Path(str(self.args.output_dir)).glob("best-*.safetensors")) - kept:
            path.unlink()

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        for k, run in enumerate(self.runs):
            save_tensors(run.adapter.tensors(), folder / f"adapter-{k}.safetensors")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if len(self.diverged) == len(self.runs):
            return  # the last one with a sound R stays
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch's writer of archives tells of the disk in its own words
            if type(error) is not RuntimeError:  # the device's, or of what connects the processes
                raise
            what = f"cannot write a checkpoint: {first_line(error)}"
            raise OutputError(what, where=folder, fix=RESUME) from error
        distributed.barrier()  # each process has saved its RNG
        if distributed.is_main():
            for path in folder.iterdir():
                fsync(path)
            with atomic_file(folder / COMPLETE) as path:
                finished = not self.active(self.state.global_step) and not self.evaluations_left()
                tasks = [run.task.name for run in self.runs]  # for people: a renamed one may be resumed
                write_json(path, {**self.identity, "tasks": tasks, "finished": finished})
            remove_old(folder.parent)
            self._remove_surpassed()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for k, run in enumerate(self.runs):
            restore_tensors(run.adapter, Path(resume_from_checkpoint) / f"adapter-{k}.safetensors")

    def restore_finished(self, checkpoint: Path) -> None:
        """Take R and the log from the last checkpoint of a run that has nothing left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / _STATE))
        for k in range(len(self.runs)):
            self.read_log(k)
