"""An optimizer step over rows of several tasks, split into forward passes and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import distributed
from ..data.batches import collate
from ..data.encoding import IGNORE, Encoded
from .order import RowOrder


class MixedSteps:
    """The steps of tasks, each given as its rows and their order."""

    def __init__(self, tasks: Sequence[tuple[Sequence[Encoded], RowOrder]], pad_id: int, dtype: torch.dtype) -> None:
        """`dtype` is that of the weights of rows."""
        self._tasks, self._pad_id, self._dtype = tasks, pad_id, dtype
        self._labels = [[_label_count(row) for row in rows] for rows, _ in tasks]

    def batches(self, step: int, active: Sequence[int]) -> dict[str, Any]:
        """This process's share of step `step` of the `active` tasks.

        Returns:
            the `step`; its `batches`, one for each forward pass, which beside what the model takes have for each row
            the number of its task (`tasks`) and its weight in the loss (`weights`); and task → the factor that makes
            the mean over all labels of what is summed here and averaged over the processes (`to_means`).
        """
        parts = {k: self._tasks[k][1].step(step) for k in active}
        labels = {k: sum(self._labels[k][i] for part in parts[k] for i in part) for k in active}
        world, rank = distributed.world_size(), distributed.rank()
        batches = []
        for number in range(max((len(part) for part in parts.values()), default=0)):
            under_way = [k for k in active if number < len(parts[k])]
            rows = [(k, i, 1.0) for k in under_way for i in parts[k][number]]
            share = rows[rank::world] or [(*rows[0][:2], 0.0)]  # gradients are averaged: all must take part
            batch = collate([self._tasks[k][0][i] for k, i, _ in share], self._pad_id)
            batch["weights"] = torch.tensor([weight for *_, weight in share], dtype=self._dtype)
            batch["tasks"] = torch.tensor([k for k, *_ in share])
            batches.append(batch)
        return {"step": step, "batches": batches, "to_means": {k: world / labels[k] for k in active}}


def _label_count(row: Encoded) -> int:
    labels = row["labels"]
    return sum(label != IGNORE for label in labels) if isinstance(labels, list) else 1
