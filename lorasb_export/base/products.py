"""Products of 16-bit numbers on a CPU that cannot multiply them: in float32, and rounded once.

torch imitates such products there, number by number, which takes ten to twenty times as long. The weights stay in 16
bits, or packed in four: they are cast for every product, in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from .cpu import multiplies
from .nf4 import dequantize, state_of

_FEW = 4  # rows below that are multiplied as vectors, which torch does well in any dtype
_PIECE = 1 << 20  # numbers of a weight: to allocate all of a head anew takes longer than to multiply by it


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype x (…, n) is to be multiplied by a weight, for a result to be rounded to its own.

    A graph that is being recorded, to be compiled or exported, is of the numbers as they are.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return x.dtype
    return x.dtype if multiplies(x.dtype) or x.numel() < _FEW * x.shape[-1] else torch.float32


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + bias (tokens, out), of x (tokens, in) and W (out, in) of any dtype; computed in x's."""
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype == x.dtype or x.device.type != "cpu":
        return linear(x, weight.to(x.dtype), bias)
    y = x.new_empty(len(x), len(weight))
    for part in _pieces(weight):
        y[:, part] = linear(x, weight[part].to(x.dtype), None if bias is None else bias[part])
    return y


def product_of_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad·W (tokens, in), of grad (tokens, out) and W (out, in) of any dtype; computed in grad's."""
    if weight.dtype == grad.dtype or grad.device.type != "cpu":
        return grad @ weight.to(grad.dtype)
    total = grad.new_zeros(len(grad), weight.shape[1])
    for part in _pieces(weight):
        total.addmm_(grad[:, part], weight[part].to(grad.dtype))
    return total


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    rows = max(_PIECE // weight.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Products within are computed in the dtypes that they are given."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Product(torch.autograd.Function):
    """x·Wᵀ + bias in float32, which saves no copy of the weight.

    It is (tokens, out): given the shape of x in here it would be a view, which a model could not change in place.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.state = x.shape, state_of(weight)
        with without_autocast("cpu"):
            return product(x.reshape(-1, x.shape[-1]).float(), dequantize(weight, ctx.state), bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()  # torch rounds what is returned to the inputs' dtypes
        to_x, to_weight, to_bias = ctx.needs_input_grad
        with without_autocast("cpu"):
            return (
                product_of_gradient(grad, dequantize(weight, ctx.state)).view(ctx.shape) if to_x else None,
                grad.T @ x.reshape(-1, x.shape[-1]).float() if to_weight else None,
                grad.sum(0) if to_bias else None,
            )


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = _Product.apply(x, weight, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


class LinearInFloat32(nn.Linear):
    """A Linear in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if compute_dtype(x) == x.dtype else _multiplied(x, self.weight, self.bias)


class Conv1DInFloat32(Conv1D):
    """GPT-2's, whose weight is (in, out), in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if compute_dtype(x) == x.dtype:
            unchanged: torch.Tensor = super().forward(x)
            return unchanged
        return _multiplied(x, self.weight.T, self.bias)


@cache
def _packed_class() -> type[nn.Module]:
    """A Linear4bit: bitsandbytes multiplies in 16 bits too."""
    from bitsandbytes.nn.modules import Linear4bit

    class Linear4bitInFloat32(Linear4bit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if compute_dtype(x) == x.dtype:
                unchanged: torch.Tensor = super().forward(x)
                return unchanged
            return _multiplied(x, self.weight, self.bias)

    return Linear4bitInFloat32


def compute_in_float32(network: nn.Module) -> None:
    """Have the linear layers of a network in 16 bits that lies on such a CPU, and torch's attention, computed so."""
    found = False
    for module in network.modules():
        kind = type(module)
        if kind not in (nn.Linear, Conv1D) and kind.__name__ != "Linear4bit":
            continue
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        dtype = getattr(
            getattr(weight, "quant_state", None), "dtype", weight.dtype
        )  # of the numbers in it, packed or not
        if weight.device.type == "cpu" and not multiplies(dtype):
            found = True
            module.__class__ = {nn.Linear: LinearInFloat32, Conv1D: Conv1DInFloat32}.get(kind) or _packed_class()
    if found:
        from .attention import attend_in_float32

        attend_in_float32()
