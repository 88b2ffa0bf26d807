"""What `bench fit` trains: our layers, PEFT's, and the frozen model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from integration.evidence.cells import DOWN
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel, BaseRef
from lorasb_export.basis import Basis
from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.layers.targets import find_targets
from lorasb_export.quickstart.model import small_model
from lorasb_export.settings import ALL_LINEAR, BLOCK, RANDOM
from lorasb_export.training.muon import Muon

# Name → rank, directions, targets, and the rank of the LoRA, of all linear layers, that it is held against. Of the
# three last the quality comes near that of LoRA r = 8: docs/benchmarks.md.
CHEAPER = {
    "block_r64": (64, BLOCK, ALL_LINEAR, 64),
    "block_r96": (96, BLOCK, ALL_LINEAR, 8),
    "down_r128": (128, RANDOM, DOWN, 8),
    "block_down_r256": (256, BLOCK, DOWN, 8),
}


class Variant:
    """One way to train, ready for its next step."""

    def __init__(self, model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], *, muon: bool = False) -> None:
        self.model, self.loss = model.train(), loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if muon:
            self.optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=1e-4)
        elif parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        self.loss(self.model).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def load(dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(BaseModel.resolve(small_model()).folder, dtype=dtype, use_cache=False)


def random_basis(model: Any, rank: int, directions: str = RANDOM, targets: str = ALL_LINEAR) -> Basis:
    """Orthonormal factors cost a step what calibrated ones do."""
    factors = random_factors(find_targets(model, targets), rank, 0, model.dtype, directions)
    return Basis(BaseRef("bench", None, "0"), rank, factors, {})


def ours(dtype: torch.dtype, rank: int = 64, directions: str = RANDOM, targets: str = ALL_LINEAR) -> Any:
    model = load(dtype)
    Adapter.attach(model, random_basis(model, rank, directions, targets))
    return model


def cheaper(dtype: torch.dtype) -> dict[str, Any]:
    return {name: ours(dtype, *how) for name, (*how, _) in CHEAPER.items()}


def peft(dtype: torch.dtype, rank: int = 64) -> Any:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load(dtype), config)


def floor(dtype: torch.dtype) -> Any:
    """The frozen model alone: forward, and the gradient of every input."""
    model = load(dtype).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def of_all(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The loss of every token."""
    return lambda model: model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]
