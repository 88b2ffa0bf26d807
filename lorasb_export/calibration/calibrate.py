"""Gradient sums over a few rows → sign → rank-r SVD → Basis (arXiv 2411.19557, Algorithm 1).

ΔW = -η·sign(Σ_i ∇_W L(W0, x_i)),   B·diag(S)·A = trunc_r(ΔW),   R0 = diag(S)/s
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import distributed
from ..base.given import (
    refuse_several_devices,
    require_dtype,
    require_model,
    require_outputs,
    require_padding,
    require_positions,
)
from ..base.model import AnyBase, BaseModel
from ..base.supported import refuse_merged
from ..basis import Basis
from ..choices import CAUSAL_LM, SEQ_CLS
from ..data.encoding import Encoded
from ..data.source import AnySource
from ..data.task import TaskData, in_order, load_tasks, outputs_of
from ..errors import BaseModelError, DataError, OutputError, Problems, as_lines, some
from ..files.lock import only_writer
from ..files.output import is_free
from ..layers.factors import ModuleBasis
from ..layers.inject import remove
from ..layers.targets import WHERE_TARGETS
from ..provenance import command
from ..settings import BLOCK, DRAWN, CalibrationSettings
from .capture import capture_of_rows, record
from .gradients import MIN_ROWS, draw, gradients_of_rows, of_share
from .random_basis import random_factors
from .requirements import common_kind, empty_of_drawn, require_weights, targets_of
from .subspace import (
    EXACT_UP_TO,
    OVERSAMPLE,
    POWER_ITERATIONS,
    CaptureRatios,
    reduced,
    svd_device,
    to_four_digits,
    truncated_svd,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A few dozen rows in all capture as much as thousands (docs/benchmarks.md), and a measurement of a task costs as much
# as its rows and an SVD: with thousands of tasks both would take longer than is of use to anybody.
_ROWS_OF_MANY = 1024
MAX_MEASURED = 32  # tasks; of more, `lorasb inspect --data` measures those that somebody asks for

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # whatever the caller is in: what is loaded in there would give no gradient
@torch.enable_grad()
def calibrate(
    base: AnyBase,
    data: Mapping[str, AnySource | TaskData],
    settings: CalibrationSettings | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    network: PreTrainedModel | None = None,
    pass_over: bool = False,
) -> Basis:
    """Calibrate one basis for `base` over one task or a mixture of tasks.

    Its `calibration["capture"]` says what share the basis holds of the gradient that it was made from: `basis`;
    `random`, what a basis drawn at random would; both by module in `modules`; and in `tasks`, of up to 32, task name →
    the same of the task's own gradient, with `own`, what a basis made for it alone would hold.

    With `directions` random or block it is made without data: `data` and `weights` are not read, and nothing is
    recorded of gradients.

    Args:
        base: folder, Hub id, or a resolved BaseModel.
        data: task name → folder, file, Hub dataset id or loaded task. All must be of one task type.
        weights: task name → what the losses of its rows are multiplied by; 1 where it is not named.
        network: the loaded base, where the caller already has it; an adapter on it is taken off, and its mode and flags
            are left as they were; gradients that lay on it are gone.
        pass_over: leave out with a warning a task that has no row to learn from, or one that the chat template
            refuses, if any other is left: it could not be trained either.

    Raises:
        DataError: no rows to learn from, mixed task types, a row that the chat template refuses.
        SettingsError: the rank exceeds a module, a target matches nothing, a weight is not positive or names no task;
            or of several processes not all have read the same.
        BaseModelError: the base is merged; a target shares its weight, has none in the checkpoint, or received no
            gradient, or a non-finite one.
    """
    distributed.start()
    settings = settings or CalibrationSettings()
    base = BaseModel.resolve(base)
    refuse_merged(base.folder)
    if network is not None:
        require_model(network)
        require_dtype(network, settings.dtype)
    if settings.directions in DRAWN:
        return _drawn(base, settings, network)
    weights = {name: float(weight) for name, weight in (weights or {}).items()}
    require_weights(weights, data)
    task_type, labels = common_kind(load_tasks(data))
    labels = in_order(labels, base.head_labels)
    classes = outputs_of(task_type, labels)
    if network is None:
        empty = base.load_empty(task_type, num_labels=classes)
        targets_of(empty, base, settings)  # before weights are read
        network = base.load(task_type, dtype=settings.dtype, num_labels=classes, seed=settings.seed)
    require_outputs(network, classes)
    remove(network)  # the gradient is wanted at W0
    targets = targets_of(network, base, settings)
    refuse_several_devices(network)
    require_positions(network, settings.max_length)

    tokenizer = base.tokenizer
    require_padding(network, tokenizer)
    tasks, rows = _rows_by_task(data, base, labels, settings, pass_over=pass_over)

    def inputs() -> dict[str, Any]:
        of_base = [base.revision, base.fingerprint(targets)]
        return {"settings": asdict(settings), "base": of_base, "weights": weights, "rows": list(rows.items())}

    distributed.require_same_inputs(inputs)
    every_row = [row for of_task in rows.values() for row in of_task]
    of = ", ".join(rows) if len(rows) <= MAX_MEASURED else f"{len(rows)} tasks"
    logger.info("Calibrating a basis for %d modules on %d rows of %s", len(targets), len(every_row), of)
    every_weight = [weights.get(name, 1.0) for name, of_task in rows.items() for _ in of_task]
    sums = gradients_of_rows(network, targets, every_row, tokenizer.pad_token_id, settings, every_weight)
    modules, energy, ratios = _decompose(sums, settings, network.dtype, svd_device(network.device))

    captured, overall = dict[str, Any](), ratios.overall()
    if len(tasks) == 1:  # the basis is the task's own
        own = {name: of_module | {"own": of_module["basis"]} for name, of_module in ratios.modules.items()}
        captured = {name: {"rows": len(every_row), **overall, "own": overall["basis"], "modules": own} for name in rows}
    elif settings.capture and len(tasks) <= MAX_MEASURED:
        logger.info("Measuring how much of each task's gradient it holds")
        captured = {
            name: capture_of_rows(network, modules, of_task, tokenizer.pad_token_id, settings)
            for name, of_task in rows.items()
        }
    read = {t.name: {"rows": len(rows[t.name]), "weight": weights.get(t.name, 1.0)} for t in tasks}
    sources = [{"name": t.name, "source": t.source, "sha256": t.sha256, **read[t.name]} for t in tasks]
    calibration = {
        **{k: v for k, v in asdict(settings).items() if k not in ("rank", "samples", "capture")},
        "task_type": task_type,
        "command": command(),
        "data": sources,
        "samples": len(every_row),
        "svd": {"exact_up_to": EXACT_UP_TO, "oversample": OVERSAMPLE, "power_iterations": POWER_ITERATIONS},
        "energy": energy,
        "capture": {
            **to_four_digits(overall),
            "tasks": {t.name: record(t, captured[t.name]) for t in tasks if captured},
            "modules": {name: to_four_digits(of_module) for name, of_module in ratios.modules.items()},
        },
    }
    return Basis(base.ref(targets), settings.rank, modules, calibration)


def _rows_by_task(
    data: Mapping[str, AnySource | TaskData],
    base: BaseModel,
    labels: Sequence[Any],
    settings: CalibrationSettings,
    *,
    pass_over: bool,
) -> tuple[list[TaskData], dict[str, list[Encoded]]]:
    """The tasks, without their rows, and the encoded ones that are drawn of each. Read one task after another: the rows
    of all may be more than memory holds.

    Args:
        pass_over: as for `calibrate`.
    """
    least = min(MIN_ROWS, math.ceil(_ROWS_OF_MANY / len(data)))
    rows, tasks, unlearnable = {}, [], Problems()
    for task in load_tasks(data):
        try:
            rows[task.name] = draw(task, base, labels, settings, least=least)
        except DataError as error:
            if not pass_over:
                raise
            unlearnable.found.append(error.alone())
        else:
            tasks.append(replace(task, splits={}))
    if not rows:
        unlearnable.raise_all("no basis was made")
    if without := unlearnable.found:
        told = as_lines([str(error) for error in without[:10]], len(without))
        logger.warning("The basis is made without %d of %d tasks:\n%s", len(without), len(data), told)
    return tasks, rows


def _drawn(base: BaseModel, settings: CalibrationSettings, network: PreTrainedModel | None) -> Basis:
    network = empty_of_drawn(base, settings) if network is None else network
    remove(network)
    targets = targets_of(network, base, settings)
    ref = base.ref(targets)
    # Drawn anew for every base: code that combines adapters takes an equal hash of the basis for an equal base.
    drawn_by = int.from_bytes(hashlib.sha256(f"{ref.fingerprint} {settings.seed}".encode()).digest()[:7], "big")
    modules = random_factors(targets, settings.rank, drawn_by, network.dtype, settings.directions)
    used = {key: getattr(settings, key) for key in ("directions", "targets", "dtype", "seed")}
    if settings.directions == BLOCK:  # 0 and 1 are exact in all
        del used["dtype"]
    task_type = CAUSAL_LM if base.generates else SEQ_CLS
    calibration = {**used, "task_type": task_type, "command": command(), "data": [], "samples": 0, "energy": {}}
    return Basis(ref, settings.rank, modules, calibration)


def _decompose(
    sums: dict[str, torch.Tensor], settings: CalibrationSettings, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, ModuleBasis], dict[str, float], CaptureRatios]:
    """Every gradient sum as its factors, the share of the step's energy they keep, and of the gradient itself.

    The processes, of which each has every sum, share the modules. Sums are freed as they are used. Raises
    BaseModelError where some are zero.
    """
    if without := sorted(name for name, gradient in sums.items() if not gradient.any()):
        raise BaseModelError(
            f"{len(without)} of {len(sums)} modules received no gradient: these rows never use them",
            where=some(without),
            fix=f"Calibrate on more rows, or leave them out: {WHERE_TARGETS}",
        )
    modules, energy, ratios = {}, {}, CaptureRatios()
    for name, gradient in of_share(sums, device, "SVD"):
        step = -settings.eta * reduced(gradient, settings.reduction)
        U, S, Vh = truncated_svd(step, settings.rank, settings.seed)
        energy[name] = float(S.square().sum() / step.square().sum())
        modules[name] = ModuleBasis(
            U.to("cpu", dtype).contiguous(), Vh.to("cpu", dtype).contiguous(), S.to("cpu", torch.float32)
        )
        ratios.add(name, gradient, basis=(modules[name].B, modules[name].A))
    ratios.gather()
    return distributed.all_gather_by_name(modules), distributed.all_gather_by_name(energy), ratios


def calibrated_once(folder: Path, make: Callable[[], Basis]) -> Basis:
    """The basis in `folder`; where there is none, all processes make it and the first one saves it there.

    Another run that is making it is waited for.
    """
    with ExitStack() as lock:

        def is_there() -> bool:
            if is_free(folder):
                lock.enter_context(only_writer(folder, wait=True))
            return not is_free(folder)

        if not distributed.on_main(is_there):
            distributed.require_same_disk(folder.parent)
            basis = make()
            if distributed.is_main():
                try:
                    basis.save(folder)
                except OutputError:
                    if is_free(folder):
                        raise  # else it is there: for a while NFS remembers of a folder that it was not
            distributed.barrier()
    return Basis.load(folder)
