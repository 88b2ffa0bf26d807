"""vLLM's LoRA layers with B and A held once: y += ((x·Aᵀ)·(s·R)[slot]ᵀ)·Bᵀ for every token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)

from ...format import ModuleBasis
from .routes import Routes


class SharedBasisLayer:
    """Mixed into vLLM's LoRA layers, which bring forward, collectives, quantized weights and slicing for these.

    A packed layer (q, k, v) has several parts, each a module of the basis or none.
    """

    tp_size: int
    output_slices: tuple[int, ...]
    slice_lora_a: Any
    slice_lora_b: Any

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Nothing yet: vLLM tells a layer neither its name nor its basis. `set_basis` follows."""
        self.lora_config = lora_config
        self.has_basis = False

    def set_basis(self, factors: Sequence[ModuleBasis | None], stack: torch.Tensor, routes: Routes) -> None:
        """Take B and A of every part, None where the basis has no such module.

        Args:
            stack: (s·R)ᵀ of the parts that are not None, (n, slots + 1, r, r); the manager fills it.
        """
        A: Any = [factor and factor.A for factor in factors]
        B: Any = [factor and factor.B for factor in factors]
        if self.tp_size > 1:
            A = [self.slice_lora_a(A[0])] if len(A) == 1 else self.slice_lora_a(A)
            B = [self.slice_lora_b(B[0])] if len(B) == 1 else self.slice_lora_b(B)
        sizes = self.output_slices if len(B) > 1 else (B[0].shape[0],)
        self.basis_A = torch.cat([a for a in A if a is not None]).to(stack)  # (n·r, in)
        self.basis_B = [  # (columns of y, Bᵀ (r, out))
            (slice(stop - size, stop), b.T.contiguous().to(stack))
            for b, size, stop in zip(B, sizes, accumulate(sizes), strict=True)
            if b is not None
        ]
        self.stack, self.routes, self.has_basis = stack, routes, True

    def reset_lora(self, index: int) -> None:
        """The manager fills all layers' slots at once."""

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not self.has_basis or self.routes.idle:
            return output
        y = output.view(-1, output.shape[-1])  # (T, out); some models have (1, T, out)
        u = F.linear(x.reshape(-1, x.shape[-1]), self.basis_A)
        v = self.routes.product(u.view(len(y), len(self.basis_B), -1), self.stack)
        for part, (columns, B) in enumerate(self.basis_B):
            y[:, columns].addmm_(v[:, part], B)
        return output


LAYERS = tuple(
    type(f"SharedBasis{stock.__name__}", (SharedBasisLayer, stock), {})
    for stock in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
    )
)
