"""vLLM's LoRA layers with B and A held once: y += ((x·Aᵀ)·(s·R)[slot]ᵀ)·Bᵀ for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from ...errors import SettingsError
from ...layers.factors import Factors
from .slots import Block, Slots

_BLOCK = 1024  # columns of W read at a time
_FUSABLE = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)


class SharedBasisLayer:
    """Mixed into vLLM's LoRA layers, which bring forward, collectives, quantized weights and slicing for these.

    A packed layer (q, k, v) has several parts, each a module of the basis or none, and each fills one slice of y or
    several. On a CPU, where a small product costs as much as a large one, the base's weight is held as [W | B] and
    multiplied by (x, v) in one. Of a basis of blocks neither B nor A is held.
    """

    base_layer: Any
    tp_size: int
    n_slices: int
    output_sizes: Sequence[int]  # of the slices, and `output_slices` of this process' rows of them
    output_slices: tuple[int, ...]
    slice_lora_a: Any
    slice_lora_b: Any
    _get_quant_method: Any

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Nothing yet: vLLM tells a layer neither its name nor its basis. `set_basis` follows."""
        self.lora_config = lora_config
        self.has_basis = self.is_fused = False
        self.blocks: list[Block] = []  # of every part

    def set_basis(self, factors: Sequence[Factors | None], first: int, slots: Slots) -> None:
        """Take B and A of every part, None where the basis has no such module.

        Args:
            first: where the R of the parts that are not None begin in the stack.

        Raises:
            SettingsError: the parts do not fill the layer's slices.
        """
        self.slots, self.has_basis = slots, True
        self.place = slots.place(first, sum(factor is not None for factor in factors))
        spans = self._spans([f.shape[0] if f else None for f in factors]) if self.n_slices > 1 else []
        is_blocks = any(factor is not None and factor.block for factor in factors)
        # Of blocks, the numbers of W's columns and rows are cut as A and B would be.
        A: Any = [f and (torch.arange(f.shape[1])[None] if is_blocks else f.A) for f in factors]
        B: Any = [f and (torch.arange(f.shape[0])[:, None] if is_blocks else f.B) for f in factors]
        if spans:
            B = self._shards(B, spans) if self.tp_size > 1 else B
            sizes = [sum(self.output_slices[span]) for span in spans]
        else:
            if self.tp_size > 1:
                A, B = [self.slice_lora_a(A[0])], [self.slice_lora_b(B[0])]
            sizes = [len(B[0])]
        stack = slots.stack
        own = [slice(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]  # columns of y
        if is_blocks:
            self.blocks = [
                Block.of(a.flatten(), b.flatten(), factor.block, part.start)
                for factor, a, b, part in zip(factors, A, B, own, strict=True)
                if factor is not None and factor.block
            ]
            return
        self.basis_A = torch.cat([a for a in A if a is not None]).to(stack)  # (n·r, in)
        self.basis_B = [  # (columns of y, Bᵀ (r, out))
            (part, b.T.contiguous().to(stack)) for b, part in zip(B, own, strict=True) if b is not None
        ]
        if self._can_fuse():
            self._fuse(sum(sizes))

    def _spans(self, sizes: Sequence[int | None]) -> list[slice]:
        """The slices that each part fills, given its rows of W: one, or those that the checkpoint has as one module."""
        if len(sizes) == self.n_slices:
            return [slice(index, index + 1) for index in range(self.n_slices)]
        edges = [0, *accumulate(self.output_sizes)]
        left = edges[-1] - sum(size for size in sizes if size is not None)  # what a part that is None fills
        ends = [0, *accumulate(left if size is None else size for size in sizes)]
        if ends[-1] != edges[-1] or not set(ends) <= set(edges):
            rows = f"{len(sizes)} modules of {ends[-1]} rows over {self.n_slices} slices of {edges[-1]}"
            raise SettingsError(f"{self.base_layer.prefix} has {rows}", fix="Use --mode folded")
        return [slice(edges.index(start), edges.index(end)) for start, end in pairwise(ends)]

    def _shards(self, B: Sequence[torch.Tensor | None], spans: Sequence[slice]) -> list[torch.Tensor | None]:
        """This process' rows of every part; vLLM takes those of each slice."""
        slices: list[torch.Tensor | None] = []
        for b, span in zip(B, spans, strict=True):
            sizes = list(self.output_sizes[span])
            if b is None:
                slices += [None] * len(sizes)
            else:  # a slice alone is left to vLLM: it may be held by several processes (k, v), and its size is theirs
                slices += b.split(sizes) if len(sizes) > 1 else [b]
        shards = self.slice_lora_b(slices)
        return [None if b is None else torch.cat(shards[span]) for b, span in zip(B, spans, strict=True)]

    def _can_fuse(self) -> bool:
        """On a CPU, with plain weights, and where vLLM does not run a forward of the base layer's own."""
        is_plain = type(self._get_quant_method()) is UnquantizedLinearMethod and hasattr(self.base_layer, "cpu_linear")
        return is_plain and type(self.base_layer) in _FUSABLE

    def _fuse(self, rows: int) -> None:
        """Make W (out, in) into [W | B]. vLLM has packed W its own way, so it is read as W·I, which is exact."""
        method, base, dtype = self._get_quant_method(), self.base_layer, self.basis_A.dtype
        W = torch.cat([method.apply(base, unit).T for unit in _units(self.basis_A.shape[1], dtype)], dim=1)
        B = W.new_zeros(rows, len(self.basis_A))  # (out, n·r): each part's B in its rows of y and its columns of v
        for part, (columns, factor) in enumerate(self.basis_B):
            B[columns].view(-1, len(self.basis_B), self.slots.rank)[:, part] = factor.T
        base.weight = nn.Parameter(torch.cat([W, B], dim=1), requires_grad=False)
        if base.bias is not None:
            base.bias.data = base.bias.to(dtype)  # one of vLLM's kernels has made it fp32, another wants it as it was
        method.process_weights_after_loading(base)
        self.packed_A: Any = nn.Module()
        self.packed_A.weight = nn.Parameter(self.basis_A, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self.packed_A, remove_weight=True)
        del self.basis_A, self.basis_B
        self.is_fused = True

    def reset_lora(self, index: int) -> None:
        """The manager fills all layers' slots at once."""

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.is_fused:
            return super().apply(x, bias)  # type: ignore[misc]
        if self.slots.idle:
            both = F.pad(x, (0, self.place.parts * self.slots.rank))
        else:
            # The weight is empty where the kernel holds A its own way; where vLLM has no such kernel, it is A.
            u = self.packed_A.cpu_linear(x.reshape(-1, x.shape[-1]), self.packed_A.weight, None)
            v = self.slots.product(u, self.place)
            both = torch.cat([x, v.view(*x.shape[:-1], -1)], dim=-1)
        return self._get_quant_method().apply(self.base_layer, both, bias)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not self.has_basis or self.slots.idle:
            return output
        x, y = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])  # some models have (1, T, out)
        if self.blocks:
            self.slots.add_blocks(y, x, self.blocks, self.place)
            return output
        v = self.slots.product(F.linear(x, self.basis_A), self.place)
        for (columns, B), part in zip(self.basis_B, v.split(self.slots.rank, 1), strict=True):
            y[:, columns].addmm_(part, B)
        return output


def _units(size: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The unit matrix, some rows at a time."""
    for columns in torch.arange(size).split(_BLOCK):
        yield F.one_hot(columns, size).to(dtype)


LAYERS = tuple(
    type(f"SharedBasis{stock.__name__}", (SharedBasisLayer, stock), {})
    for stock in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
    )
)
