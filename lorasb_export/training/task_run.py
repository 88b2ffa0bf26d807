"""One task in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapter import Adapter
from ..data.encoding import Encoded
from ..data.task import TaskData
from ..errors import TrainingError
from ..tensors import all_finite
from .order import RowOrder
from .validation import Validation

_SAFER = "Begin again with a lower learning rate, or with --dtype float32; --overwrite, where checkpoints are left"


@dataclass
class TaskRun:
    """A task's adapter, its rows, their order, and how it is validated (None without valid rows)."""

    task: TaskData
    adapter: Adapter
    rows: Sequence[Encoded]
    order: RowOrder
    validation: Validation | None

    def has_finite_tensors(self) -> bool:
        """Whether R and the head are finite: nothing was computed with what the last step made."""
        return all(map(all_finite, self.adapter.tensors().values()))

    def diverged(self, what: str, place: str) -> TrainingError:
        """The error that ends this task."""
        what = f"{what} of {self.task.name} is not finite {place}"
        return TrainingError(what, where=self.task.source, fix=_SAFER)
