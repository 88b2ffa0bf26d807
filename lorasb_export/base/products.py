"""Products of 16-bit numbers on a CPU that cannot multiply them: in float32, and rounded once.

torch imitates such products there, number by number, which takes ten to twenty times as long. The weights stay in 16
bits: they are cast for every product, in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from .cpu import multiplies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "sdpa_in_float32"
_FEW = 4  # rows below that are multiplied as vectors, which torch does well in any dtype
_PIECE = 1 << 20  # numbers of a weight: to allocate all of a head anew takes longer than to multiply by it


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype x (…, n) is to be multiplied by a weight, for a result to be rounded to its own."""
    if x.device.type != "cpu" or multiplies(x.dtype) or x.numel() < _FEW * x.shape[-1]:
        return x.dtype
    return torch.float32


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


class _Product(torch.autograd.Function):
    """x·Wᵀ + bias in float32, which saves no copy of the weight.

    It is (tokens, out): given the shape of x in here it would be a view, which a model could not change in place.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return product(x.reshape(-1, x.shape[-1]).float(), weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()  # torch rounds what is returned to the inputs' dtypes
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            product_of_gradient(grad, weight).view(ctx.shape) if to_x else None,
            grad.T @ x.reshape(-1, x.shape[-1]).float() if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


class LinearInFloat32(nn.Linear):
    """A Linear in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if compute_dtype(x) == x.dtype:
            return super().forward(x)
        y: torch.Tensor = _Product.apply(x, self.weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class Conv1DInFloat32(Conv1D):
    """GPT-2's, whose weight is (in, out), in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if compute_dtype(x) == x.dtype:
            unchanged: torch.Tensor = super().forward(x)
            return unchanged
        y: torch.Tensor = _Product.apply(x, self.weight.T, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])


_IN_FLOAT32: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LinearInFloat32, Conv1D: Conv1DInFloat32}


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """torch's own attention, whose backward pass alone is slow in 16 bits."""
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if compute_dtype(query) == query.dtype or not backward:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def compute_in_float32(network: PreTrainedModel) -> None:
    """Have linear layers, and torch's attention, of a network in 16 bits on such a CPU computed in float32."""
    if multiplies(network.dtype):
        return
    for module in network.modules():
        if type(module) in _IN_FLOAT32:
            module.__class__ = _IN_FLOAT32[type(module)]
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(_ATTENTION)
