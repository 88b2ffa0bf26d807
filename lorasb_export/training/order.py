"""Which rows every optimizer step sees: fixed by the settings and the seed alone, so that a
run can be resumed, split over processes, or mixed with other tasks' runs and still be the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..settings import FitSettings

_POOL = 32  # steps whose rows are sorted by length together


class RowOrder:
    """The order of one task's rows over all epochs.

    Attributes:
        steps: optimizer steps of the whole run.
    """

    def __init__(self, lengths: Sequence[int], settings: FitSettings) -> None:
        self._lengths = lengths
        self._settings = settings
        self._rows_per_step = settings.batch_size * settings.accumulate
        self._per_epoch = math.ceil(len(lengths) / self._rows_per_step)
        self.steps = settings.max_steps or math.ceil(settings.epochs * self._per_epoch)
        self._shuffled: tuple[int, list[list[int]]] = (-1, [])

    def step(self, number: int) -> list[list[int]]:
        """Row numbers of optimizer step `number` (from 0), one list per forward pass."""
        epoch, place = divmod(number, self._per_epoch)
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._epoch(epoch))
        rows, size = self._shuffled[1][place], self._settings.batch_size
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def epoch_of(self, step: int) -> float:
        """Passes over the rows after so many steps."""
        return step / self._per_epoch

    def _epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every step of one epoch. Only the last step may have fewer than the others."""
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._rows_per_step
        if not self._settings.group_by_length:
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        steps = []
        for start in range(0, len(rows), _POOL * size):
            pool = sorted(rows[start : start + _POOL * size], key=lambda row: -self._lengths[row])
            steps += [pool[i : i + size] for i in range(0, len(pool), size)]
        whole = steps if len(steps[-1]) == size else steps[:-1]
        mixed = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        return mixed + steps[len(whole) :]
