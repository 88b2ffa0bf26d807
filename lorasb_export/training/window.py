"""What is gathered between two logs; on the device, so that a training step never waits for it."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .. import distributed

_NEVER = 2**62  # a step


class LossWindow:
    """The losses of every task since the last log, of this process until they are asked for."""

    def __init__(self, tasks: int, device: torch.device) -> None:
        self._sums = torch.zeros(tasks, dtype=torch.float32, device=device)
        self._bad_step = torch.full((tasks,), _NEVER, device=device)
        self._steps = [0] * tasks

    def add(self, losses: torch.Tensor, step: int, trained: Collection[int]) -> None:
        """`losses` (k,) of a step, zero but for those of the tasks that it `trained`."""
        self._bad_step = torch.where(losses.isfinite(), self._bad_step, self._bad_step.clamp(max=step))
        self._sums += losses
        for k in trained:
            self._steps[k] += 1

    def means(self) -> dict[int, float]:
        """Of each task that was trained, its mean loss over steps and processes. Every process calls this, once."""
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self._sums)
        sums, processes = self._sums.tolist(), distributed.world_size()
        return {k: sums[k] / processes / steps for k, steps in enumerate(self._steps) if steps}

    def first_bad_steps(self) -> dict[int, int]:
        """Of each task with a loss that was not finite, on whichever process, the step. Every process calls this."""
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self._bad_step, torch.distributed.ReduceOp.MIN)
        return {k: step for k, step in enumerate(self._bad_step.tolist()) if step < _NEVER}
