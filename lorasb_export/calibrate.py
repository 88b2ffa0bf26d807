"""Gradient sums over a few rows → sign → rank-r SVD → Basis (arXiv 2411.19557, Algorithm 1).

ΔW = -η·sign(Σ_i ∇_W L(W0, x_i)),   B·diag(S)·A = trunc_r(ΔW),   R0 = diag(S)/s
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .artifact import Basis
from .base import SEQ_CLS, BaseModel
from .data import TaskData, collate, encode, load_task, row_losses
from .errors import BaseModelError, DataError, SettingsError
from .format import ModuleBasis
from .layer import LINEAR_TYPES, remove, weight_of
from .settings import ALL_LINEAR, CalibrationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXACT_UP_TO = 1024  # below this size the exact SVD costs no more than the randomized one
_OVERSAMPLE = 16  # extra columns of the randomized SVD, cut afterwards: the last wanted directions come out better
_POWER_ITERATIONS = 10  # as in the authors' code


def calibrate(
    model: str | BaseModel,
    data: Mapping[str, str | Path | TaskData],
    settings: CalibrationSettings | None = None,
    *,
    network: PreTrainedModel | None = None,
) -> Basis:
    """Calibrate one basis for `model` over one task or a mixture of tasks.

    Args:
        model: folder, Hub id, or a resolved BaseModel.
        data: task name → folder, file, Hub dataset id or loaded task. All must be of one task type.
        network: the loaded base, where the caller already has it; an adapter on it is taken off.

    Raises:
        DataError: no rows, mixed task types.
        SettingsError: the rank exceeds a module, a target matches nothing.
        BaseModelError: a target received no gradient, or a non-finite one.
    """
    settings = settings or CalibrationSettings()
    base = model if isinstance(model, BaseModel) else BaseModel.resolve(model)
    tasks = [t if isinstance(t, TaskData) else load_task(name, t) for name, t in data.items()]
    if not tasks:
        raise DataError("no data to calibrate on", fix="Name at least one task")
    if len({task.task_type for task in tasks}) > 1:
        raise DataError("the tasks mix text generation and classification", fix="Calibrate one basis for each kind")
    task_type = tasks[0].task_type
    labels = sorted({label for task in tasks for label in task.labels})
    if network is None:
        network = base.load(
            task_type,
            dtype=settings.dtype,
            num_labels=len(labels) if task_type == SEQ_CLS else None,
            seed=settings.seed,
        )
    remove(network)  # the gradient is wanted at W0
    targets = find_targets(network, settings.targets)
    for name, module in targets.items():
        shape = tuple(weight_of(module).shape)
        if settings.rank > min(shape):
            raise SettingsError(f"rank {settings.rank} exceeds module {name} of shape {shape}", fix="Lower the rank")

    sums, rows = task_gradients(base, network, targets, tasks, settings)
    modules, energy = _decompose(sums, settings, network.dtype)
    calibration = {
        **{k: v for k, v in asdict(settings).items() if k not in ("rank", "samples")},
        "data": [
            {"name": t.name, "source": t.source, "sha256": t.sha256, "rows": rows[t.name], "weight": 1.0} for t in tasks
        ],
        "samples": sum(rows.values()),
        "svd": {"exact_up_to": _EXACT_UP_TO, "oversample": _OVERSAMPLE, "power_iterations": _POWER_ITERATIONS},
        "energy": energy,
    }
    return Basis(base.ref(targets), settings.rank, modules, calibration)


def find_targets(model: PreTrainedModel, targets: str) -> dict[str, torch.nn.Module]:
    """The modules `targets` selects, by full name: Linear and Conv1D inside the body, never a head.

    Raises:
        SettingsError: an ending matches nothing.
    """
    linear: dict[str, torch.nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and name.startswith(f"{model.base_model_prefix}.")
    }
    wanted = [ending.strip() for ending in targets.split(",") if ending.strip()]
    if wanted == [ALL_LINEAR]:
        return linear
    for ending in wanted:
        if not any(f".{name}".endswith(f".{ending}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise SettingsError(f"target {ending!r} matches no module", fix=f"Choose from {', '.join(known)}")
    return {name: m for name, m in linear.items() if any(f".{name}".endswith(f".{ending}") for ending in wanted)}


def task_gradients(
    base: BaseModel,
    network: PreTrainedModel,
    targets: Mapping[str, torch.nn.Module],
    tasks: Sequence[TaskData],
    settings: CalibrationSettings,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """`gradient_sums` over the training rows that `settings` draws from each task, and their number by task."""
    tokenizer = base.load_tokenizer()
    labels = sorted({label for task in tasks for label in task.labels})
    encoded = {
        task.name: encode(_draw(task, settings), tokenizer, task.task_type, labels, settings.max_length)
        for task in tasks
    }
    rows = [row for of_task in encoded.values() for row in of_task]
    size, pad_id = settings.batch_size, tokenizer.pad_token_id
    batches = [collate(rows[i : i + size], pad_id) for i in range(0, len(rows), size)]
    sums = gradient_sums(network, targets, tqdm(batches, desc="gradients", disable=None))
    return sums, {name: len(of_task) for name, of_task in encoded.items()}


def gradient_sums(
    model: PreTrainedModel, targets: Mapping[str, torch.nn.Module], batches: Iterable[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Σ over rows of ∂(mean loss of the row)/∂W for every target: module name → (out, in), fp32 on the CPU.

    Every row counts the same, whatever batch it is in. A gradient leaves the device and is freed as soon as
    backward has made it, so that the device never holds more than one layer's.

    Raises:
        BaseModelError: a target received no gradient, or a non-finite one.
    """
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.to("cpu", torch.promote_types(weight.dtype, torch.float32))
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
            weight.grad = None

        return hook

    with _only_trainable(model, {name: module.weight for name, module in targets.items()}, keep):
        for batch in batches:
            labels = batch["labels"].to(model.device)
            inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
            losses, counts = row_losses(model(**inputs).logits, labels)
            (losses / counts).sum().backward()
    for name in targets:
        if name not in sums or not sums[name].any():
            raise BaseModelError(
                "the module received no gradient: these rows never use it",
                where=name,
                fix="Calibrate on more rows, or leave it out with --targets",
            )
        if not sums[name].isfinite().all():
            raise BaseModelError("the gradient is not finite", where=name, fix="Try --dtype float32")
    return {name: sums[name].T if _is_transposed(module) else sums[name] for name, module in targets.items()}


