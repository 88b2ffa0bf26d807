"""What tasks, rank and targets a basis can be made of; asked before a base is loaded, and by a dry run alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..base.given import require_positions
from ..base.model import BaseModel
from ..base.products import shape_of
from ..choices import CAUSAL_LM, SEQ_CLS
from ..data.source import AnySource
from ..data.task import TaskData, load_tasks, outputs_of, refuse_single_class
from ..errors import BaseModelError, DataError, SettingsError, some
from ..layers.targets import WHERE_TARGETS, find_targets
from ..settings import DRAWN, CalibrationSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def check(base: BaseModel, data: Mapping[str, AnySource | TaskData], settings: CalibrationSettings) -> None:
    """Raise what `calibrate` would find wrong with the tasks together, the rank or the targets; no weights are loaded.

    Raises:
        DataError, SettingsError, BaseModelError: as `calibrate`.
    """
    if settings.directions in DRAWN:
        targets_of(empty_of_drawn(base, settings), base, settings)
        return
    task_type, labels = common_kind(load_tasks(data))
    network = base.load_empty(task_type, num_labels=outputs_of(task_type, labels))
    targets_of(network, base, settings)
    require_positions(network, settings.max_length)


def common_kind(tasks: Iterable[TaskData]) -> tuple[str, list[Any]]:
    """Task type, and the classes of all tasks together, sorted; none for text generation and regression.

    Raises:
        DataError: there is no task, or they are of different kinds.
    """
    first: TaskData | None = None
    sources: list[str] = []
    labels: set[Any] = set()
    for task in tasks:
        first = first or task
        if (task.task_type, bool(task.labels)) != (first.task_type, bool(first.labels)):
            name, own = task.name, f"basis_{task.name}"
            raise DataError(
                "the tasks mix text generation, classification or regression",
                where=f"{first.name} and {name}",
                fix=f"Calibrate one basis for each kind: lorasb calibrate --data {name}={task.source} --out {own}, "
                f'then [tasks.{name}] basis = "{own}" in lorasb.toml',
            )
        if {type(label) for label in labels} - {type(label) for label in task.labels}:
            what, where = "the labels of some tasks are names, of others numbers", f"{first.name} and {task.name}"
            raise DataError(what, where=where, fix="Use one kind")
        labels.update(task.labels)
        sources.append(task.source)
    if first is None:
        raise DataError("no data to calibrate on", fix="Name at least one task")
    refuse_single_class(sorted(labels), some(sources))
    return first.task_type, sorted(labels)


def require_weights(weights: Mapping[str, float], names: Mapping[str, Any]) -> None:
    """Raise SettingsError for a weight of no task, or one that is not positive."""
    for name, weight in weights.items():
        if name not in names:
            raise SettingsError(f"a weight for {name!r}, which is no task", fix=f"Choose from {some(names)}")
        if not 0 < weight < math.inf:
            raise SettingsError(f"the weight of task {name} is {weight}", fix="Give a positive number")


def targets_of(network: PreTrainedModel, base: BaseModel, settings: CalibrationSettings) -> dict[str, nn.Module]:
    """By their names.

    Args:
        network: that of `base`, loaded or empty.

    Raises:
        SettingsError: none matches, or the rank exceeds one.
        BaseModelError: the checkpoint has no weight of that name, which a merge adds to.
    """
    targets = find_targets(network, settings.targets)
    shapes = {name: shape_of(module) for name, module in targets.items()}
    name, smallest = min(shapes.items(), key=lambda item: min(item[1]))
    if settings.rank > min(smallest):
        fix = f"Set rank in [basis] of lorasb.toml, or --rank of calibrate, to {min(smallest)} or less"
        fix += f", or leave that module out: {WHERE_TARGETS}"
        raise SettingsError(f"rank {settings.rank} exceeds module {name} of shape {smallest}", fix=fix)
    if without := [name for name in targets if base.tensor_key(f"{name}.weight") is None]:
        what = f"the checkpoint holds the weights of {some(without)} under other names, or in another form"
        fix = "Load it once with transformers, save_pretrained(new_folder, save_original_format=False), and copy the "
        fix += f"tokenizer's files there; or leave these modules out: {WHERE_TARGETS}"
        raise BaseModelError(what, where=base.folder, fix=fix)
    return targets


def empty_of_drawn(base: BaseModel, settings: CalibrationSettings) -> PreTrainedModel:
    """The shapes of the weights are enough."""
    return base.load_empty(CAUSAL_LM if base.generates else SEQ_CLS, dtype=settings.dtype)
