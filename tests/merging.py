"""Adapters to merge, and what a model answers."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasb_export import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import SEQ_CLS
from tests.random_adapter import save_adapter

MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


def adapter_for(
    base: Path, folder: Path, modules: list[str] = MODULES, task_type: str = "CAUSAL_LM", directions: str = "random"
) -> Path:
    model = BaseModel.resolve(base).load(task_type, num_labels=3 if task_type == SEQ_CLS else None)
    save_adapter(base, model, folder, modules, task_type=task_type, relative_size=0.3, directions=directions)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def unmerged_logits(base: Path, adapter: Path, task_type: str = "CAUSAL_LM") -> torch.Tensor:
    network = BaseModel.resolve(base).load(task_type, num_labels=3 if task_type == SEQ_CLS else None)
    Adapter.load(adapter).inject(network)
    return logits(network)
