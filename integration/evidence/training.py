"""One cell: a model with a method on it, trained by one loop that is the same for all methods, and scored."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.utils import clip_grad_norm_

from lorasb_export.adapter import Adapter
from lorasb_export.base.device import cpu_multiplies, default_device
from lorasb_export.base.model import BaseModel, BaseRef
from lorasb_export.base.products import weight_of
from lorasb_export.basis import Basis
from lorasb_export.calibration.calibrate import calibrate, calibrated_once
from lorasb_export.calibration.gradients import draw, gradients_of_rows
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.encoding import Encoded, encode, encode_split
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.evaluation.scores import mean_loss, row_scores
from lorasb_export.layers.factors import Factors, ModuleBasis
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import DRAWN, CalibrationSettings, FitSettings
from lorasb_export.training.muon import Muon, groups_of
from lorasb_export.training.optimizer import learning_rate_factor
from lorasb_export.training.order import RowOrder

from .cells import DATA, Cell, calibrated_on
from .models import base_of
from .scores import score, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LENGTH = 192
_PEFT = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
# The factor that is multiplied by the weight's singular values.
SCALED: dict[str, Literal["A", "B"]] = {"lora-xs": "A", "lora-xs-mirrored": "B"}
_CACHE = Path("~/.cache/lorasb/bases").expanduser()
transformers.logging.set_verbosity_error()  # a new head is meant to be new


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, then the loss on valid rows and the task's metric on test rows, which nothing was chosen by.

    Returns:
        `loss`, `metric`, `value`, `trainable` (parameters, a classifier's head included), `adapter_bytes`, `seconds` of
        training, `device` (the GPU's name, or the CPU's model).
    """
    task = task_named(cell.task)
    base = base_of(task.task_type)
    tokenizer = base.tokenizer
    network = base.load(task.task_type, dtype=cell.dtype, num_labels=task.num_labels, seed=cell.seed)
    network.to(default_device())
    # Where a CPU multiplies 16 bits, the fused attention's backward pass takes five times as long at these lengths;
    # where it does not, eager attention is what takes longer, as only the fused one is computed in float32 there.
    if default_device().type == "cpu" and cpu_multiplies(network.dtype):
        network.set_attn_implementation("eager")
    torch.manual_seed(cell.seed)
    model = network if cell.method == "base" else _with_method(network, base, task, cell)
    trained = [p for p in model.parameters() if p.requires_grad] if cell.method != "base" else []
    rows = _train_rows(cell.task) if trained else []
    # Seconds of all cores on a CPU: sittings may share the machine with other work.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    if trained:
        _train(model, trained, rows, tokenizer.pad_token_id, cell)
    seconds = clock() - started
    model.eval()
    of_task: tuple[Any, ...] = tokenizer, task.task_type, task.labels, MAX_LENGTH
    valid = encode(some(task.rows("valid"), cell.valid_rows), *of_task, embeddings=base.embeddings)
    metric, value = score(model, base, task, cell.test_rows)
    return {
        "loss": mean_loss(row_scores(model, valid, tokenizer.pad_token_id, batch_size=16)),
        "metric": metric,
        "value": value,
        "trainable": sum(p.numel() for p in trained),
        "adapter_bytes": 4 * sum(p.numel() for p in trained),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model(),
    }


@lru_cache(maxsize=8)
def task_named(name: str) -> TaskData:
    return load_task(name, DATA / name)


@lru_cache(maxsize=1)
def _train_rows(name: str) -> list[Encoded]:
    """Encoded once for all runs of a search."""
    task = task_named(name)
    return encode_split(base_of(task.task_type), task, "train", task.labels, MAX_LENGTH)


def _cpu_model() -> str:
    """As Linux tells it, since seconds of different machines are not to be compared; elsewhere the architecture."""
    cpu_info = Path("/proc/cpuinfo")
    known = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = (line.partition(":")[2].strip() for line in known if line.startswith("model name"))
    return next(models, f"cpu, {platform.machine()}")


def _train(model: Any, trained: list[torch.nn.Parameter], rows: Sequence[Encoded], pad_id: int, cell: Cell) -> None:
    """Without weight decay, with warm-up and linear decay, clipping at 1: as `fit` does by default."""
    settings = FitSettings(max_steps=cell.steps, batch_size=cell.batch_size, learning_rate=cell.lr, seed=cell.seed)
    order = RowOrder([len(row["input_ids"]) for row in rows], settings)
    optimizers = _optimizers(model, trained, cell)
    factor = learning_rate_factor(settings, cell.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    device = default_device()
    model.train()
    for step in range(cell.steps):
        (places,) = order.step(step)
        batch = collate([rows[i] for i in places], pad_id)
        labels = batch.pop("labels").to(device)
        inputs = {key: v.to(device) if torch.is_tensor(v) else v for key, v in batch.items()}
        losses, counts = row_losses(model(**inputs).logits, labels)
        (losses.sum() / counts.sum()).backward()
        clip_grad_norm_(trained, settings.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _optimizers(model: Any, trained: list[torch.nn.Parameter], cell: Cell) -> list[torch.optim.Optimizer]:
    if cell.optimizer == "adamw":
        return [torch.optim.AdamW(trained, lr=cell.lr, weight_decay=0.0)]
    if cell.method not in _PEFT:
        return [Muon(groups_of(model), lr=cell.lr)]
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name and p.ndim == 2}  # long, not square
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in factors]
    muon = torch.optim.Muon(list(factors.values()), lr=cell.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, *([torch.optim.AdamW(others, lr=cell.lr, weight_decay=0.0)] if others else [])]


