"""A base loaded once for the tasks, or adapters, of one command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .model import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LastLoaded:
    """Keeps the network that was asked for last: one after another wants the same, and two might not fit."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of `BaseModel.load`."""
        self._options = options
        self._kind: tuple[Any, ...] | None = None
        self._network: PreTrainedModel | None = None

    def get(self, base: BaseModel, task_type: str, num_labels: int | None = None) -> PreTrainedModel:
        """`base` with so many outputs. Users give it back as it was, a classifier's head too."""
        kind = base.folder, task_type, num_labels
        if kind != self._kind or self._network is None:
            self.drop()
            self._network, self._kind = base.load(task_type, num_labels=num_labels, **self._options), kind
        return self._network

    def drop(self) -> None:
        """Make room for another."""
        self._network = None
