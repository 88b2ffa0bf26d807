"""The optimizer of a run, for each task a group of its R and one of its head, each at its own rate; the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from ..settings import FitSettings
from .muon import Muon


def make_optimizer(
    parameters: Sequence[Sequence[torch.nn.Parameter]],
    heads: Collection[int],
    settings: FitSettings,
    device: torch.device,
) -> torch.optim.Optimizer:
    """For each task a group of R, and another of a classifier's head, which AdamW trains in any case.

    Args:
        parameters: of every task.
        heads: the ids of those that are a head's.
        settings: with one rate.
    """
    (rate,), decay = settings.rates, settings.weight_decay
    of_head = {"lr": settings.head_learning_rate or rate, "weight_decay": 0.0}
    groups = [
        {"params": part, "task": k, "orthogonal": orthogonal, **({} if orthogonal else of_head)}
        for k, own in enumerate(parameters)
        for orthogonal in (True, False)
        if (part := [p for p in own if orthogonal == (id(p) not in heads)])
    ]
    if settings.optimizer == "muon":
        return Muon(groups, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=device.type in ("cpu", "cuda"))


def make_scheduler(
    optimizer: torch.optim.Optimizer, steps: Sequence[int], settings: FitSettings
) -> torch.optim.lr_scheduler.LambdaLR:
    """Each task's rate by its own number of `steps`."""
    factors = [learning_rate_factor(settings, steps[group["task"]]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def learning_rate_factor(settings: FitSettings, steps: int) -> Callable[[int], float]:
    """step → share of the peak rate: linear warm-up, then the schedule, 0 after `steps`."""
    warmup = min(math.ceil(settings.warmup * steps), steps - 1)  # a single step begins at the peak, not at 0

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant_with_warmup": 1.0}[
            settings.schedule
        ]

    return factor
