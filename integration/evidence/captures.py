"""How much of a task's gradient bases of different origin hold, before training: many of them from a few gradients.

The gradient sum of a mixture is the sum of its tasks' sums, and a basis of lower rank the beginning of one of higher.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from lorasb_export.calibration.gradients import draw
from lorasb_export.calibration.subspace import CaptureRatios, reduced, to_four_digits, truncated_svd
from lorasb_export.data.encoding import encode
from lorasb_export.settings import DRAWN, CalibrationSettings

from .cells import Cell, calibrated_on
from .models import base_of
from .scores import some
from .training import balancing, basis_of, calibration_settings, gradient, task_named

VALID_ROWS = 64  # of the task, whose gradient is looked for in every basis
Sums = dict[str, torch.Tensor]  # module name → (out, in)


def captures(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, float]]]:
    """Each of `cells`, which are of one kind of task, with the ratio its basis captures and a random one would."""
    sharing: dict[tuple[object, ...], list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell.samples):  # the sums of few samples are not wanted later
        sharing[_origin(cell)].append(cell)
    for of_origin in sharing.values():
        ratios = {cell: CaptureRatios() for cell in of_origin}
        for name, B, A in _factors(max(of_origin, key=lambda cell: cell.rank)):
            for cell in of_origin:
                sums = _valid_sums(cell.task, cell.targets, cell.seed)
                ratios[cell].add(name, sums[name], capture=(B[:, : cell.rank], A[: cell.rank]))
        yield from ((cell, to_four_digits(of_cell.overall())) for cell, of_cell in ratios.items())


def _origin(cell: Cell) -> tuple[object, ...]:
    """Cells of the same origin differ in task and rank alone; a drawn basis of lower rank is another one."""
    if cell.basis == "wsvd":
        return cell.basis, cell.targets
    if cell.basis in DRAWN:
        return cell.basis, cell.targets, cell.rank, cell.draw
    tasks = tuple(calibrated_on(cell))
    return tasks, cell.balanced, cell.reduction, cell.samples, cell.targets, cell.seed


def _factors(cell: Cell) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Module name, B (out, r) and A (r, in)."""
    if cell.basis == "wsvd" or cell.basis in DRAWN:
        task = task_named(cell.task)
        base = base_of(task.task_type)
        network = base.load(task.task_type, dtype="float32", num_labels=task.num_labels, seed=cell.seed)
        for name, factors in basis_of(network, base, task, cell).modules.items():
            yield name, factors.B, factors.A
        return
    tasks = [task_named(name) for name in calibrated_on(cell)]
    labels = tuple(sorted({label for task in tasks for label in task.labels}))
    of_tasks = [_sums(task.name, labels, cell.samples, cell.targets, cell.seed) for task in tasks]
    weights = [1.0] * len(tasks)
    if cell.balanced:
        own = [_sums(task.name, tuple(task.labels), cell.samples, cell.targets, cell.seed) for task in tasks]
        weights = [balancing(sums) for sums in own]
    for name in of_tasks[0]:
        mixed = sum(weight * sums[name] for weight, sums in zip(weights, of_tasks, strict=True))
        assert isinstance(mixed, torch.Tensor)
        B, _, A = truncated_svd(reduced(mixed, cell.reduction), cell.rank, cell.seed)
        yield name, B, A


@lru_cache(maxsize=16)  # five generating tasks with three numbers of samples, of 425 MB each for SmolLM2-135M
def _sums(name: str, labels: tuple[str, ...], samples: int, targets: str, seed: int) -> Sums:
    """Over the rows that a calibration draws of one task, with a head of all `labels` of its mixture."""
    task = task_named(name)
    base = base_of(task.task_type)
    settings = _settings(Cell(name, "lora-sb", samples=samples, targets=targets, seed=seed))
    rows = draw(task, base, labels, settings)
    return gradient(base, task, rows, settings, len(labels) or None)


@lru_cache(maxsize=8)
def _valid_sums(name: str, targets: str, seed: int) -> Sums:
    """Over rows that no basis is made from."""
    task = task_named(name)
    base = base_of(task.task_type)
    settings = _settings(Cell(name, "lora-sb", targets=targets, seed=seed))
    rows, of_task = some(task.rows("valid"), VALID_ROWS), (task.task_type, task.labels, settings.max_length)
    encoded = encode(rows, base.tokenizer, *of_task, embeddings=base.embeddings)
    return gradient(base, task, encoded, settings, task.num_labels)


def _settings(cell: Cell) -> CalibrationSettings:
    """In three quarters of the time: the sums are the same, and these models are small."""
    return replace(calibration_settings(cell), gradient_checkpointing=False)
