"""The basis of a training run: the task's own, made once for all its resumptions, and what a basis holds of a task."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..base.model import BaseModel
from ..basis import Basis
from ..calibration.calibrate import calibrate, calibrated_once
from ..calibration.capture import capture, is_little, one_line, overview, recorded
from ..calibration.requirements import targets_of
from ..data.task import TaskData
from ..data.trained_template import recorded_template
from ..files.atomic import atomic_file
from ..files.storage import read_json, write_json
from ..layers.targets import find_targets, linear_layers
from ..settings import DRAWN, CalibrationSettings, FitSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def with_rate(
    settings: FitSettings,
    base: BaseModel,
    basis: Basis | CalibrationSettings,
    task: TaskData,
    network: PreTrainedModel | None,
) -> FitSettings:
    """`settings` with the learning rate that a task takes where they leave it open."""
    if settings.learning_rate is not None:
        return settings
    share = _share_of_layers(base, basis, task, network) if settings.optimizer == "muon" else 1.0
    return settings.for_task(task.task_type, basis.directions, basis.rank, share)


def _share_of_layers(
    base: BaseModel, basis: Basis | CalibrationSettings, task: TaskData, network: PreTrainedModel | None
) -> float:
    """The share of the base's linear layers that the basis covers.

    They are counted in `network`, the base, loaded or empty, where there is one; an adapter on it changes no count.
    """
    if network is not None and isinstance(basis, Basis):
        return len(basis.modules) / len(linear_layers(network))
    empty = base.load_empty(task.task_type, num_labels=task.num_labels)
    chosen = basis.modules if isinstance(basis, Basis) else find_targets(empty, basis.targets)
    return len(chosen) / len(linear_layers(empty))


def own_basis(
    base: BaseModel, task: TaskData, settings: CalibrationSettings, folder: Path, network: PreTrainedModel | None
) -> Basis:
    """The task's own basis, kept in `folder`, the run's; arguments as for `calibrate`."""
    alike = replace(settings, batch_size=CalibrationSettings.batch_size)  # which decides nothing but rounding
    targets = targets_of(network or base.load_empty(task.task_type, num_labels=task.num_labels), base, settings)
    of_base = [base.fingerprint(targets), recorded_template(base.folder, task)]
    made_from = json.dumps([asdict(alike), task.sha256, of_base])
    place = folder / f"basis-{hashlib.sha256(made_from.encode()).hexdigest()[:12]}"
    basis = calibrated_once(place, partial(calibrate, base, {task.name: task}, settings, network=network))
    return replace(basis, source=None)  # it will lie in the adapter


def captured_once(
    base: BaseModel,
    network: PreTrainedModel,
    basis: Basis,
    task: TaskData,
    folder: Path,
    settings: FitSettings,
    measure: bool,
) -> dict[str, Any] | None:
    """How much of the task's gradient the basis holds: recorded at calibration, or measured and kept in `folder`.

    None in a basis drawn at random, which has nothing to do with it, and in one whose calibration measured no task:
    it was told not to, or had too many. Warns where it is little.

    Args:
        settings: those of the run, whose memory has to do for this too.
        measure: where it is not recorded.
    """
    if basis.directions in DRAWN or basis.calibration.get("capture", {}).get("tasks") == {}:
        return None
    path = folder / f"capture-{basis.sha256[:12]}-{task.sha256[:12]}.json"
    found = recorded(basis, task)
    if found is None:
        found = distributed.on_main(lambda: read_json(path) if path.exists() else None)
    if found is None:
        if not measure:
            return None
        logger.info("%s: measuring how much of its gradient the basis holds", task.name)
        found = capture(base, network, basis, task, settings)
        distributed.barrier()
        if distributed.is_main():
            with atomic_file(path) as temporary:
                write_json(temporary, found)
    if is_little(found):
        logger.warning(
            "%s: %s. It will learn more slowly: try a higher --learning-rate, or --basis own "
            "(beside which `serve` shares no basis among adapters)",
            task.name,
            one_line(overview(found)),
        )
    return found
