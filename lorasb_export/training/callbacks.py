"""What happens around the training loop: evaluations, a bar, a checkpoint at SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .. import distributed
from ..bars import progress_bar, time_left
from ..errors import Terminated

if TYPE_CHECKING:
    from .trainer import RTrainer

logger = logging.getLogger(__name__)

_SILENCE = 30  # seconds


@contextmanager
def checkpoint_at_sigterm(trainer: RTrainer) -> Iterator[None]:
    """SIGTERM ends the run after the step at hand, with a checkpoint, in Terminated.

    Several processes end after the same step, though the signal may reach them at different ones, or one of them alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "told_to_stop", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if trainer.told_to_stop or trainer.stopping:
        raise Terminated


class NothingToTrain(Exception):
    """Before the first step of a resumed run: its tasks have stopped early, or it was told to stop."""


class Evaluations(TrainerCallback):
    """Evaluates each task when it is due and at its end; ends the run when no task has anything left to do."""

    def __init__(self, trainer: RTrainer) -> None:
        # Which holds this one: in a cycle B and A would stay on the device until Python's collector comes.
        self.trainer: RTrainer = weakref.proxy(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps  # a checkpoint brings those of the run that it is of
        for k in range(len(self.trainer.runs)):
            self.trainer.read_log(k)
        self._evaluate()  # where the checkpoint was saved without waiting for it
        if self._is_over(state.global_step):
            raise NothingToTrain

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stopping = distributed.any_process(self.trainer.told_to_stop)
        log_is_due = control.should_log  # which the Trainer forgets when an evaluation is logged
        self._evaluate()
        if self._is_over(state.global_step):
            control.should_training_stop = control.should_save = True
        # A checkpoint does not hold the losses since the last log: there are none.
        control.should_log = log_is_due or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.trainer.active(state.global_step):  # as the losses since the last log may have told
            control.should_training_stop = control.should_save = True

    def _evaluate(self) -> None:
        for k in self.trainer.evaluations_left():
            if not self.trainer.stopping:
                self.trainer.evaluate_task(k)

    def _is_over(self, step: int) -> bool:
        return self.trainer.stopping or not self.trainer.active(step)


class Progress(TrainerCallback):
    """One bar with the latest losses, on stderr when that is a terminal; logged at evaluations, or after a silence."""

    bar: Any
    began: tuple[float, int]  # when, and at which step
    spoke: float

    def __init__(self, title: str) -> None:
        self.title = title
        self.losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = progress_bar(desc=f"fit {self.title}", total=state.max_steps, unit="step")
        self.spoke = time.monotonic()
        self.began = self.spoke, state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        losses, evaluated = [], False
        for key, value in (logs or {}).items():
            task, kind = key.rpartition("/")[::2]
            if kind == "loss":
                losses.append(value)
            elif kind == "eval_loss":
                evaluated, self.losses["valid loss"] = True, f"{value:.4f} of {task}" if task else f"{value:.4f}"
        if losses:
            self.losses["train loss"] = f"{sum(losses) / len(losses):.4f}"
        self.bar.set_postfix(sorted(self.losses.items()))
        if evaluated or (losses and time.monotonic() - self.spoke > _SILENCE):
            self._say(state.global_step, state.max_steps)

    def _say(self, step: int, steps: int) -> None:
        self.spoke = time.monotonic()
        since, first = self.began
        losses = ", ".join(f"{name} {loss}" for name, loss in sorted(self.losses.items()))
        if step == first:  # what it starts from was evaluated
            self.began, left = (self.spoke, step), ""
        else:
            left = f", {time_left((self.spoke - since) / (step - first) * (steps - step))}"
        logger.info("%s: step %d of %d, %s%s", self.title, step, steps, losses, left)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