def _with_method(network: PreTrainedModel, base: BaseModel, task: TaskData, cell: Cell) -> Any:
    if cell.method in _PEFT:
        kind = TaskType.CAUSAL_LM if task.task_type == CAUSAL_LM else TaskType.SEQ_CLS
        config = LoraConfig(
            r=cell.rank,
            lora_alpha=2 * cell.rank,
            target_modules=list(find_targets(network, cell.targets)),
            task_type=kind,
            **_PEFT[cell.method],
        )
        return get_peft_model(network, config)
    if cell.method in SCALED:
        basis, init = weight_basis(network, cell, scaled=SCALED[cell.method]), "zero"
    else:
        basis, init = basis_of(network, base, task, cell), cell.init
    adapter = Adapter.attach(network, basis, init=init)
    if cell.method in SCALED:  # its R starts as noise
        for R in adapter.R.values():
            torch.nn.init.normal_(R, std=1e-5)
    return network


def basis_of(network: PreTrainedModel, base: BaseModel, task: TaskData, cell: Cell) -> Basis:
    """The basis that `cell.basis` names; a calibrated one is made once and kept."""
    if cell.basis == "wsvd":
        return weight_basis(network, cell)
    if cell.basis in DRAWN:
        targets = find_targets(network, cell.targets)
        return _basis(network, cell.rank, random_factors(targets, cell.rank, cell.draw, torch.float32, cell.basis))
    of = calibrated_on(cell)
    settings = calibration_settings(cell)
    made_from = [of, cell.balanced, repr(settings), base.folder.name]

    def make() -> Basis:
        data = {name: task_named(name) for name in of}
        weights = _balancing(base, data, settings) if cell.balanced else None
        return calibrate(base, data, settings, weights=weights)

    return calibrated_once(_CACHE / hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16], make)


def calibration_settings(cell: Cell) -> CalibrationSettings:
    """What the cell's basis is calibrated with."""
    return CalibrationSettings(
        rank=cell.rank,
        samples=cell.samples,
        targets=cell.targets,
        reduction=cell.reduction,
        max_length=MAX_LENGTH,
        capture=False,
        dtype="float32",
        seed=cell.seed,
    )


def _balancing(base: BaseModel, data: Mapping[str, TaskData], settings: CalibrationSettings) -> dict[str, float]:
    weights = {}
    for name, task in data.items():
        rows = draw(task, base, task.labels, settings)
        weights[name] = balancing(gradient(base, task, rows, settings, task.num_labels))
    return weights


def balancing(sums: Mapping[str, torch.Tensor]) -> float:
    """1/‖a task's gradient sum‖: its weight in a mixture, so that no task drowns."""
    return float(sum(g.square().sum() for g in sums.values())) ** -0.5


def gradient(
    base: BaseModel, task: TaskData, rows: Sequence[Encoded], settings: CalibrationSettings, num_labels: int | None
) -> dict[str, torch.Tensor]:
    """The sum over `rows` at W0, with the head of `num_labels` classes that `settings.seed` draws."""
    network = base.load(task.task_type, dtype="float32", num_labels=num_labels, seed=settings.seed)
    targets = find_targets(network, settings.targets)
    sums = gradients_of_rows(network, targets, rows, base.tokenizer.pad_token_id, settings)
    return {name: g.cpu() for name, g in sums.items()}  # those of many tasks are kept


def weight_basis(network: PreTrainedModel, cell: Cell, *, scaled: Literal["A", "B"] | None = None) -> Basis:
    """The leading singular vectors of every weight; `scaled` is the factor that is multiplied by the singular values.

    LoRA-XS has A = Σ·Vᵀ: its code takes the SVD of Wᵀ, and U·Σ of that for the side of the input (2405.17604).
    """
    modules, rank = {}, cell.rank
    for name, module in find_targets(network, cell.targets).items():
        U, S, Vh = torch.linalg.svd(weight_of(module).detach().float(), full_matrices=False)
        B, A, values = U[:, :rank], Vh[:rank], S[:rank]
        B, A = (B * values if scaled == "B" else B), (values[:, None] * A if scaled == "A" else A)
        modules[name] = ModuleBasis(B.contiguous(), A.contiguous(), torch.zeros(rank))
    return _basis(network, rank, modules)


def _basis(network: PreTrainedModel, rank: int, modules: Mapping[str, Factors]) -> Basis:
    return Basis(BaseRef(network.name_or_path, None, "0"), rank, modules, {})