def _is_transposed(module: torch.nn.Module) -> bool:
    return weight_of(module) is not module.weight


@contextmanager
def _only_trainable(
    model: PreTrainedModel, weights: Mapping[str, Any], hook: Callable[[str], Callable[[torch.Tensor], None]]
) -> Iterator[None]:
    """Let only `weights` require gradients, with dropout off; flags, mode and hooks are restored afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    model.eval().requires_grad_(False)
    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.grad = None
            parameter.requires_grad_(flag)
        model.train(training)


def _draw(task: TaskData, settings: CalibrationSettings) -> list[dict[str, Any]]:
    rows = list(task.rows("train"))
    wanted = settings.samples
    if wanted is None:
        wanted = max(32, round(len(rows) / 1000))
    count = max(1, round(len(rows) * wanted)) if wanted < 1 else int(wanted)
    return random.Random(settings.seed).sample(rows, min(count, len(rows)))


def _decompose(
    sums: dict[str, torch.Tensor], settings: CalibrationSettings, dtype: torch.dtype
) -> tuple[dict[str, ModuleBasis], dict[str, float]]:
    """Every gradient sum as its factors, and the share of its energy they keep. Sums are freed as they are used."""
    modules, energy = {}, {}
    for name in tqdm(sorted(sums), desc="SVD", disable=None):
        matrix = sums.pop(name)
        step = -settings.eta * reduced(matrix, settings.reduction)
        U, S, Vh = truncated_svd(step, settings.rank, settings.seed)
        energy[name] = float(S.square().sum() / step.square().sum())
        modules[name] = ModuleBasis(U.to(dtype).contiguous(), Vh.to(dtype).contiguous(), S.float())
    return modules, energy


def reduced(gradient: torch.Tensor, reduction: str) -> torch.Tensor:
    """The matrix whose subspaces are taken: `sign(G)`, AdamW's first step, or `G` itself."""
    return gradient.sign() if reduction == "sign" else gradient


def truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular triplets of `matrix` (m, n): U (m, r), S (r,) descending, Vh (r, n).

    Exact where that is as cheap, else randomized with its own seed; the global RNG is untouched. Signs are fixed:
    the largest entry of each column of U is positive.
    """
    width = rank + _OVERSAMPLE
    if min(matrix.shape) <= max(_EXACT_UP_TO, 2 * width):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, width, _POWER_ITERATIONS)
            Vh = V.T
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return U * signs, S, Vh * signs.T
