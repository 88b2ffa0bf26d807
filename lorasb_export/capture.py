"""What is a basis good for? How much of a task's own gradient its subspaces hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .artifact import Basis
from .base import BaseModel
from .calibrate import reduced, task_gradients, truncated_svd
from .data import TaskData
from .layer import remove
from .settings import CalibrationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAME = ("reduction", "seed", "batch_size", "max_length")  # settings of the calibration that are used here too
_LITTLE = 0.3  # share of the way from a random basis to the task's own below which `is_little` warns


def capture(base: BaseModel, network: PreTrainedModel, basis: Basis, task: TaskData) -> dict[str, Any]:
    """The capture ratio ‖Bᵀ·g·Aᵀ‖_F / ‖g‖_F of the task's gradient g at W0, over rows drawn from its training split.

    Beside it stand what a random basis of this rank captures (the expected value, r/√(out·in)), and what the
    task's own would: one calibrated on these very rows, so an upper bound.

    Args:
        network: the loaded base; an adapter on it is taken off.

    Returns:
        `rows`, the overall ratios `basis`, `own` and `random` (of summed squares), and `modules`: the same by name.
    """
    remove(network)
    same = {key: basis.calibration[key] for key in _SAME if key in basis.calibration}
    settings = CalibrationSettings(rank=basis.rank, **same)
    targets = {name: network.get_submodule(name) for name in basis.modules}
    sums, rows = task_gradients(base, network, targets, [task], settings)
    modules, squares = {}, {"basis": 0.0, "own": 0.0, "random": 0.0}
    total = 0.0
    for name in tqdm(sorted(sums), desc="capture", disable=None):
        g = sums.pop(name)
        U, _, Vh = truncated_svd(reduced(g, settings.reduction), basis.rank, settings.seed)
        B, A, _ = (part.to(g.dtype) for part in basis.modules[name])
        energy = float(g.square().sum())
        kept = {
            "basis": float((B.T @ g @ A.T).square().sum()),
            "own": float((U.T @ g @ Vh.T).square().sum()),
            "random": energy * basis.rank**2 / g.numel(),
        }
        modules[name] = {way: math.sqrt(square / energy) for way, square in kept.items()}
        squares = {way: squares[way] + square for way, square in kept.items()}
        total += energy
    return {
        "rows": rows[task.name],
        **{way: math.sqrt(square / total) for way, square in squares.items()},
        "modules": modules,
    }


def recorded(basis: Basis, task: TaskData) -> dict[str, float] | None:
    """What `calibrate` recorded that `basis` captures of this task: the ratios `basis`, `own` and `random`.

    None for a task it was not calibrated on (told by the hash of its data), and where nothing was recorded.
    """
    for found in basis.calibration.get("capture", {}).get("tasks", {}).values():
        if found["sha256"] == task.sha256:
            return {way: found[way] for way in ("basis", "own", "random")}
    return None


def is_little(found: dict[str, Any]) -> bool:
    """Whether the basis is hardly better for the task than a random one would be."""
    return bool(found["basis"] < found["random"] + _LITTLE * (found["own"] - found["random"]))


def words(found: dict[str, Any]) -> str:
    """One line for people."""
    return (
        f"the basis captures {found['basis']:.0%} of this task's gradient "
        f"(a random one {found['random']:.0%}, the task's own {found['own']:.0%})"
    )
