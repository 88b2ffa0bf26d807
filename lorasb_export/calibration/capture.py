"""What is a basis good for? How much of a task's own gradient its subspaces hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..base.model import BaseModel
from ..basis import Basis
from ..data.encoding import Encoded
from ..data.task import TaskData, in_order
from ..layers.factors import Factors
from ..layers.inject import remove
from ..settings import CalibrationSettings, FitSettings
from .gradients import draw, gradients_of_rows, of_share
from .subspace import CaptureRatios, by_module, reduced, svd_device, to_four_digits, truncated_svd

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LITTLE = 0.3  # share of the way from a random basis to the task's own below which `is_little` warns
WAYS = ("basis", "own", "random")
# Settings of the calibration that are used here too.
_SAME = ("reduction", "loss", "seed", "batch_size", "max_length", "gradient_checkpointing")


def capture(
    base: BaseModel, network: PreTrainedModel, basis: Basis, task: TaskData, sparing: FitSettings | None = None
) -> dict[str, Any]:
    """The capture ratio ‖Bᵀ·g·Aᵀ‖_F / ‖g‖_F of the task's gradient g at W0, over rows drawn from its training split.

    Beside it stand what a random basis of this rank captures (the expected value, r/√(out·in)), and what the
    task's own would: one calibrated on these very rows. For a `raw` basis that is an upper bound; for a `sign`
    basis another one can come out a little above it.

    Args:
        network: the loaded base; an adapter on it is taken off.
        sparing: take no larger batches than these settings, and gradient checkpointing where they do: memory alone.

    Returns:
        `rows`, the overall ratios `basis`, `own` and `random` (of summed squares), and `modules`: the same by name.
    """
    remove(network)
    same = {key: basis.calibration[key] for key in _SAME if key in basis.calibration}
    settings = CalibrationSettings(rank=basis.rank, **same)
    if sparing is not None:
        settings = replace(
            settings,
            batch_size=min(settings.batch_size, sparing.batch_size),
            gradient_checkpointing=settings.gradient_checkpointing or sparing.gradient_checkpointing,
        )
    labels = in_order(task.labels, base.head_labels)
    rows = draw(task, base, labels, settings)
    return capture_of_rows(network, basis.modules, rows, base.tokenizer.pad_token_id, settings)


def capture_of_rows(
    network: PreTrainedModel,
    modules: Mapping[str, Factors],
    rows: Sequence[Encoded],
    pad_id: int,
    settings: CalibrationSettings,
) -> dict[str, Any]:
    """What `capture` returns, of the gradient over `rows` in the factors `modules` of a basis."""
    sums = gradients_of_rows(network, {name: network.get_submodule(name) for name in modules}, rows, pad_id, settings)
    ratios = CaptureRatios()
    for name, g in of_share(sums, svd_device(network.device), "capture"):
        U, _, Vh = truncated_svd(reduced(g, settings.reduction), settings.rank, settings.seed)
        ratios.add(name, g, basis=(modules[name].B, modules[name].A), own=(U, Vh))
    ratios.gather()
    return {"rows": len(rows), **ratios.overall(), "modules": ratios.modules}


def record(task: TaskData, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a basis says about a task it was calibrated on, given what `capture` returns of it; `recorded` reads it."""
    modules = {name: to_four_digits(ratios) for name, ratios in found["modules"].items()}
    return {
        "sha256": task.sha256,
        "rows": found["rows"],
        **to_four_digits({way: found[way] for way in WAYS}),
        "modules": modules,
    }


def recorded(basis: Basis, task: TaskData) -> dict[str, Any] | None:
    """What `capture` would return, as `calibrate` recorded it, to four digits.

    None for a task the basis was not calibrated on (told by the hash of its data), and where nothing was recorded.
    """
    for found in basis.calibration.get("capture", {}).get("tasks", {}).values():
        if found["sha256"] == task.sha256:
            return {key: value for key, value in found.items() if key != "sha256"}
    return None


def overview(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `capture` returns with, in place of every module's ratios, their spread: `by_module`."""
    return {
        "rows": found["rows"],
        **to_four_digits({way: found[way] for way in WAYS}),
        "by_module": by_module(found["modules"]),
    }


def is_little(found: Mapping[str, Any]) -> bool:
    """Whether the basis is hardly better for the task than a random one would be."""
    return bool(found["basis"] < found["random"] + _LITTLE * (found["own"] - found["random"]))


def one_line(found: Mapping[str, Any]) -> str:
    """An overview, in one line for people."""
    spread = found["by_module"]["basis"]
    return (
        f"the basis captures {found['basis']:.0%} of this task's gradient "
        f"(a random one {found['random']:.0%}, the task's own {found['own']:.0%}; "
        f"by module {spread['min']:.0%} to {spread['max']:.0%})"
    )
