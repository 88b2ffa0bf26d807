"""The log of one task: its curve, its best evaluation, and whether patience with it has run out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.metrics import better
from ..settings import FitSettings
from .order import RowOrder


@dataclass(frozen=True)
class History:
    """What a Trainer logged, read for one of its tasks.

    Attributes:
        log: the Trainer's `log_history`.
        prefix: what the keys of this task begin with.
        order: the task's rows; what is logged after their end was logged for tasks that train on.
        settings: `metric` says what a better evaluation is, `patience` after how many worse ones the task stops.
    """

    log: Sequence[Mapping[str, Any]]
    prefix: str
    order: RowOrder
    settings: FitSettings

    def entries(self) -> list[dict[str, Any]]:
        """Losses or metrics, with `step` and `epoch`."""
        found = []
        for logged in self.log:
            own = {key.removeprefix(self.prefix): value for key, value in logged.items() if key.startswith(self.prefix)}
            if "loss" in own or "eval_loss" in own:
                step = min(int(logged["step"]), self.order.steps)
                found.append(own | {"step": step, "epoch": round(self.order.epoch_of(step), 4)})
        return found

    def best_step(self) -> int | None:
        """The step of the best evaluation, the first of equals; None without one."""
        evaluated = self._evaluated()
        return evaluated[self._best()] if evaluated else None

    def kept(self) -> float | None:
        """The metric's value where the R to keep was evaluated; None without an evaluation."""
        values = self._values()
        return values[self._best() if self.settings.keep == "best" else -1] if values else None

    def last_is_best(self) -> bool:
        """Whether no evaluation before the last was as good."""
        return self._best() == len(self._values()) - 1

    def divergence(self) -> tuple[str, str] | None:
        """What of the task was not finite, and where; None of one that is sound."""
        return next((tuple(entry[key]) for entry in self.log if (key := f"{self.prefix}diverged") in entry), None)

    def has_stopped(self) -> bool:
        """Whether so many evaluations as `patience` allows have passed without a better one. That of the adapter it
        starts from does not count: the first steps may undo some of what that had learnt."""
        patience = self.settings.patience
        if patience is None:
            return False
        values = self._values()
        first = int(self._evaluated()[:1] == [0])
        return len(values) - 1 - max(self._best(), first) >= patience

    def steps_done(self, step: int) -> int:
        """Optimizer steps that the task has taken when the run is at `step`."""
        return self._evaluated()[-1] if self.has_stopped() else min(step, self.order.steps)

    def is_due(self, step: int, *, from_another: bool) -> bool:
        """Whether the task is to be evaluated at `step`, and has not been.

        Args:
            from_another: R starts as another adapter's, which may be the best.
        """
        # Four times; with patience so often that it can run out before the last quarter does.
        every = self.settings.evaluate_every or math.ceil(self.order.steps / (4 * (self.settings.patience or 1)))
        if step == 0:
            due = from_another and self.settings.keep == "best"
        else:
            due = step % every == 0 or step == self.order.steps
        return due and self._evaluated()[-1:] != [step]  # asked last: all of the log is read for it

    def _evaluated(self) -> list[int]:
        return [entry["step"] for entry in self.entries() if "eval_loss" in entry]

    def _values(self) -> list[float]:
        key = f"{self.prefix}eval_{self.settings.metric}"
        return [entry[key] for entry in self.log if key in entry]

    def _best(self) -> int:
        values, best = self._values(), 0
        for i, value in enumerate(values):
            if better(self.settings.metric, value, values[best]):
                best = i
        return best
