"""Random bases and adapters on tiny random models, for tests that need real folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.base.products import weight_of
from lorasb_export.basis import Basis
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.layers.factors import Factors, ModuleBasis
from lorasb_export.layers.head import head_parameters
from lorasb_export.settings import BLOCK, RANDOM

# Of tests.tiny.
LLAMA_MODULES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]
BERT_MODULES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]


def save_base(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save_adapter(
    base: Path,
    model: PreTrainedModel,
    folder: Path,
    modules: list[str],
    *,
    rank: int = 4,
    scaling: float = 2.0,
    task_type: str = CAUSAL_LM,
    relative_size: float | None = None,
    seed: int = 0,
    directions: str = RANDOM,
) -> Adapter:
    """An adapter with its basis embedded: B, A orthonormal, R not symmetric, and a random head for a classifier.

    `relative_size` is that of the update, ‖s·B·R·A‖ / ‖W0‖ = s·‖R‖ / ‖W0‖, the same in every module.
    """
    generator = torch.Generator().manual_seed(seed)
    found = dict(model.named_modules())
    factors: dict[str, Factors] = {}
    R = {}
    for name in modules:
        weight = weight_of(found[name])
        rows, columns = weight.shape
        B = torch.linalg.qr(torch.randn(rows, rank, generator=generator))[0]
        A = torch.linalg.qr(torch.randn(columns, rank, generator=generator))[0].T.contiguous()
        factors[name] = ModuleBasis(B, A, torch.ones(rank))
        R[name] = torch.randn(rank, rank, generator=generator)
        if relative_size is not None:
            R[name] *= relative_size * weight.detach().norm() / (scaling * R[name].norm())
    if directions == BLOCK:
        factors = random_factors({name: found[name] for name in modules}, rank, seed, torch.float32, BLOCK)
    ref = BaseModel.resolve(base).ref(modules)
    basis = Basis(ref, rank, factors, {"samples": 1})
    head = {}
    if task_type != CAUSAL_LM:
        head = {name: torch.randn(p.shape, generator=generator) for name, p in head_parameters(model).items()}
    adapter = Adapter(ref, basis.sha256, None, R, scaling, task_type, head, basis=basis)
    adapter.save(folder)
    return Adapter.load(folder)


def adapter_on(base: Path, folder: Path, task_type: str, **training: Any) -> Adapter:
    """A random adapter of `base`, whose head has an output for each of training's labels, or one."""
    num_labels = len(training.get("labels", [])) or 1
    network = BaseModel.resolve(base).load(task_type, num_labels=num_labels if task_type == SEQ_CLS else None)
    modules = LLAMA_MODULES if task_type == CAUSAL_LM else BERT_MODULES
    adapter = save_adapter(base, network, folder, modules, task_type=task_type, relative_size=0.3)
    adapter.training = training
    return adapter


def write_in(model: PreTrainedModel, adapter: Adapter) -> None:
    """W0 + s·B·R·A by hand, and the head."""
    found = dict(model.named_modules())
    for name, R in adapter.R.items():
        module = adapter.load_basis().modules[name]
        weight_of(found[name]).data += adapter.scaling * module.B @ R @ module.A
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.head.items():
        parameters[name].data.copy_(tensor)
