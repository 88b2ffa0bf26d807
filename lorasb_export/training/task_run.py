"""One task in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapter import Adapter
from ..batches import Encoded
from ..data import TaskData
from ..errors import TrainingError
from .order import RowOrder
from .validation import Validation


@dataclass
class TaskRun:
    """A task's adapter, its rows, their order, and how it is validated (None without valid rows)."""

    task: TaskData
    adapter: Adapter
    rows: Sequence[Encoded]
    order: RowOrder
    validation: Validation | None

    def require_finite_tensors(self) -> None:
        """Raise TrainingError when R or the head is not finite: nothing was computed with what the last step made."""
        if not all(tensor.isfinite().all() for tensor in self.adapter.tensors().values()):
            raise self.not_finite("R", "at the end")

    def not_finite(self, what: str, place: str) -> TrainingError:
        """The error of a run that diverges."""
        error = TrainingError(
            f"{what} of {self.task.name} is not finite {place}",
            where=self.task.source,
            fix="Lower the learning rate, or use --dtype float32",
        )
        error.task = self.task.name
        return error
